import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moshi_fl.errors import ConfigError, CorruptRecord, TrainingError
from moshi_fl.models import get_family
from moshi_fl.models.char_corpus import CharCorpus
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.common import extract_weights, load_weights
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.train import Progress, Recipe, calibrate, checkpoint_state, steps_for_epochs, train
from moshi_fl.weights import open_weights, read_header, save_weights, weights_digest

MODEL = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 32, "context": 32, "dropout": 0.1}
RECIPE = Recipe(steps=12, batch_size=4, learning_rate=1e-2, seed=5)


@pytest.fixture(scope="module")
def task() -> CharTask:
    task = get_family("char").load(MODEL, CharVocabulary().to_bytes())
    assert isinstance(task, CharTask)
    return task


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for i in range(20):
        (folder / f"f{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return folder


@pytest.fixture(scope="module")
def corpus(task: CharTask, code: Path) -> CharCorpus:
    return task.read([code], seed=0)


def run(task: CharTask, corpus: CharCorpus, recipe: Recipe, **options: object) -> str:
    """Digest of the weights after training from the base of seed 0."""
    module = task.build()
    load_weights(module, task.initial_weights(0))
    train(module, task, corpus, recipe, **options)  # type: ignore[arg-type]
    return weights_digest(extract_weights(module))


class Killed(BaseException):
    pass


def killed_after(step: int) -> dict[str, object]:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return {"on_step": on_step}


@pytest.mark.parametrize(
    "ways",
    [
        {},
        {"precision": "bf16", "accumulation": 2},
        {"schedule": "cosine", "accumulation": 3, "batch_size": 2, "steps": 6},
    ],
    ids=str,
)
def test_a_run_ended_after_any_step_resumes_to_the_same_weights(
    task: CharTask, corpus: CharCorpus, tmp_path: Path, ways: dict[str, Any]
) -> None:
    recipe = replace(RECIPE, **ways)
    uninterrupted = run(task, corpus, recipe)
    for step in range(1, recipe.steps + 1):
        options = {"checkpoint": tmp_path / f"{step}", "checkpoint_seconds": 0.0}
        with pytest.raises(Killed):
            run(task, corpus, recipe, **options, **killed_after(step))
        assert run(task, corpus, recipe, **options) == uninterrupted, step


KILLED_AT_AN_EVENT = """
import os, signal, sys
from pathlib import Path
from typing import Any
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_train as story

event, countdown = sys.argv[4], int(sys.argv[5])

def hook(name, arguments):
    global countdown
    if name == event and (countdown := countdown - 1) == 0:
        os.kill(os.getpid(), signal.SIGKILL)

task = story.get_family("char").load(story.MODEL, story.CharVocabulary().to_bytes())
corpus = task.read([Path(sys.argv[2])], seed=0)
sys.addaudithook(hook)
story.run(task, corpus, story.RECIPE, checkpoint=Path(sys.argv[3]), checkpoint_seconds=0.0)
"""


def test_a_process_killed_while_it_writes_a_checkpoint_resumes_to_the_same_weights(
    task: CharTask, code: Path, corpus: CharCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    checkpoint = tmp_path / "checkpoint"
    for event in ("os.rename", "tempfile.mkstemp"):  # before and after the bytes of a new file
        script = [sys.executable, "-c", KILLED_AT_AN_EVENT, str(Path(__file__).parent)]
        killed = subprocess.run([*script, str(code), str(checkpoint), event, "2"], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert 0 < checkpoint_state(checkpoint)[0] < RECIPE.steps
    options = {"checkpoint": checkpoint, "checkpoint_seconds": 0.0}
    assert run(task, corpus, RECIPE, **options) == run(task, corpus, RECIPE)


def test_a_finished_run_is_not_trained_again(
    task: CharTask, corpus: CharCorpus, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    first = run(task, corpus, RECIPE, checkpoint=checkpoint)
    steps: list[Progress] = []
    assert run(task, corpus, RECIPE, checkpoint=checkpoint, on_step=steps.append) == first
    assert steps == []


def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(
    task: CharTask, corpus: CharCorpus, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    run(task, corpus, RECIPE, checkpoint=checkpoint)
    other = replace(RECIPE, learning_rate=1e-4, steps=20)
    with pytest.raises(TrainingError) as caught:
        run(task, corpus, other, checkpoint=checkpoint)
    assert "steps (12 there, 20 here), learning_rate (0.01 there, 0.0001 here)" in str(caught.value)
    assert "remove that file" in caught.value.hint
    module = task.build()
    load_weights(module, task.initial_weights(1))
    other_corpus = replace(corpus, split=replace(corpus.split, training=("x = 1",)))
    with pytest.raises(TrainingError, match=r"differ: data \(.*, base \("):
        train(module, task, other_corpus, RECIPE, checkpoint=checkpoint)


@pytest.mark.parametrize("damage", ["truncated", "no checkpoint", "other tensors"])
def test_a_damaged_checkpoint_is_named(
    task: CharTask, corpus: CharCorpus, tmp_path: Path, damage: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    run(task, corpus, RECIPE, checkpoint=checkpoint)
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    else:
        metadata = read_header(checkpoint).metadata if damage == "other tensors" else {}
        save_weights(checkpoint, {"a": np.zeros(1, np.float32)}, metadata)
    with pytest.raises(CorruptRecord, match="checkpoint"):
        run(task, corpus, RECIPE, checkpoint=checkpoint)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good_checkpoint(
    task: CharTask, corpus: CharCorpus, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    options = {"checkpoint": checkpoint, "checkpoint_seconds": 0.0}
    with pytest.raises(TrainingError, match=r"of 12, learning rate 9\.8e") as caught:
        run(task, corpus, replace(RECIPE, learning_rate=1e37), **options)
    assert "lower learning rate" in caught.value.hint
    done, _ = checkpoint_state(checkpoint)
    assert f"at step {done + 1} of" in str(caught.value)
    assert all(np.isfinite(tensor).all() for tensor in open_weights(checkpoint).values())


def test_training_learns_and_leaves_the_module_ready_for_use(
    task: CharTask, corpus: CharCorpus
) -> None:
    module = task.build()
    load_weights(module, task.initial_weights(0))
    pool = task.pool(corpus, 8, seed=0, held_out=True)
    before = task.evaluate(module, pool, torch.device("cpu")).mean()
    seen: list[Progress] = []
    result = train(module, task, corpus, replace(RECIPE, steps=60), on_step=seen.append)
    after = task.evaluate(module, pool, torch.device("cpu")).mean()
    assert after < before - 2
    assert not module.training
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert seen[-1].seconds_left == 0
    assert all(progress.tokens_per_second > 0 for progress in seen)
    assert result.loss == pytest.approx(np.mean([p.loss for p in seen[-6:]]))
    assert (result.steps, result.resumed_from, result.tokens) == (60, 0, 60 * 4 * 32)


def test_bf16_keeps_float32_weights_and_learns_like_float32(
    task: CharTask, corpus: CharCorpus
) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        module = task.build()
        load_weights(module, task.initial_weights(0))
        recipe = replace(RECIPE, steps=60, precision=precision)
        losses[precision] = train(module, task, corpus, recipe).loss
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    weights = extract_weights(module)["blocks.0.ff.0.weight"]
    rounded = torch.tensor(weights).bfloat16().float().numpy()
    assert not np.array_equal(weights, rounded)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_training_does_not_disturb_the_callers_random_numbers(
    task: CharTask, corpus: CharCorpus
) -> None:
    module = task.build()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    train(module, task, corpus, replace(RECIPE, steps=1))
    assert torch.equal(torch.rand(1), wanted)


def test_calibration_tells_how_many_steps_fit_and_changes_nothing(
    task: CharTask, corpus: CharCorpus
) -> None:
    module = task.build()
    before = weights_digest(extract_weights(module))
    few = calibrate(module, task, corpus, RECIPE, minutes=1e-9)
    many = calibrate(module, task, corpus, RECIPE, minutes=5)
    assert few == 1
    assert many > 100
    assert weights_digest(extract_weights(module)) == before


def test_epochs_are_counted_in_windows(corpus: CharCorpus) -> None:
    windows = corpus.num_examples
    assert windows == -(-(len(corpus.tokens) - 1) // corpus.context)
    assert steps_for_epochs(corpus, 4, 2) == -(-2 * windows // 4)
    assert steps_for_epochs(corpus, 10_000, 0.01) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("gradient_clip", 0.0),
        ("warmup_fraction", 1.5),
        ("precision", "fp16"),
        ("seed", -1),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        replace(RECIPE, **{key: value})
