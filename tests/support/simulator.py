"""``HubSimulator``: a real bare repository with helper verbs, so that tests read as stories."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import delta_bytes, encode_delta
from moshi_fl.history import (
    DELTA_FILE,
    MAIN,
    contribution_branch,
    contribution_path,
    read_latest,
    signature_path,
)
from moshi_fl.hubfile import TrustRules
from moshi_fl.models import get_preset
from moshi_fl.models.family import Preset
from moshi_fl.records import Contribution, File, Location, Training, dump
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.signing import CONTRIBUTION_NAMESPACE
from moshi_fl.store import ANY, Author, RefUpdate
from moshi_fl.strategies import find_strategy
from moshi_fl.submit import DELTA_AUTHOR
from moshi_fl.weights import Weights, sha256_bytes
from moshi_hub.create import Plan, create
from moshi_hub.keys import KeyStore
from moshi_hub.merge import Options, Outcome, merge
from moshi_hub.metadata import Desk, utc_now
from moshi_hub.opened import OpenRound, look
from moshi_hub.regional import begin_from
from moshi_hub.verify import Verdict
from moshi_sdk.sync import SyncManager
from tests.support.keys import signature_by, signer_of

MODEL = {"n_layer": 1, "n_head": 2, "d_model": 16, "d_ff": 32, "context": 32}
TEXT = "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\n"


def small_preset(**tables: Mapping[str, Any]) -> Preset:
    """The char family at a size that trains in no time; tables may be changed by name."""
    preset = get_preset("char", "tiny")
    preset = replace(
        preset,
        model=preset.model | MODEL,
        training={"steps": 3, "batch_size": 4, "learning_rate": 3e-3},
        delta={"codec": "topk"},
        server_learning_rate=1.0,
        evaluation={"sequences": 4},
    )
    return replace(preset, **{name: getattr(preset, name) | dict(t) for name, t in tables.items()})


def write_corpus(folder: Path, text: str = TEXT, files: int = 3) -> Path:
    """A little source tree."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (folder / f"part{number}.py").write_text(f"# part {number}\n" + text * (20 + number))
    return folder


