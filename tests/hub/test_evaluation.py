"""Evaluations and merges on a real hub: local and appointed, raced and restarted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moshi_fl.errors import UntrustedHub
from moshi_fl.evidence import Ledger
from moshi_fl.history import EVALUATORS_FILE, ledger_path, round_folder
from moshi_fl.policy import Policy
from moshi_fl.records import digest, load
from moshi_fl.session import Signed
from moshi_fl.strategies import find_strategy
from moshi_hub.board import RefBoard
from moshi_hub.cli import main as hub_main
from moshi_hub.evaluation import gate_for
from moshi_hub.heldout import pool_path, store_pool
from moshi_hub.host import host
from moshi_hub.merge import Options, merge
from moshi_hub.pending import NothingToMerge
from moshi_sdk.audit import Auditor
from moshi_sdk.cli import main as sdk_main
from moshi_sdk.sync import SyncManager
from tests.support.children import Nursery
from tests.support.keys import key_file, signer_of
from tests.support.sessions import Court, shifted
from tests.support.simulator import HubSimulator, write_corpus


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    return HubSimulator.copied(tmp_path, evaluation={"sequences": 12}, delta={"codec": "f32"})


def merged(hub: HubSimulator, publish: bool = True, **how):
    """Merge as the command does."""
    return merge(
        hub.replica,
        Options(publish=publish, **how),
        evaluator=lambda _: None,
        find_strategy=find_strategy,
        gate=gate_for(hub.replica, hub.home),
    )


def report(hub: HubSimulator, number: int) -> str:
    main = hub.replica.fetch_main()
    path = f"{round_folder(number)}/report.md"
    return hub.replica.repo.read(main, path, limit=1 << 20).decode()


def test_a_machine_evaluates_by_itself_and_keeps_out_what_harms(hub: HubSimulator) -> None:
    court = Court.__new__(Court)
    court.hub, court.replica = hub, hub.replica
    state = hub.replica.look()
    held = write_corpus(hub.folder / "held", files=5)
    store_pool(hub.replica, state.config, state.tokenizer, [held])
    good, bad = court.helpful(), court.harmful()
    outcome = merged(hub)
    assert outcome.built
    record = outcome.built.record
    assert [entry.id for entry in record.contributions] == [good.id]
    codes = {v.contribution.id: v.findings[0].code for v in outcome.open_round.verdicts[:9]
             if v.findings and v.contribution}  # fmt: skip
    assert codes == {bad.id: "no-gain"}
    main = hub.replica.fetch_main()
    data = hub.replica.repo.read(main, ledger_path(1), limit=1 << 20)
    ledger = load(data, Ledger, name="ledger")
    assert digest(ledger) == record.ledger
    assert [(entry.key, entry.outcome) for entry in ledger.entries] == [(good.key, "credit")]
    assert ledger.entries[0].credit == ledger.entries[0].gain > 0
    assert any(entry.path == EVALUATORS_FILE for entry in hub.replica.repo.entries(main))
    assert "processes of this machine" in report(hub, 1)
    (finding,) = Auditor(hub.person("reader"), find_strategy=find_strategy).audit(1, 1)
    assert finding.identical, finding.problem
    with pytest.raises(UntrustedHub, match="0 agreeing attestation"):
        SyncManager(hub.url, home=hub.folder / "strict", policy=Policy(1)).pull()


def test_appointed_evaluators_carry_a_round(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    good = court.helpful()
    court.run("eve", "fay", until="decide")
    with pytest.raises(Exception, match="is not over"):
        merged(hub)
    court.run("eve", "fay")
    late = court.helpful("bob", seed=5)  # after the closing: waits
    outcome = merged(hub)
    assert outcome.built
    assert [entry.id for entry in outcome.built.record.contributions] == [good.id]
    assert [entry.id for entry in outcome.waiting] == [late.id]
    assert not [ref for ref in hub.refs() if "/evaluation/" in ref]
    assert "refs/moshi/evidence/1" in hub.refs()
    (finding,) = Auditor(hub.person("reader"), find_strategy=find_strategy).audit(1, 1)
    assert finding.identical, finding.problem
    assert SyncManager(hub.url, home=hub.folder / "s", policy=Policy(2)).pull().round == 1
    with pytest.raises(UntrustedHub, match="2 agreeing attestation"):
        SyncManager(hub.url, home=hub.folder / "s", policy=Policy(3)).pull()


def test_what_is_disputed_waits_until_the_maintainer_decides(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    odd = court.helpful()
    for name in ("eve", "fay"):
        court.person(name, shifted(100_000))
    court.run("eve", "fay")
    with pytest.raises(Exception, match="0 contribution"):
        merged(hub)
    outcome = merged(hub, accept=(odd.id[:8],))
    assert outcome.built
    assert [entry.id for entry in outcome.built.record.contributions] == [odd.id]
    text = report(hub, 1)
    disputed = text.split("## Disputed")[1].split("## ")[0]
    assert f"**{odd.id[:12]}** (taken by the maintainer)" in disputed
    assert disputed.count("| proven to have lied |") == 2
    assert "| the hub's anchor |" in disputed
    assert "The referee measured" in disputed
    assert "Proven to have lied" in text
    (finding,) = Auditor(hub.person("reader"), find_strategy=find_strategy).audit(1, 1)
    assert finding.identical, finding.problem


def test_a_timer_keeps_what_a_maintainer_accepted(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    odd, good, _ = court.helpful(), court.helpful("bob", seed=5), court.harmful()
    for name in ("eve", "fay"):
        court.person(name, shifted(100_000, only=odd.id))
    court.run("eve", "fay")
    outcome = merged(hub, publish=False, accept=(odd.id[:8],))
    record = outcome.built.record
    assert {entry.id for entry in record.contributions} == {odd.id, good.id}
    with pytest.raises(NothingToMerge, match="proposed already"):
        merged(hub, publish=False, if_ready=True)


@pytest.mark.slow
def test_an_evaluation_killed_at_any_push_goes_on(hub: HubSimulator, commands: Nursery) -> None:
    """With nobody appointed the hub goes through all steps alone, and cannot decide."""
    court = Court(hub)
    court.helpful()
    words = ("moshi-hub", "evaluate", "--hub", hub.url, "--json")
    first = commands.run(*words, home=hub.home, trace=True, kill_at=30)
    assert first.was_killed
    push = 1 + next(n for n, event in enumerate(first.events) if "/evaluation/1/" in event)
    assert commands.run(*words, home=hub.home, kill_at=push).was_killed  # just before a push
    kills = 0
    while (ended := commands.run(*words, home=hub.home, kill_at=push + 1)).was_killed:
        kills += 1  # just after one: each life brings the session one step on
    assert kills >= 4
    assert ended.status == 0, ended.err
    assert ended.json["verdicts"][0]["verdict"] == "disputed"
    steps = sorted(ref.split("/evaluation/1/")[1] for ref in hub.refs() if "/evaluation/" in ref)
    assert len(steps) == 9  # none twice, none missing


class Raced(RefBoard):
    """A board that a rival uses just before one of this process's reads."""

    def __init__(self, of: RefBoard, before: int, rival: Callable[[], object]) -> None:
        super().__init__(of._repo, of._refs, of._number)
        self.reads, self.before, self.rival = 0, before, rival

    def read(self) -> dict[str, Signed]:
        self.reads += 1
        if self.reads == self.before:
            self.rival()
        return super().read()


