"""``moshi-fl speak``: let the model answer a voice, in sound and in text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moshi_fl.cli import Real, output_options
from moshi_fl.console import Console
from moshi_fl.text import Duration, Figure
from moshi_sdk.chosen import FILE, Choice, model_options

if TYPE_CHECKING:
    from moshi_fl.models.speech.duplex import DuplexSession


@click.command()
@click.option("--in", "source", required=True, type=FILE, help="The user's voice.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Where the reply goes: a .wav or .flac file.",
)
@click.option(
    "--seconds",
    type=Real(0),
    default=0.0,
    show_default=True,
    help="Go on so long after the voice has ended.",
)
@click.option("--stereo", is_flag=True, help="Write both: the model left, the user right.")
@click.option("--temperature", type=Real(0), default=0.8, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=250, show_default=True, help="0: all.")
@click.option("--text-temperature", type=Real(0), default=0.7, show_default=True)
@click.option("--text-top-k", type=click.IntRange(0), default=25, show_default=True, help="0: all.")
@click.option("--int8", is_flag=True, help="Weights in eight bits: faster, a little less exact.")
@click.option("--seed", type=click.IntRange(0), help="Makes the reply repeatable.")
@model_options
@output_options
def speak(  # noqa: PLR0913 - one parameter an option
    console: Console,
    *,
    source: Path,
    out: Path,
    seconds: float,
    stereo: bool,
    temperature: float,
    top_k: int,
    text_temperature: float,
    text_top_k: int,
    int8: bool,
    seed: int | None,
    choice: Choice,
) -> None:
    r"""Answer a voice with the hub's model: it listens and speaks at once, frame by frame.

    \b
    Examples:
      moshi-fl speak --in question.wav --out answer.wav --seconds 10
      moshi-fl speak --in question.wav --out both.flac --stereo --seed 1
      moshi-fl speak --in question.wav --out answer.wav --temperature 0 --text-temperature 0
    """
    from moshi_sdk.speak import converse, require_files, speech_parts

    require_files(source, out)
    chosen = choice.load()
    parts = speech_parts(chosen.task, chosen.module)
    from moshi_fl.models.speech.duplex import DuplexSession
    from moshi_fl.models.speech.sampling import Sampling

    sampling = Sampling(
        temp=temperature, top_k=top_k, temp_text=text_temperature, top_k_text=text_top_k
    )
    with DuplexSession(
        parts.mimi, parts.lm, parts.text, sampling=sampling, seed=seed, int8=int8
    ) as session:
        for piece in converse(session, source, out, seconds=seconds, stereo=stereo):
            console.write(piece)
        if not console.json_mode:
            console.write("\n")
        _report(console, session, out, chosen.round)


def _report(console: Console, session: DuplexSession, out: Path, number: int | None) -> None:
    latency = session.latency
    console.done(
        f"Wrote {out}",
        round=number,
        seconds=Duration(latency.frames * latency.frame),
        frames=latency.frames,
        frame_ms=Figure(round(1e3 * latency.frame, 2)),
        median_ms=Figure(round(1e3 * latency.quantile(0.5), 2)),
        p95_ms=Figure(round(1e3 * latency.quantile(0.95), 2)),
        worst_ms=Figure(round(1e3 * latency.worst, 2)),
        real_time_factor=Figure(round(latency.real_time_factor, 3)),
        keeps_up=latency.real_time_factor <= 1,
    )
    if latency.real_time_factor > 1:
        console.note(
            f"A frame is {1e3 * latency.frame:.0f} ms: this machine does not keep up with a live "
            "conversation. Eight bits (--int8) are faster, and a small model is on one thread "
            "(moshi-fl config set threads 1)."
        )
