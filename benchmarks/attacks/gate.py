"""The hub's structural gate, on real files: what a contribution's branch and delta would hold.

Git alone is left out. The tests in ``tests/attacks/test_poisoning.py`` send the same attacks
through a bare repository and ``moshi-hub merge``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from benchmarks.attacks.world import World
from moshi_fl.history import (
    DELTA_FILE,
    Refs,
    contribution_branch,
    contribution_path,
    signature_path,
)
from moshi_fl.records import Contribution, File, Location, Training, dump
from moshi_fl.signing import CONTRIBUTION_NAMESPACE, Signer
from moshi_fl.store.trees import TreeEntry
from moshi_fl.weights import Weights, sha256_bytes, weights_digest
from moshi_hub.verify import Base, Rules, Submission, Verdict, verify
from tests.support.keys import signer_of

REFS = Refs("refs/moshi/")


class Gate:
    """The gate of one hub, round after round."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._bases: dict[int, Base] = {}
        self._seen: dict[str, str] = {}
        self._taken: dict[tuple[str, int], str] = {}

    def open(self, number: int, weights: Weights) -> None:
        """The hub is at this round now."""
        self._bases[number] = Base(number, weights_digest(weights), self._world.shapes)

    @property
    def newest(self) -> int:
        """The round that contributions are based on."""
        return max(self._bases)

    def judge(self, client: int, data: bytes, base: int | None = None) -> Verdict:
        """What ``moshi_hub.verify`` says of a delta file, sent with an honest record.

        Args:
            client: Who sends it.
            data: The file.
            base: The round that it says it is based on; the newest by default.
        """
        path = self._folder / f"{client}.safetensors"
        path.write_bytes(data)
        signer = signer_of(f"contributor {client}")
        record = self._record(client, data, self.newest if base is None else base, signer)
        verdict = verify(submission(record, signer, path), self._rules())
        if verdict.accepted:
            self._seen[sha256_bytes(data)] = record.id
            self._taken[record.key, record.round] = record.id
        return verdict

    def _rules(self) -> Rules:
        config = self._world.config
        oldest = self.newest - config.delta.max_staleness
        bases: Mapping[int, Base] = {n: b for n, b in self._bases.items() if n >= oldest}
        return Rules(config, REFS, self.newest, bases, dict(self._seen), dict(self._taken))

    def _record(self, client: int, data: bytes, base: int, signer: Signer) -> Contribution:
        config, geometry = self._world.config, self._world.geometry
        sha256 = sha256_bytes(data)
        place = Location(
            ref=REFS.delta(base, sha256),
            commit=hashlib.sha1(data).hexdigest(),
            files=(File(name=DELTA_FILE, bytes=len(data), sha256=sha256),),
        )
        return Contribution(
            hub=config.hub.id,
            round=base,
            base=self._bases[base].weights,
            family=config.family,
            codec=config.delta.codec,
            contributor=f"contributor {client}",
            key=signer.public_key,
            delta=place,
            num_examples=geometry.steps * geometry.batch_size,
            training=Training(
                steps=geometry.steps,
                batch_size=geometry.batch_size,
                learning_rate=geometry.learning_rate,
                seed=client,
                precision="fp32",
            ),
            software="attack suite",
        )


def submission(record: Contribution, signer: Signer, delta: Path) -> Submission:
    """A branch that holds this record, signed, and a delta commit that holds this file."""
    place, data = (record.round, record.id), dump(record)
    signature = signer.sign(data, CONTRIBUTION_NAMESPACE).encode()
    branch = {contribution_path(*place): data, signature_path(*place): signature}
    return Submission(
        branch=contribution_branch(*place),
        history="",
        changes=tuple(_entry(path, len(content)) for path, content in branch.items()),
        record=data,
        signature=signature,
        delta_commit=record.delta.commit,
        delta_entries=(_entry(DELTA_FILE, delta.stat().st_size),),
        delta=delta,
    )


def _entry(path: str, size: int) -> TreeEntry:
    return TreeEntry("100644", "blob", "0" * 40, size, path)
