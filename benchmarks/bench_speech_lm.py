"""The Moshi language model and TTT beside PyPI ``moshi`` 0.2.13, on the same weights and tokens.

A model of 131 million parameters with Moshi's shape. Both sides take turns in one run; medians
count. One thread, CPU time. Greedy tokens are compared before anything counts. TTT's reference is
no package: its rival here is its formulas written plainly, a copy of the weights for each token.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import moshi_rival
from benchmarks.clock import seconds, threads
from benchmarks.common import Row, print_table
from moshi_fl.models.speech.checkpoints import released_state
from moshi_fl.models.speech.eight_bits import in_eight_bits
from moshi_fl.models.speech.generate import LMGen
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.sampling import Sampling
from moshi_fl.models.speech.ttt import Ttt
from moshi_fl.models.speech.ttt_config import TttConfig
from moshi_fl.train.hardware import best_precision
from moshi_fl.train.memory import kept_memory

TABLE: dict[str, Any] = {
    "dim": 512,
    "text_card": 32000,
    "n_q": 16,
    "dep_q": 8,
    "card": 2048,
    "num_heads": 8,
    "num_layers": 8,
    "hidden_scale": 4.125,
    "context": 3000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 256,
    "depformer_dim_feedforward": 1056,
    "depformer_num_heads": 4,
    "depformer_num_layers": 6,
    "depformer_multi_linear": True,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}
STEPS, WARM = 25, 4  # of a conversation
PREFILL, TURNS = 250, 3  # frames
STEPS_A_TURN = 3  # of training
TTT = TttConfig(512, 8)
AGES = (100, 10_000, 45_000)  # frames into a stream; the last is an hour

Work = Callable[[], object]


def medians(*works: Work, turns: int = TURNS) -> list[float]:
    """Median seconds of each, taken in turns."""
    taken = [[seconds(work) for work in works] for _ in range(turns)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def pair() -> tuple[LMModel, Any | None]:
    """Ours, and the rival's with the same weights where it is installed."""
    torch.manual_seed(0)
    ours = LMModel(LMConfig.from_kyutai(TABLE)).eval()
    try:
        rival = moshi_rival.part("models.lm").LMModel(**TABLE).eval()
    except ImportError:
        print(moshi_rival.MISSING, file=sys.stderr)
        return ours, None
    rival.load_state_dict(released_state(ours))
    return ours, rival


def step_rows(ours: LMModel, rival: Any | None) -> list[Row]:
    greedy = Sampling(use_sampling=False)
    rows = []
    for batch, target, limit in ((1, "<= 0.62 of theirs (45 of 73 ms)", "45"), (8, "<= 0.65", "")):
        user = torch.randint(2048, (batch, 8, 1))
        players = [LMGen(ours, greedy), LMGen(in_eight_bits(ours), greedy)][: 2 if limit else 1]
        if rival is not None:
            players.append(moshi_rival.part("models.lm").LMGen(rival, use_sampling=False))
        times, said = conversation(players, user)
        theirs = times[-1] if rival is not None else float("nan")
        same = rival is None or all(
            a is b or torch.equal(a, b) for a, b in zip(said[0], said[-1], strict=True)
        )
        note = "" if rival is None else f"greedy tokens {'equal' if same else 'DIFFER'}"
        name = f"LMGen step, {batch} stream{'s'[: batch - 1]}"
        rows.append(row(f"{name}, fp32", times[0] * 1e3, theirs * 1e3, "ms", target, note))
        if limit:
            what = f"{name}, int8 weights"
            rows.append(row(what, times[1] * 1e3, theirs * 1e3, "ms", "<= 0.34 (25 of 73 ms)"))
    return rows


@torch.no_grad()
def conversation(players: Sequence[Any], user: Tensor) -> tuple[list[float], list[list[Any]]]:
    """Median seconds of each player's step, and what each says."""
    said: list[list[Any]] = [[] for _ in players]
    streams = [player.streaming(len(user)) for player in players]
    for stream in streams:
        stream.__enter__()
    try:
        taken = [
            [
                seconds(lambda p=p, s=s: s.append(p.step(user)))
                for p, s in zip(players, said, strict=True)
            ]
            for _ in range(WARM + STEPS)
        ]
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    return [statistics.median(column) for column in zip(*taken[WARM:], strict=True)], said


