"""What a hub costs in bytes and seconds: to clone, to start from, to follow, to contribute to.

One hub of the ``base`` model, made by our own code and served over loopback HTTP, where each byte
is counted. At a few rounds it is compared with other ways to keep the same weights in Git; then it
grows to fifty rounds, and by a simulated history to a thousand.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ages import grow_old
from benchmarks.common import Row
from benchmarks.fabricate import Fabricated, contribute, fabricated_delta
from benchmarks.rivals import LFS, NAIVE, THETA, Bench, Figures, Rival, missing
from benchmarks.wire import Wire, counted
from moshi_fl.codec import get_codec
from moshi_fl.replica import Replica
from moshi_fl.rules import shapes_of
from moshi_fl.weights import save_weights
from moshi_hub.propose import needs_keyframe

COMPARED = 4
"""Rounds at which rivals are measured; git-theta needs a minute for each."""
ROUNDS = 50
AGE = 1000
CONTRIBUTORS = 3
CROWD = 10
TRIES = 7
ROOT = Path(__file__).parents[1]

SYNC = """
import sys
from moshi_sdk.cli import main
status = main(["sync", "--hub", sys.argv[1], "--json"])
print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
sys.exit(status)
"""


@dataclass
class Served:
    """The fabricated hub behind the counting server.

    Attributes:
        hub: The hub as its own users see it, on this machine.
        wire: The server.
        homes: Folder for the homes of measured users.
    """

    hub: Fabricated
    wire: Wire
    homes: Path

    def replica(self, user: str, hub: str = "hub") -> Replica:
        """A measured user's replica."""
        return Replica(f"{self.wire.url}/{hub}.git", self.homes / user)

    def pull(self, user: str, hub: str = "hub") -> tuple[int, float]:
        """Bytes received and wall seconds of one sync."""
        replica, started = self.replica(user, hub), time.perf_counter()
        self.wire.reset()
        replica.pull()
        return self.wire.received, time.perf_counter() - started

    def clone(self) -> int:
        """Bytes received by a plain ``git clone``."""
        self.wire.reset()
        target = self.homes / "clone"
        git("clone", "--quiet", f"{self.wire.url}/hub.git", str(target))
        shutil.rmtree(target)
        return self.wire.received

    def contribution(self) -> tuple[int, int]:
        """Bytes sent and received by a contributor who is at the newest round already."""
        replica = self.replica("contributor")
        snapshot = replica.pull()
        self.wire.reset()
        contribute(replica, snapshot.state, shapes_of(snapshot.load()), name="measured", seed=1)
        return self.wire.sent, self.wire.received


def git(*argv: str) -> None:
    """Git as on a machine where nobody ever configured it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", *argv], env=env, check=True, capture_output=True)


def run() -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory(prefix="moshi-fl-bench-") as name:
        folder = Path(name)
        with counted(folder / "served") as wire:
            served = Served(Fabricated(folder / "served"), wire, folder / "homes")
            return measure(served, folder)


def measure(served: Served, folder: Path) -> list[Row]:
    """Let the hub grow and measure on the way."""
    served.homes.mkdir()
    served.hub.folder.mkdir(parents=True, exist_ok=True)
    served.hub.create("base")
    keyframe = served.hub.maintainer.pull().record.keyframe
    assert keyframe is not None
    ours, weights = follow(served, folder / "weights")
    rows = [warm_row(ours, keyframe.bytes), contribution_row(ours)]
    for rival in (NAIVE, LFS, THETA):
        rows += compare(served, rival, ours, weights, folder)
    while (number := served.hub.maintainer.pull().round) < ROUNDS:
        if number == 10:
            rows.append(clone_row(10, served.clone(), "-"))
        if not served.homes.joinpath("ripe").exists() and is_ripe(served.hub.maintainer):
            rows += ripe_rows(served, keyframe.bytes)
        progress(served.hub.round(CONTRIBUTORS).proposal.record.round)
    rows.insert(0, clone_row(ROUNDS, served.clone(), "<= 200 kB"))
    rows.append(cold_row(ROUNDS, served.pull("starter-50")[0], keyframe.bytes))
    return [*rows, unchanged(served, "starter-50", "hub", ROUNDS)]


def is_ripe(maintainer: Replica) -> bool:
    """Whether the next round will bring a keyframe: when a cold start costs most."""
    state = maintainer.look()
    update = state.newest.update
    size = update.location.bytes if update else 0
    return needs_keyframe(state.config.storage, state.manifest.rounds, size)


def ripe_rows(served: Served, keyframe: int) -> list[Row]:
    """A cold start when it costs most, now and in the same hub at round 1,000."""
    number = served.hub.maintainer.look().newest.round
    young = served.hub.folder / "hub.git"
    old = shutil.copytree(young, served.hub.folder / "old.git")
    grow_old(old, Replica(str(old), served.hub.folder / "maintainer"), AGE - number)
    return [
        cold_row(number, served.pull("ripe")[0], keyframe),
        cold_row(AGE, served.pull("old", "old")[0], keyframe),
        unchanged(served, "old", "old", AGE),
    ]


def progress(number: int) -> None:
    """Tell how far it is."""
    print(f"  round {number}", file=sys.stderr, flush=True)


def follow(served: Served, weights: Path) -> tuple[Figures, list[Path]]:
    """The first rounds, the last of them with a crowd; our figures, and the weights for rivals."""
    weights.mkdir()
    paths = [keep(served, weights)]
    for _ in range(COMPARED - 1):
        progress(served.hub.round(CONTRIBUTORS).proposal.record.round)
        paths.append(keep(served, weights))
    served.pull("reader")
    sent, received = served.contribution()
    served.hub.round(CROWD - 1)
    paths.append(keep(served, weights))
    warm, warm_seconds = served.pull("reader")
    cold, cold_seconds = served.pull("starter")
    note = f"contributing receives {received / 1000:.1f} kB"
    clone = served.clone()
    return Figures(clone, cold, warm, sent, cold_seconds, warm_seconds, note), paths


def keep(served: Served, folder: Path) -> Path:
    """A copy of the newest round's weights."""
    snapshot = served.hub.maintainer.pull()
    return Path(shutil.copy(snapshot.path, folder / f"{snapshot.round:03d}.safetensors"))


