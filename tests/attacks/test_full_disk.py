"""A disk without room: one error that names the folder; with room, the same command completes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.children import Ended, Nursery
from tests.support.simulator import HubSimulator, write_corpus


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB, mounted."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if (
        sys.platform != "linux"
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Ballast:
    """A file that leaves only so much of a disk."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "ballast"

    def leave(self, size: int) -> None:
        """Fill the disk but for ``size`` bytes."""
        self._path.unlink(missing_ok=True)
        try:
            with self._path.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            with self._path.open("rb+") as file:
                file.truncate(max(0, self._path.stat().st_size - size))

    def drop(self) -> None:
        """Make room."""
        self._path.unlink()


@pytest.mark.parametrize("command", ["sync", "contribute", "merge"])
def test_every_amount_of_room_is_enough_or_said_to_be_too_little(
    tmp_path: Path, disk: Path, commands: Nursery, command: str
) -> None:
    hub = HubSimulator.copied(tmp_path)
    home = disk / "home"
    data = write_corpus(tmp_path / "data")
    little = ("--steps", "1", "--batch-size", "2", "--seed", "1", "--contributor", "ann")
    argv = {
        "sync": ("moshi-fl", "sync"),
        "contribute": ("moshi-fl", "contribute", "--data", data, *little),
        "merge": ("moshi-hub", "merge", "--publish"),
    }[command]
    hub.contribute("bob", seed=1)
    commands.run("moshi-fl", "config", "set", "contributor", "ann", home=home)
    shutil.copytree(hub.home / "keys", home / "keys")
    ballast = Ballast(disk)

    def act() -> Ended:
        return commands.run(*argv, "--hub", hub.url, "--json", home=home)

    failures = 0
    for room in (0, 8_000, 40_000, 100_000, 160_000, 220_000, 300_000, 400_000, 550_000):
        ballast.leave(room)
        ended = act()
        if ended.status == 0:
            break
        failures += 1
        assert ended.status == 1, (room, ended.err)
        assert ended.err.count("Error: ") == 1, (room, ended.err)
        assert "Traceback" not in ended.err, (room, ended.err)
        assert str(disk) in ended.err, (room, ended.err)
        assert "Hint: " in ended.err, (room, ended.err)
    assert failures > 1
    ballast.drop()
    ended = act()
    assert ended.status == 0 or "0 contribution(s) to merge" in ended.err, ended.err
    assert commands.run("moshi-fl", "sync", "--hub", hub.url, home=home).status == 0
    left = [path for path in home.rglob("*") if path.name.startswith((".tmp-", "work-"))]
    assert left == []
