"""A few seconds of fuzzing, and proof that the harness would notice what it looks for."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from moshi_hub.verify import REASONS
from tests.fuzz import runner
from tests.fuzz.__main__ import main
from tests.fuzz.examples import example, records_below
from tests.fuzz.runner import Plan, run, save
from tests.fuzz.targets import TARGETS, Target, working_in

SECONDS = 120.0  # on a machine with nothing else to do it takes five


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with working_in(tmp_path):
        yield tmp_path


def test_some_seconds_of_hostile_input_show_no_defect(folder: Path) -> None:
    tallies, failures = run(Plan(inputs=4000, seed=1, jobs=2, seconds=SECONDS))
    assert not failures, failures[0]
    assert all(tally.inputs for tally in tallies.values())
    gate = {word for name in tallies if name.startswith("gate") for word in tallies[name].words}
    assert gate <= {"accepted", *REASONS}
    # Mutants get past the first checks, else nothing is said about the later ones.
    assert len(gate) > 12
    assert {"accepted", "bad-values", "not-safetensors", "wrong-layout", "over-norm"} <= gate


def grow() -> str:
    return str(len(bytearray(os.urandom(1) * (200 << 20))))


def loop() -> str:
    while True:
        pass


def stumble() -> str:
    raise ValueError("a bug")


def swallow() -> str:
    try:
        return loop()
    except Exception:
        return "no reader may swallow the alarm"


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        (stumble, "ValueError: a bug"),
        (loop, "takes more than 1.0 s"),
        (swallow, "takes more than 1.0 s"),
        (grow, "bytes; the bound is"),
        (lambda: os._exit(7), "the process died"),
    ],
)
def test_a_defect_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, defect: Callable[[], str], said: str
) -> None:
    def read(made: int) -> str:
        return defect() if made == 3 else "ok"

    monkeypatch.setattr(runner, "SILENCE_SECONDS", 3.0 if said == "the process died" else 60.0)
    monkeypatch.setattr(runner, "WARM_UP", 0)
    for name in list(TARGETS):
        monkeypatch.delitem(TARGETS, name)
    monkeypatch.setitem(TARGETS, "x", Target(lambda random: random.randrange(20), read, 1000))
    seed = next(seed for seed in range(100) if first_three(seed) in {1, 2, 3, 4})
    failures = run(Plan(inputs=first_three(seed) + 1, seed=seed, jobs=1))[1]
    assert len(failures) == 1
    assert said in failures[0].what
    assert failures[0].index == first_three(seed)


def first_three(seed: int) -> int:
    """Number of the first input that is a three."""
    return next(n for n in range(1000) if runner.input_of("x", seed, n) == 3)


def test_a_failing_input_is_kept_with_the_command_that_shows_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = runner.Failure("header", 5, 17, "what it was")
    save([failure], folder / "out")
    kept = (folder / "out" / "header-5-17.input").read_bytes()
    assert kept == runner.input_of("header", 5, 17)
    about = json.loads((folder / "out" / "header-5-17.json").read_text())
    words = shlex.split(about["command"])
    assert words[:3] == ["python", "-m", "tests.fuzz"]
    assert main(words[3:]) == 0
    assert repr(kept)[:100] in capsys.readouterr().out


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_follows_from_its_number(folder: Path, name: str) -> None:
    for index in range(20):
        assert runner.input_of(name, 3, index) == runner.input_of(name, 3, index)


@pytest.mark.parametrize("kind", list(records_below()), ids=lambda kind: kind.__qualname__)
@pytest.mark.parametrize("full", [True, False])
def test_every_record_has_an_example(kind: type, full: bool) -> None:
    for seed in range(5):
        assert example(kind, Random(seed), full=full) is not None
