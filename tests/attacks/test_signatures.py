"""Attempts to contribute in somebody's name, or to live on somebody's work: each is refused for
what it is, before its delta is fetched, and holds up nobody."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import msgspec
import pytest

from moshi_fl.errors import SigningError
from moshi_fl.history import DELTA_FILE, contribution_branch, signature_path
from moshi_fl.records import Contribution, dump
from moshi_fl.signing import ATTESTATION_NAMESPACE, CONTRIBUTION_NAMESPACE
from moshi_fl.sshsig import MAX_SIGNATURE_BYTES, armour, parse_signature
from moshi_fl.store import ANY, Author, RefUpdate
from tests.support.keys import key_file, signature_by, signer_of
from tests.support.simulator import HubSimulator, random_delta

EVE = Author("eve", "eve@example.org")


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    """A new hub."""
    return HubSimulator.copied(tmp_path)


def signed_by(name: str, record: Contribution, namespace: str = CONTRIBUTION_NAMESPACE) -> str:
    return signature_by(name, dump(record), namespace)


def code_of(hub: HubSimulator, record: Contribution) -> str:
    verdict = hub.verdicts()[record.id]
    return "" if verdict.accepted else verdict.findings[0].code


def test_a_record_without_a_signature_is_refused(hub: HubSimulator) -> None:
    hub.push_record(hub.contribute("ann"), signature=b"")
    assert hub.codes() == ["unsigned"]


def wrapped_otherwise(armoured: str) -> str:
    lines = armoured.splitlines()
    body = "".join(lines[1:-1])
    return "\n".join([lines[0], *(body[at : at + 64] for at in range(0, len(body), 64)), lines[-1]])


@pytest.mark.parametrize(
    "forge",
    [
        lambda record: signed_by("eve", record),
        lambda record: signed_by("ann", msgspec.structs.replace(record, num_examples=99)),
        lambda record: signed_by("ann", record, ATTESTATION_NAMESPACE),
        lambda record: signed_by("ann", record, "git"),
        lambda record: signed_by("ann", record)[:-40],
        lambda record: signed_by("ann", record) + "\n",
        lambda record: signed_by("ann", record) * 2,
        lambda record: signed_by("ann", record).replace("\n", "\r\n"),
        lambda record: wrapped_otherwise(signed_by("ann", record)),
        lambda record: armour(parse_signature(signed_by("ann", record)).blob + b"\0"),
        lambda _: "-----BEGIN SSH SIGNATURE-----\n-----END SSH SIGNATURE-----\n",
        lambda _: "trust me",
        lambda _: "Ä" * 100,
    ],
    ids=[
        "another key",
        "another record",
        "another purpose",
        "a Git commit's",
        "truncated",
        "trailing newline",
        "twice",
        "other line ends",
        "other lines",
        "trailing byte",
        "nothing in it",
        "a claim",
        "not ASCII",
    ],
)
def test_a_false_signature_is_refused_before_the_delta_is_fetched(hub: HubSimulator, forge) -> None:
    record = hub.contribute("ann")
    hub.push_record(record, signature=forge(record).encode())
    hub.replica.repo.push([RefUpdate(record.delta.ref, None, ANY)])  # else it would be missed
    assert hub.codes() == ["bad-signature"]


@pytest.mark.parametrize("size", [MAX_SIGNATURE_BYTES + 1, 10**6])
def test_an_enormous_signature_is_not_even_read(hub: HubSimulator, size: int) -> None:
    hub.push_record(hub.contribute("ann"), signature=b"A" * size)
    assert hub.codes() == ["oversize"]


def test_a_signature_beyond_all_measure_is_not_even_fetched(hub: HubSimulator) -> None:
    honest = hub.contribute("ann")
    odd = hub.contribute("eve", seed=2)
    hub.push_record(odd, signature=os.urandom(3 << 20))
    assert hub.codes() == ["unreadable"]
    assert [merged.id for merged in hub.merge().proposal.record.contributions] == [honest.id]


@pytest.mark.parametrize("mode", ["120000", "100755"])
def test_a_signature_that_is_no_plain_file_is_refused(hub: HubSimulator, mode: str) -> None:
    from tests.hub.test_verify import tree_with_mode

    record = hub.contribute("ann")
    repo, place = hub.replica.repo, (record.round, record.id)
    hub.replica.fetch_main()
    branch = contribution_branch(*place)
    repo.fetch({branch: "refs/test/honest"})
    blob = repo.put(signed_by("ann", record).encode())
    tree = tree_with_mode(hub, "refs/test/honest", signature_path(*place), blob, mode)
    main = hub.replica.fetch_main()
    commit = repo.commit(tree, parents=(main,), message="x\n", author=EVE, when=0)
    repo.push([RefUpdate(branch, commit, ANY)])
    assert hub.codes() == ["wrong-mode"]


def dss() -> str:
    blob = b"\0\0\0\x07ssh-dss" + b"\0\0\0\1\1" * 4
    return f"ssh-dss {base64.b64encode(blob).decode()}"


def short_rsa() -> str:
    path = key_file("weak", "rsa", 1024)
    return " ".join(path.with_name(f"{path.name}.pub").read_text().split()[:2])


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (dss, "bad-record"),
        (lambda: "ssh-ed25519-cert-v01@openssh.com AAAA", "bad-record"),
        (lambda: f"{signer_of('ann').public_key} ann", "bad-record"),
        (lambda: f"-oProxyCommand=x {signer_of('ann').public_key}", "bad-record"),
        (lambda: f'namespaces="*" {signer_of("ann").public_key}', "bad-record"),
        (lambda: f"{signer_of('ann').public_key}\nssh-ed25519 AAAA", "bad-record"),
        (lambda: "ssh-rsa " + "A" * 2000, "bad-record"),
        (lambda: "ssh-ed25519 AAAA", "bad-signature"),
        (short_rsa, "bad-signature"),
    ],
)
def test_a_key_that_no_hub_accepts_is_refused(hub: HubSimulator, key, code: str) -> None:
    honest = hub.contribute("ann")
    record = msgspec.structs.replace(honest, key=key())
    hub.push_record(record, key="ann")
    branch = contribution_branch(record.round, record.id)
    (found,) = [verdict for verdict in hub.look().verdicts if verdict.branch == branch]
    assert found.findings[0].code == code
    assert hub.verdicts()[honest.id].accepted


def stolen(record: Contribution, thief: str) -> Contribution:
    """Somebody's open work under a key and a name of one's own, with an id that sorts before it."""
    mine = msgspec.structs.replace(record, contributor=thief, key=signer_of(thief).public_key)
    tries = (msgspec.structs.replace(mine, num_examples=number) for number in range(1, 10_000))
    return next(copy for copy in tries if copy.id < record.id)


def test_a_copy_with_a_lower_id_does_not_make_the_original_the_replay(hub: HubSimulator) -> None:
    original = hub.contribute("ann")
    hub.look()
    copy = stolen(original, "eve")
    hub.push_record(copy)
    assert code_of(hub, copy) == "replay"
    merged = hub.merge().proposal.record.contributions
    assert [entry.id for entry in merged] == [original.id]


def test_what_cannot_be_fetched_this_time_keeps_its_place(hub: HubSimulator) -> None:
    """A server that fails for a moment must not be a thief's chance."""
    record = hub.contribute("ann")
    repo = hub.person("ann").repo
    files = {DELTA_FILE: repo.put(b"x"), "noise": repo.put(os.urandom(3 << 20))}
    large = repo.commit(repo.tree(files), message="x\n", author=EVE, when=0)
    first = msgspec.structs.replace(
        record, delta=msgspec.structs.replace(record.delta, commit=large)
    )
    repo.push([RefUpdate(record.delta.ref, large, ANY)])
    repo.push([RefUpdate(contribution_branch(record.round, record.id), None, ANY)])
    hub.push_record(first)
    assert code_of(hub, first) == "unreadable"
    second = hub.contribute("ann", seed=2)
    copy = stolen(first, "eve")
    hub.push_record(copy)
    assert [code_of(hub, entry) for entry in (first, second, copy)] == [
        "unreadable",
        "one-per-round",
        "replay",
    ]


