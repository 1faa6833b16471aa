"""The character model against nanoGPT-style code of the same size: training step and generation.

The rival is written here from the papers (GPT-2: pre-norm blocks with biases, learnt positions,
tied head; fused attention) and runs the way nanoGPT runs on a CPU: ``torch.optim.AdamW``, no cache
in generation. Both sides train on the same batches, turn by turn in one run; medians count.
With one thread the clock is CPU time, which other programs disturb less.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clock import now, seconds, threads
from benchmarks.common import Row, print_table
from moshi_fl.models import get_family
from moshi_fl.models.char import CharConfig
from moshi_fl.models.char_decode import CharDecoder
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.common import load_weights
from moshi_fl.models.family import Sampling
from moshi_fl.train import Progress, Recipe, train
from moshi_fl.train.hardware import best_precision

STEPS = 7
NEW_TOKENS = 384
RIVAL_TOKENS = 12
TARGETS = {("fp32", "fp32"): ">= 1.2x", ("bf16", "fp32"): ">= 2.2x", ("bf16", "bf16"): ">= 1.4x"}


class RivalBlock(nn.Module):
    def __init__(self, config: CharConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.c_fc = nn.Linear(config.d_model, config.d_ff)
        self.gelu = nn.GELU()
        self.c_out = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.c_out(self.gelu(self.c_fc(self.ln_2(x))))
        return torch.add(x, F.dropout(y, self.dropout, self.training))


class Rival(nn.Module):
    def __init__(self, config: CharConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.context, self.dropout = config.context, config.dropout
        self.wte = nn.Embedding(vocabulary_size, config.d_model)
        self.wpe = nn.Embedding(config.context, config.d_model)
        self.h = nn.ModuleList(RivalBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, vocabulary_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:  # nanoGPT's shortcut: only the last position goes through the head
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    @torch.no_grad()
    def generate(self, idx: Tensor, count: int) -> Tensor:
        for _ in range(count):
            logits, _ = self(idx[:, -self.context :])
            probabilities = F.softmax(logits[:, -1, :] / 0.8, dim=-1)
            idx = torch.cat((idx, torch.multinomial(probabilities, num_samples=1)), dim=1)
        return idx


class RivalTrainer:
    def __init__(self, model: Rival, batches: Iterator[Tensor], precision: str) -> None:
        self.model, self.batches, self.precision = model, batches, precision
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))

    def step(self) -> None:
        batch = next(self.batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            _, loss = self.model(batch[:, :-1], batch[:, 1:])
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


@dataclass
class Turns:
    """Called after each of our steps: lets the rival make one, and times both."""

    rival: Callable[[], None]

    def __post_init__(self) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.start = now()

    def __call__(self, _: Progress) -> None:
        self.ours.append(now() - self.start)
        self.theirs.append(seconds(self.rival))
        self.start = now()


def training_row(
    task: CharTask, code: Path, count: int, precision: str, dropout: float, theirs_in: str = "fp32"
) -> Row:
    task = replace(task, config=replace(task.config, dropout=dropout))
    corpus = task.read([code], seed=0)
    module = task.build()
    load_weights(module, task.initial_weights(0))
    rival = Rival(task.config, task.vocabulary.size)
    trainer = RivalTrainer(rival, task.batches(corpus, 8, seed=0), theirs_in)
    recipe = Recipe(steps=STEPS, batch_size=8, precision=precision)
    with threads(count):
        turns = Turns(trainer.step)
        train(module, task, corpus, recipe, on_step=turns)
    ours, theirs = (statistics.median(times[1:]) for times in (turns.ours, turns.theirs))
    tokens = 8 * task.config.context
    return Row(
        what=f"char training step, base, {precision}, dropout {dropout}, threads: {count}",
        ours=f"{tokens / ours:,.0f} tokens/s",
        rival=f"{tokens / theirs:,.0f} tokens/s (nanoGPT-style, {theirs_in})",
        ratio=theirs / ours,
        target=TARGETS[precision, theirs_in],
    )


def generation_row(task: CharTask, count: int) -> Row:
    module = task.build()
    load_weights(module, task.initial_weights(0))
    module.fc_out.bias.data[task.vocabulary.end] = -1e4  # untrained weights must not stop early
    rival = Rival(task.config, task.vocabulary.size).eval()
    prompt = "x" * 2 * task.config.context  # so that the window is full from the start
    window = torch.tensor([task.vocabulary.encode(prompt).tolist()])
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.8, seed=0)
    ours, theirs = [], []
    with threads(count):
        for _ in range(5):
            start = now()
            made = sum(1 for _ in task.generate(module, prompt, sampling))
            ours.append((now() - start) / made)
            theirs.append(seconds(lambda: rival.generate(window, RIVAL_TOKENS)) / RIVAL_TOKENS)
    mine, other = statistics.median(ours), statistics.median(theirs)
    return Row(
        what=f"char generation at full context 384, {count} thread{'s'[: count - 1]}",
        ours=f"{1 / mine:,.0f} tokens/s",
        rival=f"{1 / other:,.1f} tokens/s (nanoGPT-style, no cache)",
        ratio=other / mine,
        target=">= 20x",
    )


def int8_row(task: CharTask) -> Row:
    module = task.build()
    load_weights(module, task.initial_weights(0))
    tokens = list(range(10, 90)) * 4
    exact, rounded = CharDecoder(module), CharDecoder(module, "int8")
    times: tuple[list[float], list[float]] = ([], [])
    with threads(1):
        logits = [decoder.restart(tokens[:256]) for decoder in (exact, rounded)]
        for token in tokens[256:]:
            for index, decoder in enumerate((rounded, exact)):
                start = now()
                logits[index] = decoder.step(token)
                times[index].append(now() - start)
    mine, other = map(statistics.median, times)
    error = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    return Row(
        what="char generation, int8 weights, 1 thread",
        ours=f"{1 / mine:,.0f} tokens/s",
        rival=f"{1 / other:,.0f} tokens/s (ours, float32 weights)",
        ratio=other / mine,
        target=">= 1.8x",
        note=f"logits differ by {error:.1%} of their norm",
    )


def run() -> list[Row]:
    family = get_family("char")
    preset = family.presets["base"]
    task = family.load(preset.model, preset.tokenizer)
    assert isinstance(task, CharTask)
    rows = [generation_row(task, count) for count in (1, 2)]
    rows.append(int8_row(task))
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.py"
        code.write_text("".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(3000)))
        for dropout in (0.0, 0.1):
            rows += [training_row(task, code, count, "fp32", dropout) for count in (1, 2)]
        if best_precision("cpu") == "bf16":
            for dropout in (0.0, 0.1):
                for theirs in ("fp32", "bf16"):
                    rows.append(training_row(task, code, 1, "bf16", dropout, theirs))
        else:
            print("no AVX512_BF16 here: no bf16 rows", file=sys.stderr)
    return rows


if __name__ == "__main__":
    print_table(run())