@pytest.mark.parametrize("moment", range(1, 8))
def test_whenever_another_hub_is_faster_this_one_goes_on_from_there(
    hub: HubSimulator, moment: int
) -> None:
    court = Court(hub)
    court.helpful()
    chair = court.chair()
    done: list[str] = []

    def rival() -> None:
        done.append("rival")
        host(hub.replica, chair, court.board())

    ended = host(hub.replica, chair, Raced(court.board(), moment, rival))
    assert done
    assert ended.verdicts == host(hub.replica, chair, court.board()).verdicts


@pytest.mark.slow
def test_of_two_hubs_that_step_at_the_same_moment_one_wins(
    hub: HubSimulator, commands: Nursery
) -> None:
    court = Court(hub)
    court.helpful()
    words = ("moshi-hub", "evaluate", "--hub", hub.url, "--json")
    both = [commands.start(*words, home=hub.home) for _ in range(2)]
    ends = [child.wait() for child in both]
    assert [ended.status for ended in ends] == [0, 0], [ended.err for ended in ends]
    assert ends[0].json["verdicts"] == ends[1].json["verdicts"]


def test_everything_has_a_command(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(who: str, main, *words: object) -> tuple[int, dict]:
        monkeypatch.setenv("MOSHI_FL_HOME", str(hub.folder / who))
        status = main([*map(str, words), "--json"])
        return status, json.loads(capsys.readouterr().out)

    def boss(*words: object) -> tuple[int, dict]:
        return call("maintainer", hub_main, *words, "--hub", hub.url)

    court = Court(hub)
    public = key_file("eve").with_name(key_file("eve").name + ".pub")
    assert boss("evaluators", "add", public, "--owner", "eve", "--vouch")[0] == 0
    _, listed = boss("evaluators", "list")
    assert [(row["owner"], row["status"]) for row in listed["evaluators"]] == [("eve", "vouched")]
    pool = hub.folder / "pool.json"
    assert boss("pool", "export", pool)[1]["pool"] == boss("pool")[1]["pool"]
    good = court.helpful()
    assert call("eve", hub_main, "pool", "import", pool, "--hub", hub.url)[0] == 0
    hub.edit_settings('evaluators = "appointed"\n', 'evaluators = "appointed"\nquorum = 1\n')
    status, said = boss("evaluate")
    assert status == 4
    assert said["next_step"] == "close"
    for _ in range(6):
        who = ("--key", key_file("eve"), "--hub", hub.url)
        assert call("eve", hub_main, "attest", *who)[0] == 0
        status, said = boss("evaluate")
        if status == 0:
            break
    assert status == 0
    assert said["verdicts"][0]["verdict"] == "credit"
    status, said = call("eve", hub_main, "attest", good.id[:8], "--local", "--hub", hub.url)
    assert (status, said["verdict"]) == (0, "credit")
    assert boss("merge", "--publish")[0] == 0
    assert boss("pool", "retire")[0] == 0
    assert not pool_path(hub.replica).exists()
    assert f"refs/moshi/pool/{json_pool(pool)}" in hub.refs()
    assert boss("evaluators", "revoke", listed["evaluators"][0]["evaluator"])[0] == 0
    monkeypatch.setenv("MOSHI_FL_SIGNING_KEY", str(key_file("ann")))
    status, said = call("ann", sdk_main, "status", "--hub", hub.url)
    assert status == 0
    assert signer_of("ann").public_key == good.key


def json_pool(path: Path) -> str:
    from moshi_fl.weights import sha256_file

    return sha256_file(path)
