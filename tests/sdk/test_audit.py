"""Auditing: a merger who lies is found out, and the round is named."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from moshi_fl.errors import HubError, SigningError
from moshi_fl.history import MAIN, accepted_signature_path, contribution_branch
from moshi_fl.records import dump
from moshi_fl.signing import CONTRIBUTION_NAMESPACE
from moshi_fl.snapshot import encode_step
from moshi_fl.store import ANY, Author, RefUpdate
from moshi_fl.strategies import find_strategy
from moshi_fl.weights import weights_digest
from moshi_hub import merge as merging
from moshi_hub.propose import Proposal
from moshi_sdk.audit import Auditor, Finding
from tests.support.keys import signature_by, signer_of
from tests.support.simulator import HubSimulator


def audit(hub: HubSimulator, first: int = 1, last: int | None = None) -> list[Finding]:
    replica = hub.person("auditor")
    last = last or replica.look().newest.round
    return list(Auditor(replica, find_strategy=find_strategy).audit(first, last))


def lie(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch, falsify: Callable[[Proposal], Proposal]
) -> None:
    """Merge with a maintainer's tool that falsifies the proposal before it is published."""
    honest = merging.propose
    with monkeypatch.context() as patch:
        patch.setattr(merging, "propose", lambda *a, **k: falsify(honest(*a, **k)))
        hub.merge()


def test_an_honest_history_is_identical(hub: HubSimulator) -> None:
    hub.rounds(3, contributors=2)
    findings = audit(hub)
    assert [finding.identical for finding in findings] == [True] * 3
    assert [finding.contributions for finding in findings] == [2] * 3


def test_a_round_can_be_audited_alone(hub: HubSimulator) -> None:
    hub.rounds(3)
    assert [finding.round for finding in audit(hub, 2, 2)] == [2]


def test_rounds_that_do_not_exist_are_said(hub: HubSimulator) -> None:
    with pytest.raises(HubError, match="the hub has only round 0") as early:
        audit(hub, 1, 1)
    assert early.value.hint.startswith("moshi-fl audit ")
    hub.rounds(1)
    with pytest.raises(HubError, match="round 5 cannot be audited: the hub has round 1") as late:
        audit(hub, 5, 5)
    assert late.value.hint == "--round 1 or less; --all audits every round"


