"""Mimi in its real configuration beside PyPI ``moshi`` 0.2.13, on the same weights and sound.

Weights are random: no time depends on them. Each frame is encoded and decoded by both, turn by
turn in one run, and codes and sound are compared before anything counts. One thread, CPU time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import moshi_rival
from benchmarks.clock import now, threads
from benchmarks.common import Row, print_table
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.mimi_config import SEANET_FIXED, TRANSFORMER_FIXED, MimiConfig
from moshi_fl.models.speech.transformer import StreamingTransformer

FRAMES = 60
WARM = 5  # frames that do not count
LONG = 100  # frames at once, where all of a sound is at hand
LEVELS = 8
AGES = (100, 10_000, 45_000)  # frames into a stream; the last is an hour
ROUNDS = 25


def reference_table(config: MimiConfig) -> dict[str, Any]:
    """The configuration under the names of the reference."""
    width, transformer = config.seanet.dimension, vars(config.transformer)
    theirs = ("d_model", "num_heads", "num_layers", "dim_feedforward", "context", "max_period")
    more = ("gating", "norm", "positional_embedding", "layer_scale")
    ends = {"input_dimension": width, "output_dimension": width}
    return {
        "sample_rate": config.sample_rate,
        "frame_rate": config.frame_rate,
        "seanet": vars(config.seanet) | SEANET_FIXED | {"ratios": list(config.seanet.ratios)},
        "quantizer": vars(config.quantizer) | ends,
        "transformer": {key: transformer[key] for key in (*theirs, *more)}
        | TRANSFORMER_FIXED
        | {"input_dimension": width, "output_dimensions": [width]},
    }


def random_mimi() -> Mimi:
    torch.manual_seed(0)
    mimi = Mimi(MimiConfig()).eval()
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_()
        elif name.endswith("_initialized"):
            buffer.fill_(1)
    mimi.set_num_codebooks(LEVELS)
    return mimi


def timed(work: Callable[[Tensor], Tensor], x: Tensor, times: list[float]) -> Tensor:
    start = now()
    y = work(x)
    times.append(now() - start)
    return y


def streaming_rows(ours: Mimi, theirs: Any) -> list[Row]:
    """Frame by frame, beyond the context of ten seconds in one row and at a stream's start."""
    sound = torch.randn(1, 1, (FRAMES + WARM) * ours.frame_size) / 10
    times: dict[str, list[float]] = {name: [] for name in ("oe", "od", "te", "td")}
    with ours.streaming(1), theirs.streaming(1):
        for frame in torch.split(sound, ours.frame_size, dim=-1):
            codes = timed(ours.encode, frame, times["oe"])
            other = timed(theirs.encode, frame, times["te"])
            assert torch.equal(codes, other), "the rival's codes are others"
            heard = timed(ours.decode, codes, times["od"])
            wanted = timed(theirs.decode, codes, times["td"])
            torch.testing.assert_close(heard, wanted, atol=1e-4, rtol=1e-4)
    ms = {name: 1e3 * statistics.median(found[WARM:]) for name, found in times.items()}
    both = [1e3 * (a + b) for a, b in zip(times["oe"], times["od"], strict=True)][WARM:]
    rows = [
        Row(
            what="Mimi, streaming, encode + decode of one 80 ms frame",
            ours=f"{ms['oe'] + ms['od']:.1f} ms",
            rival=f"{ms['te'] + ms['td']:.1f} ms (moshi 0.2.13)",
            ratio=(ms["te"] + ms["td"]) / (ms["oe"] + ms["od"]),
            target="<= 70 ms",
            floor=f"{weight_read(ours):.1f} ms: reading the weights once",
            note=f"slowest of {FRAMES} frames: {max(both):.0f} ms",
        )
    ]
    for what, mine, other in (("encode", "oe", "te"), ("decode", "od", "td")):
        rows.append(
            Row(
                what=f"… {what} alone",
                ours=f"{ms[mine]:.1f} ms",
                rival=f"{ms[other]:.1f} ms (moshi 0.2.13)",
                ratio=ms[other] / ms[mine],
                target="",
            )
        )
    return rows


def weight_read(ours: Mimi) -> float:
    """Milliseconds in which this machine reads as many bytes as a frame needs, now."""
    count = sum(parameter.numel() for parameter in ours.parameters())
    size = count + LEVELS * ours.cardinality * ours.config.quantizer.dimension
    numbers = torch.ones(size)
    times: list[float] = []
    for _ in range(5):
        timed(torch.sum, numbers, times)
    return 1e3 * statistics.median(times)


def offline_row(ours: Mimi, theirs: Any) -> Row:
    sound = torch.randn(1, 1, LONG * ours.frame_size) / 10
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(3):
        for name, model in (("ours", ours), ("theirs", theirs)):
            timed(lambda x, model=model: model.decode(model.encode(x)), sound, times[name])
    mine, other = (statistics.median(times[name]) / LONG for name in ("ours", "theirs"))
    return Row(
        what=f"Mimi, encode + decode of {LONG} frames at once, per frame",
        ours=f"{1e3 * mine:.1f} ms",
        rival=f"{1e3 * other:.1f} ms (moshi 0.2.13)",
        ratio=other / mine,
        target="",
    )


def age_row(ours: Mimi) -> Row:
    """The same stream, put forward to later ages; its rings are full throughout."""
    frame = torch.randn(1, 1, ours.frame_size) / 10
    times: dict[int, list[float]] = {age: [] for age in AGES}
    transformers = [part for part in ours.modules() if isinstance(part, StreamingTransformer)]
    with ours.streaming(1):
        for _ in range(ROUNDS):
            for age in AGES:
                for part in transformers:
                    tokens = age * ours.config.stride
                    part.progress().offsets.fill_(tokens)
                    part.progress().written = tokens
                timed(lambda x: ours.decode(ours.encode(x)), frame, times[age])
    first, _, last = (1e3 * min(times[age]) for age in AGES)
    return Row(
        what=f"Mimi, streaming, cost per frame at frame {', '.join(f'{age:,}' for age in AGES)}",
        ours=", ".join(f"{1e3 * min(times[age]):.1f} ms" for age in AGES),
        rival="ours, at the first",
        ratio=first / last,
        target="equal within 5 %",
        note=f"fastest of {ROUNDS}",
    )


def run() -> list[Row]:
    ours = random_mimi()
    with threads(1), torch.no_grad():
        rows = [age_row(ours)]
        try:
            theirs = moshi_rival.mimi(ours, reference_table(ours.config))
        except ImportError as error:
            print(f"{moshi_rival.MISSING} ({error})", file=sys.stderr)
            return rows
        return [*streaming_rows(ours, theirs), offline_row(ours, theirs), *rows]


if __name__ == "__main__":
    print_table(run())