def random_delta(base: Weights, seed: int, scale: float = 1e-2) -> dict[str, np.ndarray]:
    """A delta that no training made, of every tensor."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(array.shape) * scale).astype(np.float32)
        for name, array in base.items()
    }


class HubSimulator:
    """A hub in a folder, its maintainer's home, and contributors who need no training."""

    def __init__(
        self,
        folder: Path,
        *,
        url: str | None = None,
        upstream: str | None = None,
        **tables: Mapping[str, Any],
    ):
        self._settle(folder, url)
        name = "test" if upstream is None else folder.name
        plan = Plan(url=self.url, family="char", preset="tiny", name=name, eval_data=())
        if upstream:
            create(begin_from(plan, upstream, self.home), self.home)
        else:
            create(plan, self.home, small_preset(**tables))
        shutil.copytree(self.replica.folder, self._start)

    def _settle(self, folder: Path, url: str | None = None) -> None:
        self.folder = folder
        self.path = folder / "hub.git"
        self.url = url or str(self.path)
        self.home = folder / "maintainer"
        self.replica = Replica(self.url, self.home)
        self._start = folder / "as-of-round-0"
        self._seed = 1_000_000

    @classmethod
    def copied(cls, folder: Path, **tables: Mapping[str, Any]) -> HubSimulator:
        """A hub as the constructor makes it, from a copy of one that this process has made before.

        Hubs that are copied with the same tables are the same hub to all who know one of them.
        """
        original, hub = _original(json.dumps(tables, sort_keys=True)), cls.__new__(cls)
        hub._settle(folder)
        for source, target in [
            (original.path, hub.path),
            (original.home / "keys", hub.home / "keys"),
            (original.replica.folder, hub.replica.folder),
        ]:
            shutil.copytree(source, target)
        hub._start = original.replica.folder
        return hub

    def person(self, name: str) -> Replica:
        """Someone else's copy of the hub."""
        return Replica(self.url, self.folder / name)

    def maintainer(self, name: str) -> Replica:
        """Another maintainer's copy of the hub, with all of its keys."""
        shutil.copytree(self.home / "keys", self.folder / name / "keys", dirs_exist_ok=True)
        return self.person(name)

    def desk(self, **rules: int) -> Desk:
        """Where the hub's keys sign, on top of what is there now; dates may lie in the past."""
        state = self.replica.look()
        keys = KeyStore(self.home, state.config.hub.id)
        now = utc_now() + timedelta(days=rules.pop("days", 0))
        return Desk(self.replica.trust.load(), keys, TrustRules(**rules), now)

    def signed(self, files: Mapping[str, bytes], *, number: int, **rules: int) -> dict[str, bytes]:
        """These files with metadata that the hub's own keys have signed, whatever they say."""
        desk = self.desk(**rules)
        targets = desk.sign_targets(desk.draft_targets(files, number))
        return {**files, **desk.publish(targets)}

    def offer(self, files: Mapping[str, bytes]) -> str:
        """Make ``latest`` consist of these files, as whoever rules the repository can."""
        repo = self.replica.repo
        tree = repo.tree({name: repo.put(data) for name, data in files.items()})
        commit = repo.commit(tree, message="x\n", author=Author("Liar", "liar@x"), when=1)
        repo.push([RefUpdate("refs/moshi/latest", commit, ANY)])
        return commit

    def latest(self) -> dict[str, bytes]:
        """The files of ``latest``."""
        repo = self.replica.repo
        commit = repo.fetch({"refs/moshi/latest": "refs/test/latest"})["refs/test/latest"]
        return read_latest(repo, commit)

    def sync(self, name: str = "reader", **how: Any) -> Snapshot:
        """Someone brings the newest round to their machine."""
        return SyncManager(self.url, home=self.folder / name).pull(**how)

    def contribute(
        self,
        name: str = "ann",
        *,
        seed: int = 1,
        delta: Weights | None = None,
        on: Snapshot | None = None,
        mutate: Callable[[bytes], bytes] = lambda data: data,
        tree: Callable[[Replica, str], dict[str, str]] | None = None,
        key: str | None = None,
        **fields: Any,
    ) -> Contribution:
        """Submit a made-up delta; every part of it can be falsified.

        Who is new has had the hub's round 0 for long.

        Args:
            name: The contributor.
            seed: Of the delta, when none is given.
            delta: What to send.
            on: The round it is based on; the newest by default.
            mutate: Changes the delta file's bytes.
            tree: Gives other files for the branch than the record, path to blob.
            key: Whose key signs; that of ``name`` by default. Equal names are one identity.
            fields: Fields of the record to overwrite.
        """
        replica = self.person(name)
        if not replica.folder.exists():
            shutil.copytree(self._start, replica.folder)
        replica.repo.prepare()
        base = on or replica.pull()
        rules = base.state.config.delta
        codec = get_codec(rules.codec, rules.options)
        entries, _ = encode_delta(delta or random_delta(base.load(), seed), codec, None)
        data = mutate(delta_bytes(entries, codec))
        place, commit = self._place(replica, base, data)
        record = Contribution(
            hub=base.state.config.hub.id,
            round=base.round,
            base=base.record.weights,
            family="char",
            codec=rules.codec,
            contributor=name,
            key=signer_of(key or name).public_key,
            delta=place,
            num_examples=12,
            training=Training(
                steps=3, batch_size=4, learning_rate=3e-3, seed=seed, precision="fp32"
            ),
            software="test",
        )
        record = msgspec.structs.replace(record, **fields)
        self._push(replica, record, commit, tree or self._signed(record, key or name))
        return record

    def _signed(self, record: Contribution, key: str) -> Callable[[Replica, str], dict[str, str]]:
        place, data = (record.round, record.id), dump(record)
        signature = signature_by(key, data, CONTRIBUTION_NAMESPACE).encode()

        def tree(replica: Replica, path: str) -> dict[str, str]:
            put = replica.repo.put
            return {path: put(data), signature_path(*place): put(signature)}

        return tree

    def _place(self, replica: Replica, base: Snapshot, data: bytes) -> tuple[Location, str]:
        repo, sha256 = replica.repo, sha256_bytes(data)
        ref = base.state.refs.delta(base.round, sha256)
        tree = repo.tree({DELTA_FILE: repo.put(data)})
        commit = repo.commit(tree, message=f"{ref}\n", author=DELTA_AUTHOR, when=0)
        file = File(name=DELTA_FILE, bytes=len(data), sha256=sha256)
        return Location(ref=ref, commit=commit, files=(file,)), commit

    def _push(
        self,
        replica: Replica,
        record: Contribution,
        commit: str,
        tree: Callable[[Replica, str], dict[str, str]],
    ) -> None:
        repo, main = replica.repo, replica.fetch_main()
        path = contribution_path(record.round, record.id)
        files = tree(replica, path)
        author = Author(record.contributor, "noreply@moshi-fl.invalid")
        new = repo.commit(
            repo.tree(files, base=main), parents=(main,), message="x\n", author=author, when=0
        )
        branch = contribution_branch(record.round, record.id)
        repo.push([RefUpdate(branch, new, ANY), RefUpdate(record.delta.ref, commit, ANY)])

    def push_record(
        self,
        record: Contribution,
        *,
        key: str | None = None,
        data: bytes | None = None,
        signature: bytes | None = None,
        extra: Mapping[str, bytes] | None = None,
    ) -> str:
        """Push a record's branch by hand; the delta's ref stays as it is.

        Args:
            record: What to push; its branch is named after it.
            key: Who signs; its contributor by default.
            data: Other bytes in the record's place.
            signature: Other bytes in the signature's place; empty leaves the file out.
            extra: More files, path to content.
        """
        replica = self.person("stranger")
        replica.repo.prepare()
        repo, main = replica.repo, replica.fetch_main()
        place, said = (record.round, record.id), dump(record)
        if signature is None:
            by = key or record.contributor
            signature = signature_by(by, said, CONTRIBUTION_NAMESPACE).encode()
        files = {contribution_path(*place): said if data is None else data, **(extra or {})}
        if signature:
            files[signature_path(*place)] = signature
        tree = repo.tree({path: repo.put(content) for path, content in files.items()}, base=main)
        author = Author("eve", "eve@example.org")
        commit = repo.commit(tree, parents=(main,), message="x\n", author=author, when=0)
        branch = contribution_branch(*place)
        repo.push([RefUpdate(branch, commit, ANY)])
        return branch

    def look(self) -> OpenRound:
        """Judge what is open."""
        folder = self.folder / "look"
        folder.mkdir(exist_ok=True)
        return look(self.replica, folder / str(len(list(folder.iterdir()))))

    def verdicts(self) -> dict[str, Verdict]:
        """Verdict by contribution id, or by branch where there is no record."""
        return {
            verdict.contribution.id if verdict.contribution else verdict.branch: verdict
            for verdict in self.look().verdicts
        }

    def codes(self) -> list[str]:
        """First reason code of each rejected contribution."""
        return sorted(v.findings[0].code for v in self.look().verdicts if not v.accepted)

    def merge(self, *, publish: bool = True, replica: Replica | None = None, **how: Any) -> Outcome:
        """Make a round without held-out data."""
        return merge(
            replica or self.replica,
            Options(publish=publish, **how),
            evaluator=lambda _: None,
            find_strategy=find_strategy,
        )

    def rounds(self, count: int, contributors: int = 1) -> None:
        """Publish some rounds."""
        for _ in range(count):
            for person in range(contributors):
                self._seed += 1
                self.contribute(f"person{person}", seed=self._seed)
            self.merge()

    def refs(self) -> dict[str, str]:
        """All refs on the hub."""
        return self.replica.repo.remote_refs()

    def main(self) -> str:
        """Commit of main on the hub."""
        return self.refs()[MAIN]

    def edit_settings(self, old: str, new: str) -> None:
        """A maintainer commits a change of hub.toml."""
        repo, main = self.replica.repo, self.replica.fetch_main()
        text = repo.read(main, "hub.toml", limit=1 << 18).decode()
        assert old in text
        self.commit({"hub.toml": text.replace(old, new).encode()})

    def commit(self, files: Mapping[str, bytes], remove: Sequence[str] = ()) -> None:
        """Somebody who may do so commits files to main, or removes some."""
        repo, main, by = self.replica.repo, self.replica.fetch_main(), Author("m", "m@x")
        blobs = {path: repo.put(data) for path, data in files.items()}
        tree = repo.tree(blobs, base=main, remove=remove)
        commit = repo.commit(tree, parents=(main,), message="A change\n", author=by, when=0)
        repo.push([RefUpdate(MAIN, commit, main)])


@cache
def _original(tables: str) -> HubSimulator:
    """A hub to copy."""
    folder = Path(tempfile.mkdtemp(prefix="moshi-fl-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return HubSimulator(folder, **json.loads(tables))
