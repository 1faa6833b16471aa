"""What a hub costs does not grow with its age, and records stay small beside weights."""

import itertools
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ages import grow_old
from benchmarks.wire import Wire, counted
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import delta_bytes, encode_delta
from moshi_fl.history import MAX_MANIFEST_BYTES
from moshi_fl.hubfile import StorageRules
from moshi_fl.models import get_family, get_preset
from moshi_fl.records import File, Location, Manifest, Merged, Round, Update, digest, dump
from moshi_fl.replica import Replica
from moshi_fl.restore import plan
from moshi_fl.store import RefUpdate, create_hub
from moshi_fl.weights import sha256_bytes
from moshi_hub.propose import ROUNDS_PER_KEYFRAME, needs_keyframe
from moshi_hub.publish import extend
from tests.support.hubs import WHO, git, prepared, publish
from tests.support.simulator import HubSimulator

KEYFRAME = 27_000_000  # bytes, as the base model has it
DELTA = 184_000
TINY = 2_000


def place(kind: str, number: int, size: int) -> Location:
    """Where such a round's files would lie."""
    name = sha256_bytes(f"{kind}/{number}".encode())
    file = File(name=f"{name[:32]}.safetensors", bytes=size, sha256=name)
    return Location(ref=f"refs/moshi/{kind}/{number}", commit=name[:40], files=(file,))


def history(update: int, rounds: int) -> Iterator[Manifest]:
    """The manifests of a hub's life, by the hub's own rules, one contribution in each round."""
    first = Round(
        hub="0" * 16,
        round=0,
        previous=None,
        weights="0" * 64,
        parameters=1,
        tokenizer="0" * 64,
        keyframe=place("keyframe", 0, KEYFRAME),
        created="2026-01-01T00:00:00Z",
        software="test",
    )
    manifest = Manifest(hub=first.hub, rounds=(first,))
    yield manifest
    for number in range(1, rounds):
        whole = needs_keyframe(StorageRules(), manifest.rounds, update)
        record = Round(
            hub=first.hub,
            round=number,
            previous=digest(manifest.newest),
            weights=sha256_bytes(f"weights {number}".encode()),
            parameters=1,
            tokenizer=first.tokenizer,
            keyframe=place("keyframe", number, KEYFRAME) if whole else None,
            update=Update(kind="deltas", location=place("update", number, update), codec="topk"),
            contributions=(
                Merged(
                    id=sha256_bytes(b"%d" % number)[:32],
                    owner="ann",
                    base_round=number - 1,
                    weight=100,
                ),
            ),
            created=first.created,
            software="test",
        )
        manifest = extend(manifest, record)
        yield manifest


@pytest.mark.parametrize("update", [TINY, DELTA, 10 * DELTA, KEYFRAME])
def test_a_cold_start_never_costs_more_than_one_and_a_half_keyframes(update: int) -> None:
    for manifest in history(update, 400):
        cost = plan(manifest.rounds, manifest.newest.round, None).bytes
        assert cost <= 1.5 * KEYFRAME


@pytest.mark.parametrize("update", [TINY, DELTA])
def test_a_manifest_stays_small_however_old_the_hub_and_however_small_its_updates(
    update: int,
) -> None:
    manifests = list(history(update, 500))
    sizes = [len(dump(manifest)) for manifest in manifests]
    assert max(sizes[300:]) <= max(sizes[:300]) + 2000  # longer numbers, no more rounds
    assert max(sizes) < MAX_MANIFEST_BYTES / 16
    assert max(len(manifest.rounds) for manifest in manifests) <= 2 * ROUNDS_PER_KEYFRAME
    assert max(len(zlib.compress(dump(m))) for m in manifests[::31]) < 40_000


def test_a_hub_that_wants_it_gets_a_keyframe_in_every_round() -> None:
    manifest = next(history(TINY, 1))
    assert needs_keyframe(StorageRules(keyframes="every-round"), manifest.rounds, TINY)
    assert not needs_keyframe(StorageRules(), manifest.rounds, TINY)


