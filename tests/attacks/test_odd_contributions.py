"""Contributions that no client makes: each gets a verdict of its own and holds up nobody."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from moshi_fl.history import (
    DELTA_FILE,
    contribution_branch,
    contribution_path,
    signature_path,
)
from moshi_fl.records import Contribution, File, Location, dump
from moshi_fl.signing import CONTRIBUTION_NAMESPACE
from moshi_fl.store import ANY, Author, HubRepo, RefUpdate
from tests.support.hubs import git
from tests.support.keys import signature_by, signer_of
from tests.support.simulator import HubSimulator

EVE = Author("eve", "eve@example.org")


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    """A new hub."""
    return HubSimulator.copied(tmp_path)


def push_branch(hub: HubSimulator, record: Contribution, number: int) -> str:
    """Push a record as if it were made on that round."""
    replica = hub.person("eve")
    repo, main = replica.repo, replica.fetch_main()
    data = dump(record)
    signature = signature_by(record.contributor, data, CONTRIBUTION_NAMESPACE).encode()
    files = {contribution_path: data, signature_path: signature}
    blobs = {path(number, record.id): repo.put(content) for path, content in files.items()}
    tree = repo.tree(blobs, base=main)
    commit = repo.commit(tree, parents=(main,), message="x\n", author=EVE, when=0)
    branch = contribution_branch(number, record.id)
    repo.push([RefUpdate(branch, commit, ANY)])
    return branch


def push_with_delta(hub: HubSimulator, honest: Contribution, oid: str) -> Contribution:
    """A contribution whose record truly says that its delta is the object ``oid``."""
    sha256 = "ab" * 32
    ref = f"refs/moshi/delta/{honest.round}/{sha256[:32]}"
    file = File(name=DELTA_FILE, bytes=100, sha256=sha256)
    place = Location(ref=ref, commit=oid, files=(file,))
    key = signer_of("eve").public_key
    record = msgspec.structs.replace(honest, delta=place, contributor="eve", key=key)
    hub.person("eve").repo.push([RefUpdate(ref, oid, ANY)])
    push_branch(hub, record, record.round)
    return record


def a_file(repo: HubRepo) -> str:
    return repo.put(b"no commit at all")


def a_tree(repo: HubRepo) -> str:
    return repo.tree({DELTA_FILE: repo.put(b"x")})


def a_commit_of_many_files(repo: HubRepo) -> str:
    blob = repo.put(b"x")
    tree = repo.tree({f"{number:x}": blob for number in range(10_500)})
    return repo.commit(tree, message="x\n", author=EVE, when=0)


@pytest.mark.parametrize("make", [a_file, a_tree, a_commit_of_many_files])
def test_a_delta_that_is_no_commit_of_one_file_holds_up_nobody(
    hub: HubSimulator, make: Callable[[HubRepo], str]
) -> None:
    honest = hub.contribute("ann")
    hub.person("eve").pull()
    odd = push_with_delta(hub, honest, make(hub.person("eve").repo))
    outcome = hub.merge()
    verdicts = {v.branch.rsplit("/", 1)[-1]: v for v in outcome.open_round.verdicts}
    assert not verdicts[odd.id].accepted
    assert verdicts[odd.id].is_settled
    assert [merged.id for merged in outcome.proposal.record.contributions] == [honest.id]
    assert outcome.leftovers == ""
    assert not [ref for ref in hub.refs() if "contribute" in ref]


def test_a_record_under_another_round_does_not_displace_the_honest_one(hub: HubSimulator) -> None:
    hub.rounds(2)
    honest = hub.contribute("ann")
    hub.person("eve").pull()
    copy = push_branch(hub, honest, 1)
    found = {verdict.branch: verdict for verdict in hub.look().verdicts}
    assert found[copy].findings[0].code == "wrong-branch"
    assert found[contribution_branch(2, honest.id)].accepted


def test_a_branch_that_cannot_be_read_goes_when_its_round_is_too_old(hub: HubSimulator) -> None:
    branch = contribution_branch(0, "0" * 32)
    huge = git(hub.path, "hash-object", "-w", "--stdin", stdin=bytes(3 << 20)).strip()
    tree = git(hub.path, "mktree", stdin=f"100644 blob {huge}\tx\n".encode()).strip()
    identity = ["-c", "user.name=eve", "-c", "user.email=eve@example.org"]
    commit = git(hub.path, *identity, "commit-tree", "-p", hub.main(), "-m", "x", tree).strip()
    git(hub.path, "update-ref", branch, commit)
    hub.rounds(1)
    assert hub.codes() == ["unreadable"]
    hub.rounds(3)
    assert branch not in hub.refs()


@pytest.fixture
def short_command_lines() -> Iterator[None]:
    """Command lines of 128 KiB at most, as some systems have them: a quarter of the stack."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (512 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


@pytest.mark.usefixtures("short_command_lines")
def test_more_branches_are_cleaned_up_than_one_command_line_names(hub: HubSimulator) -> None:
    hub.rounds(3)
    names = (contribution_branch(0, f"{number:032x}") for number in range(1000))
    main = hub.main()
    lines = "".join(f"create {name} {main}\n" for name in names)
    git(hub.path, "update-ref", "--stdin", stdin=lines.encode())
    hub.contribute("ann")
    assert hub.merge().leftovers == ""
    assert not [ref for ref in hub.refs() if "contribute" in ref]
