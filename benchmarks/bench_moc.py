"""MoC against its reference, written plainly from the same formulas: a training step and decoding.

Both sides have the same weights and see the same tokens, turn by turn in one run; medians count.
With one thread the clock is CPU time, which other programs disturb less. Losses and gradients are
compared before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.clock import seconds, threads
from benchmarks.common import Row, print_table
from benchmarks.moc_rival import Rival
from moshi_fl.models.moc import Moc
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.moc_decode import MocDecoder
from moshi_fl.train.engine import Engine
from moshi_fl.train.hardware import best_precision
from moshi_fl.train.recipe import Recipe

CONFIG = MocConfig(
    d_model=256,
    n_layers=4,
    n_heads=8,
    n_kv_heads=8,
    vocab_size=512,
    max_seq_len=256,
    n_experts=8,
    n_reasoning_steps=2,
    grad_ckpt_policy="none",
)
TURNS = 5
TARGETS = {("fp32", "fp32"): ">= 1.15x", ("bf16", "fp32"): ">= 1.8x", ("bf16", "bf16"): ">= 1.3x"}
PROMPT, NEW = 24, 32  # tokens


def pair(config: MocConfig) -> tuple[Moc, Rival]:
    torch.manual_seed(0)
    ours, theirs = Moc(config), Rival(config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch_of(config: MocConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (8, config.max_seq_len + 1))


def worst_difference(ours: Moc, theirs: Rival, batch: torch.Tensor) -> tuple[float, float]:
    """Of the losses, and of any gradient relative to its largest value."""
    mine, other = ours(batch[:, :-1], batch[:, 1:]).loss.total, theirs(batch[:, :-1], batch[:, 1:])
    mine.backward()
    other[1].backward()
    named = dict(theirs.named_parameters())
    gaps = [
        float(
            (p.grad - named[name].grad).abs().max() / named[name].grad.abs().max().clamp_min(1e-9)
        )
        for name, p in ours.named_parameters()
        if p.grad is not None and named[name].grad is not None
    ]
    ours.zero_grad()
    theirs.zero_grad()
    return float((mine - other[1]).detach().abs()), max(gaps)


def training_row(count: int, policy: str, precision: str = "fp32", theirs_in: str = "fp32") -> Row:
    ours, _ = pair(CONFIG)
    _, theirs = pair(replace(CONFIG, grad_ckpt_policy=policy))
    batch = batch_of(CONFIG)
    loss, gradient = worst_difference(ours, theirs, batch)
    recipe = Recipe(steps=1000, learning_rate=3e-4, schedule="cosine", precision=precision)
    engine = Engine(ours, lambda m, b: (m(b[:, :-1], b[:, 1:]).loss.total, b.numel()), recipe)
    optimizer = theirs.optimizer()

    def their_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=theirs_in == "bf16"):
            loss = theirs(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    mine: list[float] = []
    other: list[float] = []
    with threads(count), engine.active():
        for turn in range(TURNS + 1):
            mine.append(seconds(lambda turn=turn: engine.step(turn, [batch])))
            other.append(seconds(their_step))
    a, b = statistics.median(mine[1:]), statistics.median(other[1:])
    tokens = batch[:, 1:].numel()
    name = "its default, ffn checkpointing" if policy == "ffn" else "without checkpointing"
    return Row(
        what=f"MoC training step, {precision}, {count} thread{'s'[: count - 1]}",
        ours=f"{tokens / a:,.0f} tokens/s",
        rival=f"{tokens / b:,.0f} tokens/s (reference, {theirs_in}, {name})",
        ratio=b / a,
        target=TARGETS[precision, theirs_in],
        floor=f"{ours.flops_per_token() * tokens / 1e9 / gemm_peak(count):.2f} s at GEMM speed",
        note=f"losses within {loss:.0e}, gradients within {gradient:.0e} of their largest",
    )


def gemm_peak(count: int) -> float:
    """Billions of operations a second of a float32 product of an expert's size."""
    a, b = torch.randn(512, 256), torch.randn(256, 1536)
    with threads(count):
        times = [seconds(lambda: [torch.mm(a, b) for _ in range(20)]) for _ in range(5)]
    return 20 * 2 * a.numel() * b.shape[1] / min(times) / 1e9


def decoding_rows(batch: int, storage: str) -> list[Row]:
    ours, theirs = pair(CONFIG)
    ours.eval()
    theirs.eval()
    tokens = torch.randint(CONFIG.vocab_size, (batch, PROMPT + NEW))
    decoder = MocDecoder(ours, batch, storage="int8" if storage == "int8" else "float32")
    steps = range(PROMPT, PROMPT + NEW)

    def mine() -> None:
        decoder.restart(tokens[:, :PROMPT])
        for t in steps:
            decoder.step(tokens[:, t])

    def cached() -> None:
        _, past = theirs(tokens[:, :PROMPT])
        for t in steps:
            _, past = theirs(tokens[:, t : t + 1], past=past)

    def uncached() -> None:
        for t in steps[::8]:
            theirs(tokens[:, : t + 1])

    with threads(1), torch.inference_mode():
        mine()
        times: list[list[float]] = [
            [seconds(work) / n for work, n in ((mine, NEW), (cached, NEW), (uncached, NEW // 8))]
            for _ in range(3)
        ]
    a, b, c = (statistics.median(column) for column in zip(*times, strict=True))
    what = f"MoC decoding, batch {batch}{', int8 weights' if storage == 'int8' else ''}, 1 thread"
    shown = f"{batch / a:,.0f} tokens/s"
    return [
        Row(what, shown, f"{batch / b:,.0f} tokens/s (reference, cache mended)", b / a, ">= 1.2x"),
        Row(what, shown, f"{batch / c:,.0f} tokens/s (reference, no cache)", c / a, ">= 4x"),
    ]


def run() -> list[Row]:
    work: list[Callable[[], list[Row]]] = [
        lambda: [training_row(1, "none")],
        lambda: [training_row(1, "ffn")],
        lambda: [training_row(2, "none")],
        lambda: decoding_rows(1, "float32"),
        lambda: decoding_rows(16, "float32"),
        lambda: decoding_rows(1, "int8"),
    ]
    if best_precision("cpu") == "bf16":
        work.append(lambda: [training_row(1, "none", "bf16", other) for other in ("fp32", "bf16")])
    else:
        print("no row for bf16: this CPU does not multiply it natively (AVX512_BF16, AMX)")
    return [row for part in work for row in part()]


if __name__ == "__main__":
    print_table(run())
