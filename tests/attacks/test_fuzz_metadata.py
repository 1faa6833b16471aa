"""Signed metadata with anything in it: refused in words, or its signed part is unchanged."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from moshi_fl.errors import MoshiError
from moshi_fl.history import SIGNED_FILES
from moshi_fl.signed.client import Offer, verify
from moshi_fl.signed.files import SNAPSHOT, TARGETS, TIMESTAMP
from moshi_hub.rootchange import keep
from moshi_hub.rotation import change_root, open_bench
from tests.support.simulator import HubSimulator

ODD: list[Any] = [
    *(None, True, 0, -1, 1 << 70, 1.5, float("nan"), "", [], {}, [[]], {"a": {}}),
    *("x" * 1000, "2020-01-01T00:00:00Z", "9999-99-99T00:00:00Z", "\ud800"),
]
NAMES = ["1.root.json", "2.root.json", TIMESTAMP, SNAPSHOT, TARGETS]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> HubSimulator:
    """A hub with two roots."""
    hub = HubSimulator(tmp_path_factory.mktemp("hub"))
    change_root(open_bench(hub.replica), keep)
    return hub


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything in a document."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, part in items for place in places(part, (*path, key)))]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The same with some other bytes, or with one part removed, replaced or added."""
    if chance.random() < 0.3:
        changed = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    document = json.loads(data)
    *way, last = chance.choice(places(document)[1:])
    part = document
    for key in way:
        part = part[key]
    if chance.random() < 0.3:
        del part[last]
    else:
        part[last] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(document).encode()


def signed_part(data: bytes) -> Any:
    return json.loads(data)["signed"]


@pytest.mark.parametrize("seed", range(5))
def test_no_metadata_crashes_or_convinces(hub: HubSimulator, tmp_path: Path, seed: int) -> None:
    chance, files = random.Random(seed), hub.latest()
    known = hub.replica.trust.load()
    for _ in range(60):
        names = chance.sample(NAMES, chance.choice([1, 1, 2]))
        lie = files | {name: mutated(files[name], chance) for name in names}
        before = chance.choice([{}, known, {"1.root.json": known["1.root.json"]}])
        with contextlib.suppress(MoshiError):
            trust = verify(Offer("hub", lie, SIGNED_FILES, tmp_path), before, tmp_path / "work")
            for name in names:  # only what is not signed differs
                assert signed_part(trust.metadata[name]) == signed_part(files[name])
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