def test_a_model_that_is_not_the_mean_is_found(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def falsify(proposal: Proposal) -> Proposal:
        weights = {name: array.copy() for name, array in proposal.weights.items()}
        weights["fc_out.bias"][0] += np.float32(1e-3)
        folder = proposal.deltas.parent / "lie"
        folder.mkdir()
        base = hub.replica.pull().load()
        files = tuple(folder / file.name for file in encode_step(base, weights, folder))
        update = msgspec.structs.replace(proposal.record.update, kind="step")
        record = msgspec.structs.replace(
            proposal.record, weights=weights_digest(weights), update=update
        )
        return _replace(proposal, record=record, weights=weights, update_files=files)

    hub.rounds(1)
    hub.contribute("ann", seed=50)
    lie(hub, monkeypatch, falsify)
    hub.rounds(1)
    assert hub.sync().load()  # a step tells nobody how it was made
    findings = audit(hub)
    assert [finding.identical for finding in findings] == [True, False, True]
    assert "published" in findings[1].problem


def _replace(proposal: Proposal, **changes) -> Proposal:
    from dataclasses import replace

    return replace(proposal, **changes)


def test_a_digest_that_the_deltas_do_not_give_is_refused_by_sync(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def falsify(proposal: Proposal) -> Proposal:
        record = msgspec.structs.replace(proposal.record, weights="0" * 64)
        return _replace(proposal, record=record)

    hub.contribute("ann")
    lie(hub, monkeypatch, falsify)
    with pytest.raises(HubError, match="does not give the weights it promises"):
        hub.sync("reader")
    assert [finding.identical for finding in audit(hub)] == [False]


def test_a_favoured_contributor_is_found(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = merging.propose

    def favour(state, rules, base, contributions, folder, **how):
        from moshi_hub import propose as proposing

        def weigh(entries, rules):
            fair = original(entries, rules)
            return (msgspec.structs.replace(fair[0], weight=fair[0].weight * 100), *fair[1:])

        original = proposing.weigh
        with monkeypatch.context() as patch:
            patch.setattr(proposing, "weigh", weigh)
            return honest(state, rules, base, contributions, folder, **how)

    hub.contribute("ann")
    hub.contribute("bob", seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "propose", favour)
        hub.merge()
    (finding,) = audit(hub)
    assert finding.identical is False
    assert "by the rule 1000000" in finding.problem


def test_a_contribution_that_nobody_made_is_found(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.contribute("ann")
    hub.contribute("bob", seed=2)

    def falsify(proposal: Proposal) -> Proposal:
        first, second = proposal.record.contributions
        swapped = (
            msgspec.structs.replace(first, weight=second.weight),
            msgspec.structs.replace(second, weight=first.weight),
        )
        a, b = proposal.delta_files
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
        record = msgspec.structs.replace(proposal.record, contributions=swapped)
        return _replace(proposal, record=record)

    lie(hub, monkeypatch, falsify)
    (finding,) = audit(hub)
    assert finding.identical is False
    assert "is not its contributor's" in finding.problem


def tamper(hub: HubSimulator, change: Callable[[dict[str, str]], None]) -> None:
    """A maintainer rewrites files of main by a new commit; the weights stay right."""
    repo, main = hub.replica.repo, hub.replica.fetch_main()
    files: dict[str, str] = {}
    change(files)
    gone = [path for path, content in files.items() if not content]
    blobs = {path: repo.put(text.encode()) for path, text in files.items() if text}
    tree = repo.tree(blobs, base=main, remove=gone)
    author = Author("m", "m@example.org")
    commit = repo.commit(tree, parents=(main,), message="x\n", author=author, when=0)
    repo.push([RefUpdate(MAIN, commit, main)])


def test_a_signature_by_another_key_is_found(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.merge()
    forged = signature_by("maintainer", dump(record), CONTRIBUTION_NAMESPACE)
    path = accepted_signature_path(1, record.id)
    tamper(hub, lambda files: files.update({path: forged}))
    (finding,) = audit(hub)
    assert finding.identical is False
    assert f"contribution {record.id[:12]} is not signed by its key" in finding.problem


def test_a_signature_that_is_gone_is_found(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.merge()
    path = accepted_signature_path(1, record.id)
    tamper(hub, lambda files: files.update({path: ""}))
    (finding,) = audit(hub)
    assert finding.identical is False
    assert "a signature of round 1 is missing" in finding.problem


def test_a_contribution_made_up_in_somebodys_name_is_found(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else about it is right: the id, the delta, the weight, the digest."""
    from moshi_hub import verify as gate

    with monkeypatch.context() as blind:
        blind.setattr(gate, "check_signature", lambda *_: None)  # a merger who does not look
        record = hub.contribute("maintainer", key="maintainer")
        claimed = msgspec.structs.replace(record, key=signer_of("ann").public_key)
        hub.replica.repo.push([RefUpdate(contribution_branch(0, record.id), None, ANY)])
        hub.push_record(claimed, key="maintainer")
        hub.merge()
    (finding,) = audit(hub)
    assert finding.identical is False
    assert "made with another key than the record names" in finding.problem


@pytest.mark.parametrize("where", ["in one round", "in two rounds"])
def test_a_key_that_counts_twice_is_found(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A merger who favours somebody takes what the gate, or selection, would have refused."""
    base = hub.sync("ann")
    hub.contribute("bob" if where == "in one round" else "ann", on=base, seed=1)
    hub.merge()
    hub.contribute("ann", on=base, seed=2)
    if where == "in one round":
        hub.contribute("ann", seed=3)
        monkeypatch.setattr("moshi_hub.selection.one_per_owner", lambda some: (list(some), {}))
    else:
        monkeypatch.setattr("moshi_hub.opened.known_keys", lambda *_: {})
    hub.merge()
    for findings in (audit(hub), audit(hub, 2)):
        assert findings[-1].identical is False
        assert "is a second one of the key SHA256:" in findings[-1].problem
    assert audit(hub)[0].identical


def test_an_audit_without_ssh_keygen_is_no_verdict(hub: HubSimulator, monkeypatch) -> None:
    hub.rounds(1)
    with monkeypatch.context() as patch:
        patch.setattr("moshi_fl.signing.SSH_KEYGEN", "ssh-keygen-that-is-not-there")
        with pytest.raises(SigningError, match="cannot be run"):
            audit(hub)
