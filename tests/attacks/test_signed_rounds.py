"""A host without keys, and thieves of single keys: each refusal has its own words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from moshi_fl.errors import HubError, StaleHub, UntrustedHub
from moshi_fl.history import HUB_FILE, MANIFEST_FILE, SIGNED_FILES, TOKENIZER_FILE
from moshi_fl.signed.files import (
    METADATA_FILES,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    TrustFolder,
    fingerprint,
)
from moshi_hub.keys import KeyStore
from moshi_hub.metadata import Desk
from tests.support.hubs import git
from tests.support.simulator import HubSimulator

LATEST = "refs/moshi/latest"
ONLINE = (SNAPSHOT, TIMESTAMP)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HubSimulator:
    """A hub at round 2, with all states that it had."""
    hub = HubSimulator(tmp_path_factory.mktemp("made"))
    hub.states = [hub.latest()]
    for _ in range(2):
        hub.rounds(1)
        hub.states.append(hub.latest())
    hub.sync()
    return hub


@pytest.fixture
def hub(made: HubSimulator) -> Iterator[HubSimulator]:
    """The same, put back afterwards; the reader knows round 2, the newcomer nothing."""
    before = git(made.path, "rev-parse", LATEST).strip()
    shutil.copytree(made.folder / "reader", made.folder / "kept", symlinks=True)
    shutil.copytree(made.home, made.folder / "kept-home", symlinks=True)
    yield made
    git(made.path, "update-ref", LATEST, before)
    for folder, kept in ((made.folder / "reader", "kept"), (made.home, "kept-home")):
        shutil.rmtree(folder)
        (made.folder / kept).rename(folder)
    shutil.rmtree(made.folder / "newcomer", ignore_errors=True)


def refused(hub: HubSimulator, *words: str, who: str = "reader") -> None:
    """Nobody takes it; who had a model keeps it, and all that was trusted."""
    trust = hub.person(who).trust.load()
    for _ in range(2):  # a refusal must not make the next one forget
        with pytest.raises(UntrustedHub) as error:
            hub.sync(who)
        for word in words:
            assert word in str(error.value)
        assert error.value.hint
    assert hub.person(who).trust.load() == trust
    if who == "reader":
        assert hub.sync(offline=True).round == 2
        hub.sync(offline=True).load()


def altered(data: bytes) -> bytes:
    """Signed metadata with another date, as somebody without keys can make it."""
    content = json.loads(data)
    content["signed"]["expires"] = "2099-01-01T00:00:00Z"
    return json.dumps(content).encode()


def signatures_of(data: bytes) -> list[dict[str, str]]:
    return json.loads(data)["signatures"]


# A host without any key.


def test_an_older_state_is_a_rollback(hub: HubSimulator) -> None:
    hub.offer(hub.states[1])
    refused(hub, "the hub was rewound", "version 2 of timestamp.json", "version 3 was already seen")


@pytest.mark.parametrize("name", [HUB_FILE, TOKENIZER_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("who", ["reader", "newcomer"])
def test_an_altered_file_is_refused(hub: HubSimulator, name: str, who: str) -> None:
    files = hub.latest()
    hub.offer({**files, name: files[name].replace(b"0", b"1", 1)})
    refused(hub, f"{name} was altered: it is not what was signed", who=who)


@pytest.mark.parametrize("name", ["1.root.json", *ONLINE, TARGETS])
@pytest.mark.parametrize("who", ["reader", "newcomer"])
def test_altered_metadata_is_refused(hub: HubSimulator, name: str, who: str) -> None:
    files = hub.latest()
    hub.offer({**files, name: altered(files[name])})
    refused(hub, name if (who, name) != ("reader", "1.root.json") else "its root is", who=who)


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"[" * 9000, b'{"signed": {}}', b"\xff"])
@pytest.mark.parametrize("name", ["1.root.json", *ONLINE, TARGETS])
def test_metadata_that_is_none_is_refused(hub: HubSimulator, name: str, data: bytes) -> None:
    hub.offer({**hub.latest(), name: data})
    refused(hub, name, who="newcomer")


def test_metadata_beyond_the_limit_is_not_read(hub: HubSimulator) -> None:
    hub.offer({**hub.latest(), TARGETS: b" " * ((1 << 16) + 1)})
    refused(hub, TARGETS, "the limit is 65536")


@pytest.mark.parametrize("who", ["reader", "newcomer"])
def test_a_manifest_of_another_state_is_mixed(hub: HubSimulator, who: str) -> None:
    hub.offer({**hub.latest(), MANIFEST_FILE: hub.states[1][MANIFEST_FILE]})
    refused(hub, "mixes its states", "manifest.json is of round 1", "signed with it is round 2",
            who=who)  # fmt: skip


@pytest.mark.parametrize("name", [SNAPSHOT, TARGETS])
def test_metadata_of_another_state_is_mixed(hub: HubSimulator, name: str) -> None:
    hub.offer({**hub.latest(), name: hub.states[1][name]})
    said = f"{name} is of version 2, the signatures demand version 3"
    refused(hub, "mixes its states", said, who="newcomer")


@pytest.mark.parametrize("missing", [*ONLINE, TARGETS])
def test_missing_metadata_is_no_signed_hub(hub: HubSimulator, missing: str) -> None:
    files = hub.latest()
    del files[missing]
    hub.offer(files)
    refused(hub, f"lacks {missing}: it is not signed", who="newcomer")


def test_an_unsigned_hub_is_refused(hub: HubSimulator) -> None:
    hub.offer({name: hub.latest()[name] for name in SIGNED_FILES})
    refused(hub, "is not signed: it has no 1.root.json")
    refused(hub, "is not signed: it has no 1.root.json", who="newcomer")


def thief(hub: HubSimulator, *roles: str, mine: bool = True) -> Desk:
    """A desk of somebody who has only the keys of these roles, and keys that count nowhere."""
    real = hub.desk()
    store = KeyStore(hub.folder / f"thief-{'-'.join(roles)}", "0" * 16)
    shutil.rmtree(store.folder, ignore_errors=True)
    store.folder.mkdir(parents=True)
    for key in real.keys.stored():
        if key.role in roles:
            shutil.copy(key.path, store.folder)
    if mine:
        for role in ("root", "targets", "online"):
            store.create(role)
    return Desk(real.metadata, store, real.rules, real.now)


def test_files_without_a_maintainers_signature_are_refused(hub: HubSimulator) -> None:
    desk, files = thief(hub, "online"), hub.states[1]
    lie = {name: files[name] for name in SIGNED_FILES}
    unsigned = desk.draft_targets(lie, 1)
    snapshot, timestamp = online(desk, unsigned)
    hub.offer({**lie, **desk.roots, TARGETS: unsigned, SNAPSHOT: snapshot, TIMESTAMP: timestamp})
    for who in ("reader", "newcomer"):
        refused(hub, "targets.json has too few signatures: 0 valid of the 1", who=who)


def online(desk: Desk, targets: bytes) -> tuple[bytes, bytes]:
    """Snapshot and timestamp for any targets, by whoever has the online key."""
    snapshot = desk._snapshot(targets, desk.root)
    return snapshot, desk._timestamp(snapshot, desk.root)


def test_rounds_that_the_online_key_did_not_confirm_are_refused(hub: HubSimulator) -> None:
    files, desk = hub.latest(), hub.desk()
    signed = desk.refresh(with_snapshot=True)
    stripped = json.loads(signed[TIMESTAMP])
    stripped["signatures"] = []
    hub.offer({**files, **signed, TIMESTAMP: json.dumps(stripped).encode()})
    refused(hub, "timestamp.json has too few signatures: 0 valid of the 1")


def test_a_root_that_the_old_keys_did_not_sign_is_refused(hub: HubSimulator) -> None:
    taken = HubSimulator(hub.folder / f"taken-{os.getpid()}-{datetime.now(UTC).timestamp()}")
    forged = json.loads(taken.latest()["1.root.json"])
    forged["signed"]["version"] = 2
    from moshi_hub.metadata import add_signatures

    data = add_signatures(json.dumps(forged).encode(), taken.desk().keys.signers(
        taken.desk().root.keys.values()))  # fmt: skip
    hub.offer({**hub.latest(), "2.root.json": data})
    for who in ("reader", "newcomer"):
        refused(hub, "root was changed without its old keys", "2.root.json has 0 of the 1", who=who)


def test_another_root_at_a_known_address_is_refused(hub: HubSimulator) -> None:
    taken = HubSimulator(hub.folder / f"other-{datetime.now(UTC).timestamp()}")
    hub.offer(taken.latest() | {name: hub.latest()[name] for name in SIGNED_FILES})
    pinned = hub.person("reader").trust.root()
    refused(hub, "is another hub than before", f"pinned is {pinned}")


def test_roots_with_keys_of_odd_kinds_are_refused_unread(hub: HubSimulator) -> None:
    root = json.loads(hub.latest()["1.root.json"])
    for key in root["signed"]["keys"].values():
        key["keytype"], key["scheme"] = "rsa", "pgp+rsa-pkcsv1.5"
    hub.offer({**hub.latest(), "1.root.json": json.dumps(root).encode()})
    refused(hub, "1.root.json is no root with ed25519 keys", who="newcomer")


# Time.


def expired(hub: HubSimulator, days: int = 100) -> dict[str, bytes]:
    """The same state, confirmed so long ago that nobody should believe it."""
    return {**hub.latest(), **hub.desk(days=-days, timestamp_days=90).refresh(with_snapshot=False)}


def test_a_frozen_hub_leaves_the_reader_with_the_last_model_and_the_reason(
    hub: HubSimulator,
) -> None:
    trusted = hub.person("reader").trust.load()
    hub.offer(expired(hub))
    snapshot = hub.sync()
    assert (snapshot.online, snapshot.round) == (False, 2)
    end = json.loads(hub.latest()[TIMESTAMP])["signed"]["expires"][:10]
    assert f"its timestamp expired on {end}" in snapshot.problem
    assert "10 day(s) ago" in snapshot.problem
    assert hub.person("reader").trust.load() == trusted


def test_a_newcomer_takes_nothing_from_a_frozen_hub(hub: HubSimulator) -> None:
    hub.offer(expired(hub))
    with pytest.raises(HubError, match="may be frozen") as error:
        hub.sync("newcomer")
    assert "moshi-hub keys refresh" in error.value.hint
    assert hub.person("newcomer").trust.load() == {}


def test_what_was_fresh_when_it_was_seen_is_asked_again_when_it_has_expired(
    hub: HubSimulator,
) -> None:
    reader = hub.person("reader")
    seen = reader.seen()
    assert hub.sync().online
    old = seen.__class__(**{name: getattr(seen, name) for name in seen.__struct_fields__}
                         | {"expires": 1})  # fmt: skip
    from moshi_fl.records import dump

    (reader.folder / "seen.json").write_bytes(dump(old))
    assert hub.sync().online  # TUF was asked, and found nothing expired
    assert reader.seen().expires == seen.expires


def test_maintainers_can_renew_what_has_expired(hub: HubSimulator) -> None:
    from moshi_fl.replica import Replica
    from moshi_hub.rotation import open_bench, refresh

    hub.offer(expired(hub))
    with pytest.raises(StaleHub):
        hub.replica.look()
    refresh(open_bench(Replica(hub.url, hub.home, even_expired=True)), with_snapshot=False)
    assert hub.sync().online


# Pinning.


def test_the_first_contact_pins_the_root_and_shows_it(hub: HubSimulator) -> None:
    first = hub.sync("newcomer")
    assert first.first_contact
    assert first.root == fingerprint(hub.states[0]["1.root.json"])
    again = hub.sync("newcomer")
    assert (again.first_contact, again.root) == (False, first.root)
    assert hub.sync("newcomer", offline=True).root == first.root


def test_a_demanded_root_is_the_only_one_taken(hub: HubSimulator) -> None:
    from moshi_sdk.sync import SyncManager

    right, wrong = hub.sync().root, "-".join(["0123"] * 8)
    home = hub.folder / "newcomer"
    with pytest.raises(UntrustedHub, match=f"not the one demanded .{wrong}") as error:
        SyncManager(hub.url, home=home, root=wrong).pull()
    assert "moshi-hub keys fingerprint" in error.value.hint
    assert hub.person("newcomer").trust.load() == {}
    assert SyncManager(hub.url, home=home, root=right).pull().round == 2
    with pytest.raises(UntrustedHub, match="demanded"):
        SyncManager(hub.url, home=home, root=wrong).pull()
    with pytest.raises(UntrustedHub, match="not by the one demanded"):
        SyncManager(hub.url, home=home, root=wrong).pull(offline=True)


def test_a_round_with_too_few_attestations_is_refused_by_policy(hub: HubSimulator) -> None:
    from moshi_fl.policy import Policy
    from moshi_fl.replica import Replica
    from moshi_sdk.sync import SyncManager

    home = hub.folder / "newcomer"
    demanding = SyncManager(hub.url, home=home, policy=Policy(2))
    with pytest.raises(UntrustedHub, match=r"round 2 has 0 agreeing .* you demand 2") as error:
        demanding.pull()
    assert "--min-attestations" in error.value.hint
    assert demanding.pull(0).round == 0  # random weights: nobody has anything to attest
    attested = [Replica(hub.url, home, policy=Policy(2), attestations=lambda _, __, n=count: n)
                for count in (1, 2)]  # fmt: skip
    with pytest.raises(UntrustedHub, match="round 2 has 1 agreeing"):
        attested[0].pull()
    assert attested[1].pull().round == 2


# Deaths in between.


def test_trust_that_was_written_by_half_recovers(hub: HubSimulator) -> None:
    folder = hub.person("reader").trust
    new = hub.offer({**hub.latest(), **hub.desk().refresh(with_snapshot=True)})
    assert hub.sync().online
    after = folder.load()
    shutil.rmtree(folder.path)
    before = {name: data for name, data in hub.states[2].items() if name in METADATA_FILES}
    names = ["1.root.json", TIMESTAMP, SNAPSHOT, TARGETS]
    for written in range(len(names) + 1):
        half = before | {name: after[name] for name in names[:written]}
        TrustFolder(folder.path).keep(half)
        (hub.person("reader").folder / "seen.json").unlink(missing_ok=True)
        assert hub.sync().state.commit == new
        assert folder.load() == after
        shutil.rmtree(folder.path)


def test_an_online_thief_can_freeze_but_not_forge_and_rotation_ends_it(hub: HubSimulator) -> None:
    """Fast-forward: the thief confirms the present state under an enormous version."""
    from moshi_fl.replica import Replica
    from moshi_hub.rootchange import replace
    from moshi_hub.rotation import change_root, open_bench

    desk = thief(hub, "online", mine=False)
    far = json.loads(desk.metadata[TIMESTAMP])
    far["signed"]["version"], far["signatures"] = 1 << 40, []
    from moshi_hub.metadata import add_signatures, keys_of

    signers = desk.keys.signers(keys_of(desk.root, "timestamp"))
    stolen = add_signatures(json.dumps(far).encode(), signers)
    honest = hub.latest()
    hub.offer({**honest, TIMESTAMP: stolen})
    assert hub.sync().online  # the reader has seen the enormous version
    hub.offer(honest)
    refused(hub, "the hub was rewound", f"version {1 << 40}")
    bench = open_bench(Replica(hub.url, hub.home, even_expired=True))
    old = keys_of(bench.desk.root, "timestamp")[0]
    key = bench.desk.keys.create("online").public_key
    changed = change_root(bench, replace(old.keyid, key, "online"))
    assert changed.lacks == ()
    assert hub.sync().online  # what the revoked key signed no longer counts, in either direction
    hub.offer({**hub.latest(), TIMESTAMP: stolen})
    refused(hub, "timestamp.json has too few signatures")