def test_a_topk_delta_of_the_base_model_is_below_one_percent_of_its_weights() -> None:
    preset = get_preset("char", "base")
    with torch.device("meta"):
        module = get_family("char").load(preset.model, preset.tokenizer).build()
    random = np.random.default_rng(0)
    delta = {
        name: random.standard_normal(tuple(tensor.shape), np.float32)
        for name, tensor in module.state_dict().items()
    }
    codec = get_codec(preset.delta["codec"], preset.delta.get("options", {}))
    data = delta_bytes(encode_delta(delta, codec)[0], codec)
    assert len(data) <= 0.0085 * sum(array.nbytes for array in delta.values())
    assert len(data) <= 280_000


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> HubSimulator:
    """A hub after a few rounds of two contributors."""
    hub = HubSimulator(tmp_path_factory.mktemp("lived"), delta={"codec": "topk"})
    hub.rounds(3, contributors=2)
    return hub


def test_main_grows_by_some_two_kilobytes_a_round(lived: HubSimulator, tmp_path: Path) -> None:
    tips = git(lived.path, "rev-list", "--first-parent", "--reverse", "main").split()
    sizes = [cloned(lived.path, tip, tmp_path / tip) for tip in tips]
    steps = [later - earlier for earlier, later in itertools.pairwise(sizes)]
    assert len(steps) == 3
    assert max(steps[1:]) < 2500
    assert steps[0] < 4000  # the first round has no earlier one to be like


def cloned(hub: Path, tip: str, target: Path) -> int:
    """Bytes of the pack that a clone of main, as it was at ``tip``, would get."""
    copy = shutil.copytree(hub, target)
    for ref in git(copy, "for-each-ref", "--format=%(refname)").split():
        git(copy, "update-ref", "-d", ref)
    git(copy, "update-ref", "refs/heads/main", tip)
    git(target, "clone", "--quiet", "--bare", f"file://{copy}", str(target / "clone"))
    return sum(path.stat().st_size for path in (target / "clone").rglob("*.pack"))


def test_age_costs_nothing_to_those_who_start_or_follow(
    lived: HubSimulator, tmp_path: Path
) -> None:
    root = tmp_path / "served"
    young = shutil.copytree(lived.path, root / "young.git")
    old = shutil.copytree(young, root / "old.git")
    grow_old(old, Replica(str(old), lived.home), 1000)
    with counted(root) as wire:
        start, again = pulled(wire, "young", tmp_path)
        late_start, late_again = pulled(wire, "old", tmp_path)
    # Numbers in the records are longer, and HTTP's framing varies; a thousand rounds would be more.
    assert late_start == pytest.approx(start, abs=2000)
    assert late_again == pytest.approx(again, abs=500)
    assert again < 2000


def pulled(wire: Wire, hub: str, folder: Path) -> tuple[int, int]:
    """Bytes received by a first sync and by one that finds nothing new."""
    replica = Replica(f"{wire.url}/{hub}.git", folder / f"reader-{hub}")
    wire.reset()
    replica.pull()
    first = wire.received
    wire.reset()
    replica.pull()
    return first, wire.received


def test_records_travel_compressed_and_weights_as_they_are(tmp_path: Path) -> None:
    create_hub(tmp_path / "hub.git")
    store = prepared(tmp_path / "store", tmp_path / "hub.git")
    text, weights = b"the same line again\n" * 2000, bytes(3 << 20)
    publish(store, "refs/heads/text", {"text": text})
    assert pushed(tmp_path / "hub.git") < len(text) / 50
    (tmp_path / "weights").write_bytes(weights)
    tree = store.tree({"weights": store.put(tmp_path / "weights")})
    oid = store.commit(tree, message="Weights", author=WHO, when=1)
    store.push([RefUpdate("refs/heads/weights", oid, None)])
    assert pushed(tmp_path / "hub.git") >= len(weights)


def pushed(hub: Path) -> int:
    """Size of the largest pack that a push has left, in bytes."""
    return max(path.stat().st_size for path in hub.rglob("*.pack"))
