"""``python -m moshi_fl.train``: the reference's YAML in, a model out, whatever happens between."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moshi_fl.cli import run
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.shards import write_shards
from moshi_fl.train.__main__ import main
from moshi_fl.train.settings import read_settings
from moshi_fl.weights import Weights, open_weights, weights_digest

CONFIG = """
model: {d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, vocab_size: 64, max_seq_len: 16,
        rope_theta: 1e6, dropout: 5e-2, n_experts: 2, multiple_of: 16}
data_dir: data
val_share: 0.1
val_interval: 4
val_batches: 2
device: cpu
compile_model: false
max_steps: 8
warmup_steps: 3
log_interval: 2
save_interval: 3
batch_size: 2
gradient_accumulation_steps: 2
num_workers: 4
learning_rate: 1e-2
"""
CHAR = """
family: char
model: {n_layer: 1, n_head: 2, d_model: 16, d_ff: 32, context: 16, vocab_size: 64}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    tokens = (np.arange(3000) ** 2 % 61).astype(np.uint16)
    write_shards([tokens], tmp_path / "data", tokens_per_shard=1100)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def trainer(*changes: str, flags: tuple[str, ...] = ()) -> int:
    words = [word for change in changes for word in ("--set", change)]
    return run(main, ["c.yaml", *words, *flags])


def digest(out: str) -> str:
    return weights_digest(open_weights(Path(out, "final", "model.safetensors")))