def test_two_copies_between_two_looks_are_one_contribution(hub: HubSimulator) -> None:
    """Nothing tells which of them came first; that exactly one counts is what is promised."""
    original = hub.contribute("ann")
    hub.push_record(stolen(original, "eve"))
    assert hub.codes() == ["replay"]
    assert len(hub.merge().proposal.record.contributions) == 1


def test_somebody_elses_record_pushed_again_changes_nothing(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.push_record(record, key="ann")  # anybody can copy both files
    assert code_of(hub, record) == ""
    hub.merge()
    hub.push_record(record, key="ann")
    assert code_of(hub, record) == "replay"


def test_a_record_cannot_be_moved_to_another_key(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    taken = msgspec.structs.replace(record, key=signer_of("eve").public_key)
    hub.push_record(taken, key="ann")
    assert code_of(hub, taken) == "bad-signature"


def test_a_key_counts_once_a_round_whatever_its_names(hub: HubSimulator) -> None:
    first = hub.contribute("ann")
    hub.look()
    others = [hub.contribute(f"ann{n}", key="ann", seed=n) for n in range(2, 6)]
    assert {code_of(hub, record) for record in others} == {"one-per-round"}
    merged = hub.merge().proposal.record.contributions
    assert [entry.id for entry in merged] == [first.id]


def test_a_key_that_was_merged_does_not_count_again_for_that_round(hub: HubSimulator) -> None:
    base = hub.sync("ann")
    hub.contribute("ann", on=base)
    hub.merge()
    late = hub.contribute("ann", on=base, seed=2)
    assert code_of(hub, late) == "one-per-round"
    fresh = hub.contribute("ann", seed=3)
    assert code_of(hub, fresh) == ""


def test_what_was_refused_takes_nobodys_place(hub: HubSimulator) -> None:
    base = hub.sync().load()
    hub.contribute("ann", delta=random_delta(base, 1, scale=1e4))
    hub.look()
    second = hub.contribute("ann", seed=2)
    assert hub.codes() == ["over-norm"]
    assert code_of(hub, second) == ""


def test_a_hub_without_ssh_keygen_judges_nobody(hub: HubSimulator, monkeypatch) -> None:
    """Else all would look unsigned, and a merge would delete them."""
    hub.contribute("ann")
    before = hub.refs()
    with monkeypatch.context() as patch:
        patch.setattr("moshi_fl.signing.SSH_KEYGEN", "ssh-keygen-that-is-not-there")
        with pytest.raises(SigningError, match="ssh-keygen cannot be run") as caught:
            hub.merge()
    assert "OpenSSH" in caught.value.hint
    assert hub.refs() == before
    assert len(hub.merge().proposal.record.contributions) == 1