def local_weights(served: Served, path: Path) -> Path:
    """What a contributor without our codec would push: base plus what the codec would send."""
    base = served.hub.maintainer.pull().load()
    codec, delta = get_codec("topk", {}), fabricated_delta(shapes_of(base), [1])
    sent = {name: codec.decode(codec.encode(delta[name]), delta[name].shape) for name in base}
    save_weights(path, {name: np.add(base[name], sent[name]) for name in base})
    return path


def compare(
    served: Served, rival: Rival, ours: Figures, weights: list[Path], folder: Path
) -> list[Row]:
    """The four quantities and two times, beside a rival's."""
    if reason := missing(rival):
        print(f"  skipped {rival.name}: {reason}", file=sys.stderr)
        return []
    print(f"  {rival.name}", file=sys.stderr, flush=True)
    bench = Bench(rival, folder / f"rival-{rival.slug}", served.hub.folder, served.wire)
    theirs = bench.measure(weights, local_weights(served, folder / "local.safetensors"))
    quantities = {
        "plain git clone": (ours.clone, theirs.clone, theirs.note or "theirs brings the weights"),
        "cold start": (ours.cold, theirs.cold, theirs.difference),
        f"warm update, {CROWD} contributors": (ours.warm, theirs.warm, theirs.difference),
        "contribution": (ours.contribution, theirs.contribution, ""),
    }
    rows = [
        Row(
            f"{what}, {COMPARED} rounds", size(a), f"{rival.name} {size(b)}", b / a, "fewer", note=c
        )
        for what, (a, b, c) in quantities.items()
    ]
    times = {
        "cold start": (ours.cold_seconds, theirs.cold_seconds),
        "warm update": (ours.warm_seconds, theirs.warm_seconds),
    }
    for what, (a, b) in times.items():
        rows.append(Row(f"{what}, wall", f"{a:.2f} s", f"{rival.name} {b:.2f} s", b / a, "-"))
    return rows


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def clone_row(rounds: int, count: int, target: str) -> Row:
    """A plain clone of main against the target of 200 kB."""
    what = f"plain git clone after {rounds} rounds, {CONTRIBUTORS} contributors each"
    return Row(
        what, size(count), "200 kB", 200e3 / count, target, note=f"{count / rounds:.0f} B per round"
    )


def warm_row(ours: Figures, keyframe: int) -> Row:
    """One round of a crowd, in parts of a keyframe."""
    return Row(
        f"warm update, {CROWD} contributors",
        size(ours.warm),
        f"keyframe {size(keyframe)}",
        keyframe / ours.warm,
        "<= 10 %",
        note=f"{ours.warm / keyframe:.1%} of a keyframe",
    )


def contribution_row(ours: Figures) -> Row:
    """Everything that one contribution pushes."""
    return Row(
        "contribution, everything sent",
        size(ours.contribution),
        "280 kB",
        280e3 / ours.contribution,
        "<= 280 kB",
        note=ours.note,
    )


def cold_row(number: int, count: int, keyframe: int) -> Row:
    """A cold start in parts of a keyframe."""
    return Row(
        f"cold start at round {number}",
        size(count),
        f"1.5 keyframes {size(round(1.5 * keyframe))}",
        1.5 * keyframe / count,
        "<= 1.5 keyframes",
        note=f"{count:,} B, {count / keyframe:.3f} keyframes",
    )


def unchanged(served: Served, user: str, hub: str, number: int) -> Row:
    """``moshi-fl sync`` when nothing is new, beside the one fetch that it cannot do without."""
    url = f"{served.wire.url}/{hub}.git"
    env = os.environ | {
        "MOSHI_FL_HOME": str(served.homes / user),
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "sdk", "hub")),
    }
    command = [sys.executable, "-c", SYNC, url]
    served.wire.reset()
    first = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    received = served.wire.received
    assert json.loads(first.stdout)["round"] == number, first.stdout
    loaded = first.stderr.strip().splitlines()[-1]
    bare = served.homes / f"floor-{hub}"
    git("init", "--quiet", "--bare", str(bare))
    fetch = ["--git-dir", str(bare), "fetch", "--quiet", url, "refs/moshi/latest:refs/latest"]
    git(*fetch)
    ours, cpu = median(lambda: subprocess.run(command, env=env, check=True, capture_output=True))
    floor, _ = median(lambda: git(*fetch))
    return Row(
        f"unchanged sync at round {number}",
        f"{ours:.2f} s, {size(received)}",
        f"git fetch {floor:.2f} s",
        floor / ours,
        "<= 0.5 s beyond Git",
        note=f"{ours - floor:.2f} s beyond ({cpu:.2f} s of CPU in all); {loaded}",
    )


def median(action: Callable[[], object]) -> tuple[float, float]:
    """Median wall and CPU seconds of several tries of something that runs in other processes."""
    walls, cpus = [], []
    for _ in range(TRIES):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        action()
        walls.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls), statistics.median(cpus)