def metrics(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_checkpoints_the_best_weights_and_its_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert trainer("keep_checkpoints=2") == 0
    out = Path("checkpoints")
    assert (out / "latest").read_text() == "ckpt_8.safetensors\n"
    assert sorted(path.name for path in out.glob("ckpt*")) == [
        "ckpt_6.safetensors",
        "ckpt_8.safetensors",
    ]
    config = json.loads((out / "best" / "config.json").read_text())
    assert (config["family"], config["rope_theta"]) == ("moc", 1e6)
    last = [line for line in metrics("checkpoints") if "loss/total" in line][-1]
    assert {"loss/main", "loss/aux", "perplexity", "lr", "grad_norm", "mfu"} <= set(last)
    assert {"experts/util_layer0/e1", "experts/drop_rate", "timing/eta_sec"} <= set(last)
    assert last["lr"] == pytest.approx(1e-4)
    losses = [line["loss/validation"] for line in metrics("checkpoints") if len(line) == 2]
    assert json.loads((out / "best.json").read_text())["loss"] == min(losses)
    said = capsys.readouterr().err
    assert said.count("without meaning here: num_workers") == 1


KILLED = """
import os, signal, sys
left = int(sys.argv.pop(1))
def hook(name, arguments):
    global left
    if name == "os.rename" and "ckpt_" in str(arguments[1]) and (left := left - 1) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from moshi_fl.cli import run
from moshi_fl.train.__main__ import main
sys.exit(run(main, sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["precision=bf16", "schedule=one-cycle"])
def test_a_process_killed_in_the_middle_of_a_checkpoint_goes_on_to_the_same_weights(
    way: str,
) -> None:
    command = [sys.executable, "-c", KILLED, "2", "c.yaml", "--set", way]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert trainer(way, flags=("--resume",)) == 0
    assert trainer(way, "out_dir=whole") == 0
    assert digest("checkpoints") == digest("whole")
    steps = [line["step"] for line in metrics("checkpoints") if "lr" in line]
    assert steps == [2, 4, 6, 8]


def test_another_configuration_is_named_with_both_values_and_fresh_moves_it_aside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert trainer() == 0
    assert trainer("learning_rate=2e-2", "model.n_experts=4") == 1
    said = capsys.readouterr().err
    assert "learning_rate (0.01 there, 0.02 here)" in said
    assert "model.n_experts (2 there, 4 here)" in said
    assert trainer("learning_rate=2e-2", flags=("--fresh",)) == 0
    assert Path("checkpoints/before-1/ckpt_8.safetensors").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_works(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert trainer() == 0
    before = digest("checkpoints")
    newest = Path("checkpoints/ckpt_8.safetensors")
    newest.write_bytes(newest.read_bytes()[:-9])
    assert trainer() == 1
    said = capsys.readouterr().err
    assert "ckpt_8.safetensors is damaged" in said
    assert "goes on from ckpt_6.safetensors" in said
    newest.unlink()
    assert trainer() == 0
    assert digest("checkpoints") == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "line 1: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("\nbatch_size: many", "line 2: batch_size = 'many' must be a number"),
        ("batch_size: 1.5", "must be a whole number"),
        ("compile_model: 3", "compile_model = 3 must be true or false"),
        ("model: [1]", "must have keys of its own"),
        ("a: [", "not YAML"),
        ("- a", "expected keys with values"),
        ("model: {d_modle: 3}\ndevice: cpu", "d_model"),
        ("device: cpu\nval_share: 2", "val_share"),
        (
            "device: cpu\nmodel: {d_model: 16, n_heads: 2, n_kv_heads: 2}\ndata_dir: nowhere",
            "no folder",
        ),
        ("device: abacus", "is not a device"),
        ("device: cpu\nfamily: bert", "must be moc or char"),
    ],
)
def test_a_bad_file_is_one_clear_error(
    text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(text)
    assert trainer() == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("Error: ") == 1


def test_cuda_on_a_machine_without_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert trainer("device=cuda") == 1
    assert "Hint: --set device=cpu" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wild = ("learning_rate=1e37", "warmup_steps=0", "save_interval=1", "grad_clip=1e30")
    assert trainer(*wild) == 1
    said = capsys.readouterr().err
    assert "learning rate" in said
    assert " at step " in said
    for path in Path("checkpoints").glob("ckpt*"):
        assert all(np.isfinite(tensor).all() for tensor in open_weights(path).values())


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer(flags=("--dry-run",)) == 0
    assert not Path("checkpoints").exists()
    assert "parameters" in capsys.readouterr().out


def test_a_char_model_trains_from_the_same_kind_of_file() -> None:
    text = CONFIG.partition("data_dir")[2]
    Path("c.yaml").write_text(CHAR + "data_dir" + text)
    assert trainer() == 0
    assert digest("checkpoints")


def test_the_references_keys_have_the_references_defaults() -> None:
    Path("c.yaml").write_text(
        "model: {d_model: 1024, n_heads: 16, n_kv_heads: 4, rope_theta: 1e6}\nlearning_rate: 3e-4\n"
    )
    settings, idle = read_settings(Path("c.yaml"))
    assert (settings.learning_rate, settings.max_steps, idle) == (3e-4, 600_000, [])
    assert (settings.beta2, settings.grad_clip, settings.save_interval) == (0.95, 1.0, 1000)
    assert MocConfig.from_reference(settings.model).rope_theta == 1e6


STOPPED = """
import os, signal, sys
import moshi_fl.train.engine as engine
def hook(name, arguments):
    if name == "os.rename" and "ckpt_3" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
from moshi_fl.cli import run
from moshi_fl.train.__main__ import main
sys.exit(run(main, sys.argv[1:]))
"""


def test_ctrl_c_saves_and_says_how_to_go_on() -> None:
    command = [sys.executable, "-c", STOPPED, "c.yaml", "--set", "val_share=0"]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert "Hint: python -m moshi_fl.train c.yaml --set val_share=0" in stopped.stderr
    assert Path("checkpoints/latest").read_text() == "ckpt_4.safetensors\n"


def test_two_trainers_do_not_share_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from moshi_fl.train.folder import RunFolder

    with RunFolder(Path("checkpoints")).held():
        assert trainer() == 1
    assert "another trainer is at work" in capsys.readouterr().err


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints, mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    linux = sys.platform == "linux"
    if not linux or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_without_room_for_a_checkpoint_loses_nothing(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(CHAR + "data_dir" + CONFIG.partition("data_dir")[2])
    ways = ("val_share=0", f"out_dir={disk}")
    assert trainer(*ways) == 1
    said = capsys.readouterr().err
    assert said.count("Error: ") == 1
    assert "No space left on device" in said
    assert str(disk) in said
    assert (disk / "latest").read_text() == "ckpt_6.safetensors\n"
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert trainer(*ways, flags=("--resume",)) == 0
    assert trainer("val_share=0", "out_dir=whole") == 0
    assert digest(str(disk)) == digest("whole")


def test_trackers_that_are_not_installed_are_a_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshi_fl.train.logs.find_spec", lambda _: None)
    assert trainer("wandb_project=moc", "tensorboard=true") == 0
    said = capsys.readouterr().err
    assert said.count("pip install wandb") == said.count("pip install tensorboard") == 1


def same_weights(one: Weights, other: Weights) -> None:
    """Up to rounding, which Adam makes large where a gradient is small, as for keys' biases."""
    assert set(one) == set(other)
    for name, array in one.items():
        there = slice(None, 16) if name.endswith("in_proj_bias") else slice(None)
        gap = np.linalg.norm(array[there] - other[name][there])
        assert gap <= 1e-2 * np.linalg.norm(array[there]), name


@pytest.mark.slow
def test_what_stops_one_process_stops_all_with_its_message() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    wild = ["--set", "learning_rate=1e37", "--set", "grad_clip=1e30", "--set", "warmup_steps=0"]
    command = [*torchrun, "-m", "moshi_fl.train", "c.yaml", *wild]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.count("Error: the ") == 1, ended.stderr


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch_and_either_goes_on_for_the_other() -> None:
    text = CONFIG.partition("data_dir")[2]
    Path("c.yaml").write_text(CHAR + "data_dir" + text)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = [*torchrun, "-m", "moshi_fl.train", "c.yaml", "--set", "out_dir=two"]
    ended = subprocess.run(two, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert trainer("batch_size=4", "out_dir=one") == 0
    one, other = (open_weights(Path(out, "final", "model.safetensors")) for out in ("one", "two"))
    same_weights(one, other)
    for a, b in zip(metrics("one"), metrics("two"), strict=True):
        for key in {"loss/total", "loss/validation", "grad_norm"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=1e-3)
    Path("two/ckpt_8.safetensors").unlink()
    assert trainer("batch_size=4", "out_dir=two") == 0
    same_weights(one, open_weights(Path("two", "final", "model.safetensors")))
