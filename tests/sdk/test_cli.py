from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import moshi_hub.cli
import moshi_sdk.cli
from moshi_fl.cli import group, run

SAMPLE = '''
import os
import signal
import click
from moshi_fl.cli import hub_option, output_options
from moshi_fl.errors import Exit, HubError, Rejected
from moshi_fl.text import Size


@click.command()
@hub_option
@output_options
def show(console, hub):
    """Long help of show."""
    console.note("looking")
    console.result(hub=hub, size=Size(168_000))


@click.command()
@output_options
def refuse(console):
    console.result(id="abc")
    raise Rejected("delta is not finite.", hint="train again")


@click.command()
@output_options
def unreachable(console):
    raise HubError("no answer.", hint="try later")


@click.command()
@output_options
def waits(console):
    return Exit.MORE_ATTESTATIONS


@click.command()
@output_options
def interrupted(console):
    console.resume_command = "moshi-fl contribute --resume"
    console.note("ready")
    signal.pause()


@click.command()
@output_options
def breaks(console):
    console.result(round=3)
    raise RuntimeError("a bug")


@click.command()
@output_options
def full(console):
    with open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)


@click.command()
@output_options
def talks(console):
    for number in range(100_000):
        console.line(str(number))
'''
NAMES = ("show", "refuse", "unreachable", "waits", "interrupted", "breaks", "full", "talks")
MAIN = f"""
import sys
from moshi_fl.cli import group, run
table = {{name: ("sample_commands:" + name, "Help of " + name + ".") for name in {NAMES}}}
root = group("sample", table, "A sample.")
if __name__ == "__main__":
    sys.exit(run(root))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sample_commands.py").write_text(SAMPLE)
    (tmp_path / "sample.py").write_text(MAIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("sample", "sample_commands"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.fixture
def sample(folder, capsys):
    assert folder.exists()
    root = importlib.import_module("sample").root

    def call(*args):
        status = run(root, args)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(folder / "sample.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def test_help_lists_all_commands_without_importing_one(sample):
    status, out, _ = sample("--help")
    assert status == 0
    for name in NAMES:
        assert f"Help of {name}." in out
    assert "sample_commands" not in sys.modules


def test_a_command_has_its_own_help(sample):
    status, out, _ = sample("show", "-h")
    assert status == 0
    assert "Long help of show." in out
    assert "--hub URL" in out
    assert "--json" in out


def test_facts_are_text_or_json(sample):
    assert sample("show", "--hub", "x.git") == (0, "hub   x.git\nsize  168 KB\n", "looking\n")
    status, out, err = sample("show", "--json")
    assert (status, json.loads(out), err) == (0, {"hub": None, "size": 168_000}, "looking\n")
    assert sample("show", "-q", "--json")[2] == ""


def test_errors_are_sentences_with_the_next_step(sample):
    assert sample("unreachable") == (1, "", "Error: no answer.\nHint: try later\n")


def test_json_carries_facts_and_error_together(sample):
    status, out, err = sample("refuse", "--json")
    assert status == 3
    assert json.loads(out) == {
        "id": "abc",
        "error": {"message": "delta is not finite.", "hint": "train again", "exit_code": 3},
    }
    assert err == "Error: delta is not finite.\nHint: train again\n"


def test_a_command_may_choose_its_exit_status(sample):
    assert sample("waits") == (4, "", "")
    assert json.loads(sample("waits", "--json")[1]) == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["shwo"], "No such command 'shwo'. Did you mean 'show'?"),
        (["zzz"], "No such command 'zzz'."),
        (["show", "--hob", "x"], "No such option"),
        (["show", "extra"], "unexpected extra argument"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_wrong_usage_is_two_and_points_to_the_help(sample, args, message):
    status, out, err = sample(*args)
    assert (status, out) == (2, "")
    assert message in err
    assert "--help" in err
    status, out, _ = sample(*args, "--json")
    assert status == 2
    assert json.loads(out)["error"]["exit_code"] == 2


def test_no_command_at_all_shows_the_help(sample):
    assert sample() == sample("--help")


def test_a_bug_keeps_its_traceback(folder):
    process = start(folder, "breaks", "--json")
    out, err = process.communicate()
    assert process.returncode == 1
    document = json.loads(out)
    assert document["round"] == 3
    assert "bug" in document["error"]["message"]
    assert "sample doctor --json" in err
    assert err.rstrip().endswith("RuntimeError: a bug")


def test_a_full_disk_is_no_bug(folder):
    process = start(folder, "full")
    _, err = process.communicate()
    assert process.returncode == 1
    assert err == "Error: No space left on device.\n"


def test_ctrl_c_says_how_to_go_on(folder):
    process = start(folder, "interrupted")
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Error: interrupted.\nHint: moshi-fl contribute --resume " in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_error(folder):
    process = start(folder, "talks")
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.parametrize("args", [["show"], ["show", "-q"], ["show", "--json"]])
def test_stdout_on_a_full_disk_is_reported(folder, args):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(folder / "sample.py"), *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("cli", [moshi_sdk.cli, moshi_hub.cli])
def test_every_listed_command_exists_and_explains_itself(cli):
    context = click.Context(cli.root)
    for name, (_, help_text) in cli.COMMANDS.items():
        command = cli.root.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.help, name
        assert "\\b" not in command.help, name
        assert help_text.endswith(".")
        parts = command.commands.values() if isinstance(command, click.Group) else [command]
        for part in parts:
            assert any("--json" in option.opts for option in part.params), (name, part.name)


@pytest.mark.parametrize("module", ["moshi_sdk.cli", "moshi_hub.cli"])
def test_help_and_version_import_nothing_heavy(module):
    code = (
        f"import sys, {module} as cli\n"
        "assert cli.main(['--help']) == 0 and cli.main(['--version']) == 0\n"
        "heavy = {'torch', 'flwr', 'git', 'numpy', 'requests', 'rich', 'msgspec'}\n"
        "loaded = heavy & set(sys.modules) | {m for m in sys.modules if '.commands' in m}\n"
        "sys.exit(' '.join(loaded) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Commands:" in done.stdout


def test_a_group_needs_no_commands_to_be_built():
    assert group("empty", {}, "Nothing.").list_commands(click.Context(click.Group())) == []


def test_a_device_that_is_not_there_is_one_clear_error() -> None:
    from moshi_fl.errors import ConfigError
    from moshi_sdk.options import pick_device

    assert pick_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device cuda:98 is not usable"):
        pick_device("cuda:98")
