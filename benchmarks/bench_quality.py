"""Validation loss per token budget: our model against nanoGPT-style code of the same size.

Both train on the same batches of part of Python's standard library, split by file, and are judged
on the same held-out windows. Ours runs the library's optimizer and one-cycle schedule; the rival
runs nanoGPT's: its initialisation, AdamW 0.9/0.99 with weight decay 0.1 on matrices, warm-up over
100 steps, cosine to a tenth. ``python -m benchmarks.bench_quality --base`` runs the base geometry.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_char import Rival
from benchmarks.common import Row
from moshi_fl.models.char import CharConfig
from moshi_fl.models.char_corpus import CharCorpus, stream
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.common import load_weights
from moshi_fl.optimizer import AdamW, clip_, one_cycle
from moshi_fl.tokenizer import CharVocabulary

SMALL = CharConfig(n_layer=4, n_head=4, d_model=128, d_ff=512, context=64)
BASE = CharConfig()
MODULES = ("argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "csv", "dis")
MODULES += ("difflib", "doctest", "fractions", "ftplib", "gettext", "gzip", "heapq", "imaplib")
MODULES += ("inspect", "ipaddress", "locale", "mailbox", "nntplib", "optparse", "pdb", "pickle")
MODULES += ("platform", "plistlib", "pprint", "pydoc", "random", "shutil", "smtplib", "socket")
MODULES += ("statistics", "subprocess", "tarfile", "textwrap", "threading", "trace", "traceback")
MODULES += ("turtle", "typing", "uuid", "zipapp")

Forward = Callable[[Tensor], Tensor]
Curve = list[tuple[int, float]]  # tokens seen, validation loss


@dataclass(frozen=True)
class Budget:
    """How long, and where on the way to look."""

    steps: int
    batch_size: int
    looks: int = 4

    def looks_at(self, step: int) -> bool:
        return (step + 1) % (self.steps // self.looks) == 0


class Race:
    """One text, one split, one sequence of batches for everybody."""

    def __init__(self, config: CharConfig, budget: Budget) -> None:
        self.config, self.budget = config, budget
        self.task = CharTask(config, CharVocabulary())
        library = Path(sysconfig.get_path("stdlib"))
        paths = [path for name in MODULES if (path := library / f"{name}.py").exists()]
        self.corpus: CharCorpus = self.task.read(paths, seed=0)
        held_out = torch.from_numpy(stream(self.task.vocabulary, self.corpus.split.held_out))
        count = min(len(held_out) // (config.context + 1), 6000 // config.context * 4)
        size = count * (config.context + 1)
        self.validation = held_out[:size].long().view(count, -1)

    def batches(self) -> Iterator[Tensor]:
        return self.task.batches(self.corpus, self.budget.batch_size, seed=0)

    @torch.no_grad()
    def judge(self, forward: Forward) -> float:
        parts = [loss_of(forward, rows).item() * len(rows) for rows in self.validation.split(32)]
        return sum(parts) / len(self.validation)

    def curve(self, forward: Forward, update: Callable[[int, Tensor], None]) -> Curve:
        curve: Curve = []
        tokens = self.budget.batch_size * self.config.context
        for step, batch in zip(range(self.budget.steps), self.batches(), strict=False):
            update(step, batch)
            if self.budget.looks_at(step):
                curve.append(((step + 1) * tokens, self.judge(forward)))
        return curve

    def ours(self, rate: float, **settings: object) -> Curve:
        task = replace(self.task, config=replace(self.config, **settings))
        module = task.build()
        load_weights(module, task.initial_weights(0))
        optimizer = AdamW({n: p.data for n, p in module.named_parameters()}, weight_decay=0.01)
        steps = self.budget.steps

        def update(step: int, batch: Tensor) -> None:
            now, beta1 = one_cycle(step, steps, peak=rate, warmup_fraction=0.05)
            module.zero_grad()
            loss_of(module, batch).backward()
            gradients = [p.grad for p in module.parameters()]
            clip_(gradients, 1.0)
            optimizer.step(gradients, step, learning_rate=now, beta1=beta1)

        return self.curve(module, update)

    def rivals(self, rate: float) -> Curve:
        torch.manual_seed(0)
        model = Rival(self.config, self.task.vocabulary.size)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        rest = [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        groups = [{"params": matrices, "weight_decay": 0.1}, *rest]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
        steps = self.budget.steps
        warmup = min(100, steps // 10)

        def update(step: int, batch: Tensor) -> None:
            done = max(step - warmup, 0) / (steps - warmup)
            now = rate * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.zero_grad()
            model(batch[:, :-1], batch[:, 1:])[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        def forward(tokens: Tensor) -> Tensor:
            return model(tokens, torch.zeros_like(tokens))[0]

        return self.curve(forward, update)


def loss_of(forward: Forward, rows: Tensor) -> Tensor:
    return F.cross_entropy(forward(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def run(config: CharConfig = SMALL, budget: Budget | None = None) -> list[Row]:
    race = Race(config, budget or Budget(steps=480, batch_size=12))
    rates = (1e-3, 3e-3)
    curves = {f"nanoGPT-style, {rate:g}": race.rivals(rate) for rate in rates}
    best = min(curve[-1][1] for curve in curves.values())
    for norm in ("post", "pre"):
        for rate in rates:
            curves[f"{norm}-norm, {rate:g}"] = race.ours(rate, norm=norm)
    return [row_of(name, curve, best, config) for name, curve in curves.items()]


def row_of(name: str, curve: Curve, best: float, config: CharConfig) -> Row:
    losses = ", ".join(f"{loss:.3f} at {tokens / 1e3:.0f} k" for tokens, loss in curve)
    size = f"L{config.n_layer} d{config.d_model} context {config.context}"
    print(f"{size}: {name}: {losses}", file=sys.stderr, flush=True)
    return Row(
        what=f"validation loss by tokens, {size}: {name}",
        ours=losses,
        rival=f"{best:.3f} (nanoGPT-style, its best rate)",
        ratio=best / curve[-1][1],
        target="" if name.startswith("nano") else ">= 1.0x",
    )


if __name__ == "__main__":
    from benchmarks.common import print_table

    if "--base" in sys.argv:
        print_table(run(BASE, Budget(steps=64, batch_size=8)))
    else:
        print_table(run())
