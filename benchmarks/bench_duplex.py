"""A live conversation on one core: what a frame of 80 ms takes from sound to sound.

Mimi in its real configuration, and the language model of 131 million parameters of
``bench_speech_lm``, through ``DuplexSession``: 5 s of warming up, then 20 s that count, wall time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.bench_mimi import random_mimi
from benchmarks.bench_speech_lm import TABLE
from benchmarks.clock import now, threads
from benchmarks.common import Row, print_table
from moshi_fl.models.speech.duplex import DuplexSession
from moshi_fl.models.speech.latency import Latency
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.mimi import Mimi

WARM, FRAMES = 62, 250


class Silent:
    """No tokenizer: what the tokens spell takes no time worth counting."""

    def pieces(self, ids: Sequence[int]) -> str:
        return ""


def conversation(mimi: Mimi, lm: LMModel, *, int8: bool) -> tuple[Latency, float]:
    """Wall time of the frames, and CPU seconds of one on average."""
    sound = torch.randn(1, (WARM + FRAMES) * mimi.frame_size) / 10
    with DuplexSession(mimi, lm, Silent(), seed=0, int8=int8) as session:
        for number, frame in enumerate(sound.split(mimi.frame_size, dim=1)):
            if number == WARM:
                session.latency, start = Latency(session.latency.frame), now()
            session.push(frame)
        return session.latency, (now() - start) / FRAMES


def run() -> list[Row]:
    torch.manual_seed(0)
    mimi, lm = random_mimi(), LMModel(LMConfig.from_kyutai(TABLE)).eval()
    rows = []
    with threads(1):
        for int8 in (False, True):
            found, cpu = conversation(mimi, lm, int8=int8)
            times = [1e3 * found.quantile(share) for share in (0.5, 0.95, 1.0)]
            rows.append(
                Row(
                    f"duplex, a frame from sound to sound, {'eight bits' if int8 else 'fp32'}",
                    " / ".join(f"{time:.0f}" for time in times) + " ms (median, p95, worst)",
                    "-",
                    1 / found.real_time_factor,
                    "real time on one core: below 80 ms",
                    note=f"factor {found.real_time_factor:.2f}; {1e3 * cpu:.0f} ms of CPU time",
                )
            )
    return rows


if __name__ == "__main__":
    print_table(run())