@torch.no_grad()
def prefill_row(ours: LMModel, rival: Any | None) -> Row:
    codes = torch.randint(2048, (1, 17, PREFILL))

    def read(model: Any) -> None:
        with model.streaming(1):
            read_prompt = model.read if model is ours else model.forward_text
            read_prompt(codes)

    works = [lambda: read(ours)] + ([lambda: read(rival)] if rival is not None else [])
    times = medians(*works)
    return speed_row("streaming prefill of 250 frames", PREFILL, times, "frames/s", ">= 2x")


def training_rows(ours: LMModel, rival: Any | None) -> list[Row]:
    """In float32, and as contributors train where the processor multiplies bfloat16."""
    codes = torch.randint(2048, (2, 17, 125))

    def our_step(rough: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            total = losses(ours(codes), codes, ours.config).total
        total.backward()

    def their_step() -> None:
        assert rival is not None
        out = rival(codes)
        text = F.cross_entropy(out.text_logits[out.text_mask].float(), codes[:, :1][out.text_mask])
        audio = F.cross_entropy(out.logits[out.mask].float(), codes[:, 1:9][out.mask])
        (text + audio).backward()

    rivals = [their_step] if rival is not None else []
    what, tokens, rows = "training, 2 x 125 frames", 2 * 125 * 9, []
    times = training_medians(our_step, *rivals)
    rows.append(speed_row(what, tokens, times, "tokens/s", ">= 1.3x"))
    if best_precision("cpu") == "bf16":
        times = training_medians(lambda: our_step(rough=True), *rivals)
        rows.append(speed_row(f"{what}, bf16, theirs fp32", tokens, times, "tokens/s", ""))
    return rows


def training_medians(ours: Work, *rivals: Work) -> list[float]:
    """Median seconds of each, taken in turns of some steps: ours keeps memory from step to step.

    The first step of a turn, which fetches that memory from the system, is not counted.
    """
    taken: list[list[float]] = [[] for _ in (ours, *rivals)]
    for _ in range(TURNS):
        for work, column in zip((ours, *rivals), taken, strict=True):
            with kept_memory() if work is ours else nullcontext():
                work()
                column += [seconds(work) for _ in range(STEPS_A_TURN)]
    return [statistics.median(column) for column in taken]


def plain_ttt(layer: Ttt, x: Tensor) -> Tensor:
    """TTT-Linear token by token: gradients summed, and weights of its own for each token."""
    K, D, answers = TTT.mini_batch, TTT.head_dim, []
    gain, shift = layer.head_norm(len(x))
    ((weight, bias),) = layer.first_weights(len(x))
    for t in range(x.shape[1]):
        q, k, target, eta = layer.project(x[:, t : t + 1], torch.tensor([[t % K]]))
        if t % K == 0:
            dw, db = torch.zeros_like(weight), torch.zeros_like(bias)
        z = k @ weight + bias
        mean, std = (
            z.mean(-1, keepdim=True),
            (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt(),
        )
        normal = (z - mean) / std
        u = gain * (gain * normal + shift - target)
        total, along = u.sum(-1, keepdim=True), (u * normal).sum(-1, keepdim=True)
        g = (D * u - total - normal * along) / (D * std)
        dw, db = dw + eta[..., None] * k.mT @ g, db + eta[..., None] * g
        tau = layer.causal()[t % K, 0]
        now, now_bias = weight - tau * dw, bias - tau * db
        z = q @ now + now_bias
        answers.append(q + F.layer_norm(z, (D,), eps=1e-6) * gain + shift)
        if t % K == K - 1:
            weight, bias = now, now_bias
    y = torch.cat(answers, dim=1).view(len(x), -1, x.shape[1], D).transpose(1, 2).reshape(x.shape)
    return layer.o_proj(layer.post_norm(y))


@torch.no_grad()
def ttt_rows() -> list[Row]:
    torch.manual_seed(0)
    layer, x = Ttt(TTT), torch.randn(1, 96, 512)
    gap = float((layer(x) - plain_ttt(layer, x)).abs().max())

    def stream() -> None:
        with layer.streaming(1):
            for token in x.split(1, dim=1):
                layer(token)

    long = torch.randn(1, 1024, 512)
    streamed, plain, dual = medians(stream, lambda: plain_ttt(layer, x), lambda: layer(long))
    token, theirs = streamed / 96, plain / 96
    note = f"outputs within {gap:.0e}; the reference itself: 0.76 ms on a quiet machine"
    first = row("TTT-Linear, d = 512, a token", token * 1e3, theirs * 1e3, "ms", ">= 2x", note)
    speed = Row(
        "TTT-Linear, d = 512, dual form",
        f"{1024 / dual:,.0f} tokens/s",
        "14,200 tokens/s (the reference on a quiet machine)",
        1024 / dual / 14_200,
        ">= 1.5x",
    )
    return [first, speed]


@torch.no_grad()
def age_rows(ours: LMModel) -> list[Row]:
    """What a frame costs, early and late in a stream."""
    torch.manual_seed(0)
    layer, token = Ttt(TTT), torch.randn(1, TTT.mini_batch, 512)
    rows = []
    saved = []
    with layer.streaming(1):
        for age, before in zip(AGES, (0, *AGES), strict=False):
            layer(torch.randn(1, age - before, 512))
            saved.append(layer.get_streaming_state())
        rows.append(ages("TTT-Linear layer", lambda n: returned(layer, saved[n], token)))
    model, column = ours.transformer, torch.randn(1, 1, 512)
    with model.streaming(1):
        states = []
        for age in AGES:
            progress = model.progress()
            progress.offsets.fill_(age)
            progress.written = age
            states.append(model.get_streaming_state())
        work = [lambda n=n: returned(model, states[n], column) for n in range(len(AGES))]
        rows.append(ages("ring attention, 8 layers, context 3000", lambda n: work[n]()))
    return rows


def returned(module: Any, state: Any, x: Tensor) -> Work:
    """The work of reading ``x`` token by token from ``state`` on."""
    module.set_streaming_state(state)
    return lambda: [module(token) for token in x.split(1, dim=1)]


def ages(what: str, at: Callable[[int], Work]) -> Row:
    taken = [[seconds(at(n)) for n in range(len(AGES))] for _ in range(15)]
    early, middle, late = (statistics.median(column) for column in zip(*taken, strict=True))
    shown = " / ".join(f"{value * 1e3:.2f}" for value in (early, middle, late))
    note = "the ring is a thirtieth full at frame 100" if "ring" in what else ""
    label = f"{what}: a frame at {AGES[0]} / {AGES[1]:,} / {AGES[2]:,}"
    return Row(label, f"{shown} ms", "-", middle / late, "within 5 %", note=note)


def row(what: str, ours: float, theirs: float, unit: str, target: str, note: str = "") -> Row:
    return Row(what, f"{ours:.2f} {unit}", f"{theirs:.2f} {unit}", theirs / ours, target, note=note)


def speed_row(what: str, amount: int, times: list[float], unit: str, target: str) -> Row:
    shown = [f"{amount / taken:,.0f} {unit}" for taken in times]
    rival = shown[1] if len(shown) > 1 else "not installed"
    ratio = times[1] / times[0] if len(times) > 1 else float("nan")
    return Row(what, shown[0], rival, ratio, target)


def run() -> list[Row]:
    with threads(1):
        ours, rival = pair()
        rows = step_rows(ours, rival)
        rows.append(prefill_row(ours, rival))
        rows += training_rows(ours, rival)
        return [*rows, *ttt_rows(), *age_rows(ours)]


if __name__ == "__main__":
    print_table(run())
