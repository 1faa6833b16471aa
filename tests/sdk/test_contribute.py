"""Contributing for real: training in a Flower client, resuming, rebasing, sending once."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from moshi_fl.errors import (
    DataError,
    HubError,
    MoshiError,
    Rejected,
    SigningError,
    TrainingError,
)
from moshi_fl.feedback import Feedback
from moshi_fl.history import accepted_signature_path, check_signature, contribution_branch
from moshi_fl.records import Contribution, dump
from moshi_fl.replica import Replica
from moshi_fl.signing import Signer, fingerprint, own_signer
from moshi_fl.store import ANY, PushRejected, RefUpdate
from moshi_fl.submit import signature_of, submit
from moshi_fl.train import Progress
from moshi_fl.weights import open_weights
from moshi_sdk.cli import main
from moshi_sdk.contribute import Options, contribute, discard, load_task, resume
from moshi_sdk.planning import make_plan, recipe_of
from moshi_sdk.runs import Runs
from moshi_sdk.sync import SyncManager
from tests.support.keys import key_file, signer_of
from tests.support.simulator import HubSimulator, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A source tree to train on."""
    return write_corpus(tmp_path / "code")


class Stop(Exception):
    """What a test raises in the middle of training."""


class Stopper:
    """A listener that interrupts training after some steps."""

    def __init__(self, after: int) -> None:
        self._after = after
        self.steps: list[int] = []

    def stage(self, name: str, text: str) -> None:
        """Ignore."""

    def step(self, progress: Progress) -> None:
        """Interrupt."""
        self.steps.append(progress.step)
        if len(self.steps) == self._after:
            raise Stop


def runs_of(hub: HubSimulator, home: Path) -> Runs:
    return Runs(Replica(hub.url, home).folder / "runs")


def send(hub: HubSimulator, corpus: Path, home: str = "ann", **options) -> Contribution:
    chosen = Options(**{"seed": 1, "contributor": home} | options)
    return contribute(hub.url, [corpus], chosen, home=hub.folder / home).contribution


def test_what_was_learned_reaches_the_hub(hub: HubSimulator, corpus: Path) -> None:
    outcome = contribute(
        hub.url, [corpus], Options(seed=1, contributor="ann"), home=hub.folder / "ann"
    )
    record = outcome.contribution
    assert outcome.sent
    assert outcome.data
    assert outcome.data.files == 3
    assert record.metrics.held_out_after < record.metrics.held_out_before
    assert hub.verdicts()[record.id].accepted
    assert record.num_examples == 3 * 4


def test_nothing_but_record_and_delta_is_pushed(hub: HubSimulator, corpus: Path) -> None:
    before = hub.refs()
    record = send(hub, corpus)
    new = set(hub.refs()) - set(before)
    assert new == {f"refs/heads/contribute/0/{record.id}", record.delta.ref}
    repo = hub.replica.repo
    hub.replica.pull()
    repo.fetch({ref: f"refs/test/{n}" for n, ref in enumerate(sorted(new))})
    pushed = [repo.entries(hub.refs()[ref]) for ref in sorted(new)]
    texts = b"".join(
        repo.read(hub.refs()[ref], entry.path, limit=10**6)
        for ref, entries in zip(sorted(new), pushed, strict=True)
        for entry in entries
    )
    assert b"def area" not in texts
    assert str(corpus).encode() not in texts


def test_the_same_again_sends_nothing_twice(hub: HubSimulator, corpus: Path) -> None:
    first = send(hub, corpus)
    refs = hub.refs()
    again = send(hub, corpus)
    assert again.id == first.id
    assert hub.refs() == refs


def test_a_dry_run_sends_nothing_and_can_be_sent_later(hub: HubSimulator, corpus: Path) -> None:
    before = hub.refs()
    dry = send(hub, corpus, dry_run=True)
    assert hub.refs() == before
    sent = resume(hub.url, home=hub.folder / "ann")
    assert sent.contribution.id == dry.id
    assert hub.verdicts()[dry.id].accepted


@pytest.mark.parametrize("after", [1, 4, 6])
def test_an_interrupted_contribution_ends_with_the_same_id(
    hub: HubSimulator, corpus: Path, after: int
) -> None:
    key = key_file("ann")
    whole = send(hub, corpus, "whole", steps=6, contributor="ann", dry_run=True, key=key)
    options = Options(seed=1, steps=6, contributor="ann", key=key)
    home = hub.folder / "ann"
    with pytest.raises(Stop):
        contribute(hub.url, [corpus], options, home=home, listener=Stopper(after))
    resumed = resume(hub.url, home=home, key=key)
    assert resumed.contribution.id == whole.id


def test_resuming_nothing_is_said(hub: HubSimulator) -> None:
    with pytest.raises(MoshiError, match="no unfinished contribution"):
        resume(hub.url, home=hub.folder / "ann")


def test_changed_data_cannot_be_resumed(hub: HubSimulator, corpus: Path) -> None:
    home = hub.folder / "ann"
    with pytest.raises(Stop):
        contribute(hub.url, [corpus], Options(seed=1), home=home, listener=Stopper(1))
    (corpus / "part0.py").write_text("print('something else entirely')\n" * 40)
    with pytest.raises(Rejected, match="data has changed"):
        resume(hub.url, home=home)


def test_a_contribution_survives_an_unreachable_hub(hub: HubSimulator, corpus: Path) -> None:
    dry = send(hub, corpus, dry_run=True)
    hub.path.rename(hub.folder / "away")
    with pytest.raises(HubError) as caught:
        resume(hub.url, home=hub.folder / "ann")
    assert "--resume sends it" in caught.value.hint
    (hub.folder / "away").rename(hub.path)
    assert resume(hub.url, home=hub.folder / "ann").contribution.id == dry.id


def test_the_hub_moved_on_a_little_and_the_delta_counts_less(
    hub: HubSimulator, corpus: Path
) -> None:
    hub.edit_settings('strategy = "robust"', 'strategy = "fedavg"')
    hub.rounds(1)
    dry = send(hub, corpus, dry_run=True)
    hub.rounds(1)
    outcome = resume(hub.url, home=hub.folder / "ann")
    assert outcome.contribution.id == dry.id
    assert "counts 50%" in outcome.note
    record = hub.merge().proposal.record
    assert [merged.weight for merged in record.contributions] == [500_000]


def test_the_hub_moved_on_a_lot_and_the_delta_is_rebased(hub: HubSimulator, corpus: Path) -> None:
    send(hub, corpus, dry_run=True)
    hub.rounds(3)
    outcome = resume(hub.url, home=hub.folder / "ann")
    record = outcome.contribution
    assert (record.round, record.rebased_from) == (3, 0)
    assert "rebased to round 3" in outcome.note
    assert hub.verdicts()[record.id].accepted


def grow_vocabulary(hub: HubSimulator) -> None:
    """A round after which the vocabulary has one more character."""
    for seed, name in enumerate(("bob", "eve"), 900):
        hub.contribute(name, seed=seed, proposed_characters="é")
    assert hub.merge().proposal.record.growth


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_run_survives_that_the_vocabulary_grows_meanwhile(
    hub: HubSimulator, corpus: Path, rounds: int
) -> None:
    home = hub.folder / "ann"
    with pytest.raises(Stop):
        contribute(hub.url, [corpus], Options(seed=1), home=home, listener=Stopper(1))
    grow_vocabulary(hub)
    hub.rounds(rounds)
    record = resume(hub.url, home=home).contribution
    assert record.rebased_from == (0 if rounds else None)
    assert hub.verdicts()[record.id].accepted


def test_the_largest_seed_trains(hub: HubSimulator, corpus: Path) -> None:
    record = send(hub, corpus, seed=2**53 - 1)
    assert hub.verdicts()[record.id].accepted


def test_what_was_merged_is_not_sent_again(hub: HubSimulator, corpus: Path) -> None:
    first = send(hub, corpus)
    hub.merge()
    run = next(iter(runs_of(hub, hub.folder / "ann")))
    assert run.is_sent
    assert run.contribution() == first
    second = send(hub, corpus)
    assert (second.round, second.id != first.id) == (1, True)


def test_error_feedback_says_later_what_the_codec_could_not(
    hub: HubSimulator, corpus: Path
) -> None:
    send(hub, corpus)
    folder = runs_of(hub, hub.folder / "ann")._folder.parent / "feedback"
    (path,) = folder.glob("*.safetensors")
    assert any(np.any(array) for array in open_weights(path).values())
    hub.merge()
    second = send(hub, corpus)
    assert [entry.stem for entry in folder.glob("*.safetensors")] != [path.stem]
    assert (folder / f"{second.id}.safetensors").exists()


def test_the_carry_of_what_never_made_it_is_not_used(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path)
    ones = {"w": np.ones(3, np.float32)}
    first, second = "1" * 32, "2" * 32
    feedback.sent(first, 0, ones, None)
    feedback.sent(second, 1, {"w": 2 * ones["w"]}, first)
    assert feedback.base(lambda *_: True) == second
    assert feedback.base(lambda *_: None) == second
    assert feedback.base(lambda *_: False) == first
    assert feedback.load(first)["w"][0] == 1


def test_new_characters_are_proposed(hub: HubSimulator, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "greek", "λ = 'Ω ж λ'\n")
    record = send(hub, folder)
    assert set(record.proposed_characters) == set("λΩж")


def test_no_usable_data_is_one_clear_error(hub: HubSimulator, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        send(hub, tmp_path / "empty")


def test_plans_that_differ_are_different_runs(hub: HubSimulator, corpus: Path) -> None:
    first, second = (send(hub, corpus, seed=seed, dry_run=True) for seed in (1, 2))
    assert first.id != second.id
    assert len(list(runs_of(hub, hub.folder / "ann"))) == 2


def test_a_record_without_training_metrics_is_still_valid(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    assert msgspec.structs.asdict(record)["metrics"].held_out_after is None
    assert hub.verdicts()[record.id].accepted


def test_a_run_that_cannot_succeed_is_discarded_and_the_one_before_it_is_back(
    hub: HubSimulator, corpus: Path
) -> None:
    home = hub.folder / "ann"
    good = contribute(hub.url, [corpus], Options(steps=2, seed=1, dry_run=True), home=home)
    wild = Options(steps=6, seed=2, learning_rate=1e37)
    with pytest.raises(TrainingError) as caught:
        contribute(hub.url, [corpus], wild, home=home)
    assert "--discard" in caught.value.hint
    with pytest.raises(TrainingError):
        resume(hub.url, home=home)
    assert discard(hub.url, home=home).training.steps == 6
    assert resume(hub.url, home=home).contribution.id == good.contribution.id
    with pytest.raises(MoshiError, match="no unfinished contribution"):
        discard(hub.url, home=home)


@pytest.mark.parametrize(
    "asked",
    ["--steps 99999999999999999999", "--epochs 1e300", "--epochs inf", "--minutes nan", "--lr nan"],
)
def test_a_number_that_no_run_can_have_is_wrong_usage_and_begins_none(
    hub: HubSimulator, corpus: Path, asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["contribute", "--hub", hub.url, "--data", str(corpus), *asked.split()]
    assert main(args) == 2
    assert asked.split(maxsplit=1)[0] in capsys.readouterr().err


def test_a_plan_that_could_not_be_read_again_is_refused_before_it_begins(
    hub: HubSimulator, corpus: Path
) -> None:
    dry = send(hub, corpus, dry_run=True)
    with pytest.raises(MoshiError, match=r"training\.steps"):
        send(hub, corpus, steps=2**60)
    assert resume(hub.url, home=hub.folder / "ann").contribution.id == dry.id


def test_a_damaged_plan_is_named_with_the_way_out(hub: HubSimulator, corpus: Path) -> None:
    send(hub, corpus, dry_run=True)
    home = hub.folder / "ann"
    (plan,) = home.glob("hubs/*/runs/*/run.json")
    plan.write_text("{}")
    with pytest.raises(MoshiError, match=re.escape(str(plan))) as caught:
        discard(hub.url, home=home)
    assert str(plan.parent) in caught.value.hint


def test_a_hubs_schedule_and_accumulation_decide_and_the_record_has_the_whole_batch(
    hub: HubSimulator, corpus: Path
) -> None:
    home = hub.folder / "ann"
    snapshot = SyncManager(hub.url, home=home).pull()
    rules = msgspec.structs.replace(
        snapshot.state.config.training,
        schedule="cosine",
        accumulation=2,
        batch_size=3,
        precision="auto",
    )
    config = msgspec.structs.replace(snapshot.state.config, training=rules)
    asking = replace(snapshot, state=replace(snapshot.state, config=config))
    task = load_task(asking.state)
    data = task.read([corpus], seed=0)
    key = signer_of("ann").public_key
    plan = make_plan(asking, task, data, [corpus], Options(steps=2, seed=1), key)
    assert (plan.training.batch_size, plan.schedule, plan.accumulation) == (6, "cosine", 2)
    assert plan.training.precision in {"fp32", "bf16"}
    recipe = recipe_of(plan)
    assert (recipe.batch_size, recipe.accumulation, recipe.schedule) == (3, 2, "cosine")
    plain = make_plan(snapshot, task, data, [corpus], Options(steps=2, seed=1), key)
    assert b'"schedule"' not in dump(plain)
    assert recipe_of(plain).schedule == "one-cycle"


class Hearing:
    """A listener that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def stage(self, name: str, text: str) -> None:
        """Remember."""
        self.said.append((name, text))

    def step(self, progress: Progress) -> None:
        """Ignore."""

    def about(self, name: str) -> list[str]:
        return [text for stage, text in self.said if stage == name]


def test_the_contributors_key_signs_and_its_signature_stays_on_disk(
    hub: HubSimulator, corpus: Path
) -> None:
    record = send(hub, corpus)
    assert record.key == Signer(hub.folder / "ann" / "identity").public_key
    (run,) = runs_of(hub, hub.folder / "ann")
    check_signature(record, run.signature.read_bytes())
    hub.merge()
    kept = hub.replica.repo.read(
        hub.replica.fetch_main(), accepted_signature_path(1, record.id), limit=10**4
    )
    assert kept == run.signature.read_bytes()


def test_a_key_that_signs_anew_each_time_still_sends_the_same_bytes(
    hub: HubSimulator, corpus: Path
) -> None:
    """ECDSA draws a number for each signature; hardware keys count."""
    key, home = key_file("ann", "ecdsa", 256), hub.folder / "ann"
    send(hub, corpus, dry_run=True, key=key)
    hub.path.rename(hub.folder / "away")
    with pytest.raises(HubError):
        resume(hub.url, home=home, key=key)
    (run,) = runs_of(hub, home)
    first = run.signature.read_bytes()
    (hub.folder / "away").rename(hub.path)
    resume(hub.url, home=home, key=key)
    assert run.signature.read_bytes() == first
    assert hub.codes() == []


def test_what_was_begun_with_one_key_is_not_sent_with_another(
    hub: HubSimulator, corpus: Path
) -> None:
    home = hub.folder / "ann"
    send(hub, corpus, dry_run=True)
    with pytest.raises(SigningError, match="begun with the key SHA256:") as caught:
        resume(hub.url, home=home, key=key_file("eve"))
    assert "--key" in caught.value.hint
    assert resume(hub.url, home=home).sent


def test_before_the_first_is_sent_it_is_said_that_it_stays_for_ever(
    hub: HubSimulator, corpus: Path
) -> None:
    home, first, second = hub.folder / "ann", Hearing(), Hearing()
    one = contribute(hub.url, [corpus], Options(seed=1), home=home, listener=first)
    (said,) = first.about("public")
    assert "permanent" in said
    assert fingerprint(one.contribution.key) in said
    hub.merge()
    contribute(hub.url, [corpus], Options(seed=1), home=home, listener=second)
    assert second.about("public") == second.about("again") == []


# One contribution per key and round.


def open_ids(hub: HubSimulator) -> list[str]:
    return [ref.rpartition("/")[2] for ref in hub.refs() if "/contribute/" in ref]


def test_a_second_one_on_the_same_round_is_refused_before_it_trains(
    hub: HubSimulator, corpus: Path
) -> None:
    home = hub.folder / "ann"
    first = contribute(hub.url, [corpus], Options(seed=1), home=home).contribution
    refs, stopper = hub.refs(), Stopper(1)
    with pytest.raises(Rejected, match="one per key and round") as refused:
        contribute(hub.url, [corpus], Options(seed=2), home=home, listener=stopper)
    assert first.id[:12] in str(refused.value)
    assert "--replace" in refused.value.hint
    assert (hub.refs(), stopper.steps) == (refs, [])
    assert len(list(runs_of(hub, home))) == 1  # nothing is left that --resume would go on with
    assert contribute(hub.url, [corpus], Options(seed=1), home=home).sent.again
    dry, hearing = Options(seed=2, dry_run=True), Hearing()
    contribute(hub.url, [corpus], dry, home=home, listener=hearing)
    assert "one per key and round" in hearing.about("again")[0]
    hub.merge()
    assert contribute(hub.url, [corpus], Options(seed=2), home=home).sent


def test_a_second_machine_with_the_same_key_is_refused_too(hub: HubSimulator, corpus: Path) -> None:
    key = key_file("ann")
    for name in ("bob", "eve"):
        hub.contribute(name, seed=len(name))
    contribute(hub.url, [corpus], Options(seed=1, key=key), home=hub.folder / "desk")
    with pytest.raises(Rejected, match="is open already"):
        contribute(hub.url, [corpus], Options(seed=2, key=key), home=hub.folder / "laptop")
    assert len(open_ids(hub)) == 3


def test_the_second_takes_the_place_of_the_first_in_one_step(
    hub: HubSimulator, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    home = hub.folder / "ann"
    first = contribute(hub.url, [corpus], Options(seed=1), home=home).contribution
    hub.look()
    again = Options(seed=2, replace=True)
    outcome = contribute(hub.url, [corpus], again, home=home)
    second = outcome.contribution
    assert outcome.withdrawn == first.id
    assert open_ids(hub) == [second.id]
    assert first.delta.ref not in hub.refs()
    assert hub.codes() == []
    with pytest.raises(Rejected, match="it was withdrawn"):
        contribute(hub.url, [corpus], Options(seed=1, replace=True), home=home)
    assert open_ids(hub) == [second.id]
    assert [entry.id for entry in hub.merge().built.record.contributions] == [second.id]
    monkeypatch.setenv("MOSHI_FL_HOME", str(home))
    assert main(["status", "--hub", hub.url, "--json"]) == 0
    told = {
        row["contribution"]: row for row in json.loads(capsys.readouterr().out)["contributions"]
    }
    assert told[first.id[:12]]["state"] == "replaced"


def test_what_was_withdrawn_by_hand_stands_in_nobodys_way(hub: HubSimulator, corpus: Path) -> None:
    home = hub.folder / "ann"
    first = contribute(hub.url, [corpus], Options(seed=1), home=home)
    hub.replica.repo.push([RefUpdate(first.sent.branch, None, ANY)])
    assert contribute(hub.url, [corpus], Options(seed=2), home=home).sent
    assert hub.codes() == []


def test_what_a_round_has_taken_cannot_be_replaced(hub: HubSimulator, corpus: Path) -> None:
    home = hub.folder / "ann"
    send(hub, corpus, dry_run=True, seed=2)
    contribute(hub.url, [corpus], Options(seed=1), home=home)
    hub.merge()
    refs = hub.refs()
    with pytest.raises(Rejected, match="is in round 1 already") as refused:
        resume(hub.url, home=home, replace=True)
    assert "--discard" in refused.value.hint
    assert hub.refs() == refs


def test_what_a_round_takes_in_the_moment_of_its_replacement_is_not_replaced(
    hub: HubSimulator, corpus: Path
) -> None:
    home = hub.folder / "ann"
    second = send(hub, corpus, dry_run=True, seed=2)
    first = send(hub, corpus, seed=1)
    place = (contribution_branch(0, first.id), first.delta.ref)
    seen = {ref: commit for ref, commit in hub.refs().items() if ref in place}
    replica, run = Replica(hub.url, home), runs_of(hub, home).resume()
    signature = signature_of(run.signature, second, own_signer(home, None))
    hub.merge()
    state, refs = replica.pull().state, hub.refs()
    with pytest.raises(PushRejected, match="nothing was pushed"):
        submit(replica, state, second, signature, run.delta, replica.repo, withdraw=seen)
    assert hub.refs() == refs


def test_who_sends_while_another_machine_does_is_told_and_keeps_the_work(
    hub: HubSimulator, corpus: Path
) -> None:
    key, desk, laptop = key_file("ann"), hub.folder / "desk", hub.folder / "laptop"

    class Meanwhile(Stopper):
        def stage(self, name: str, text: str) -> None:
            if name == "encode":
                contribute(hub.url, [corpus], Options(seed=1, key=key), home=desk)

    late = Options(seed=2, key=key)
    with pytest.raises(Rejected, match="is open already"):
        contribute(hub.url, [corpus], late, home=laptop, listener=Meanwhile(0))
    assert len(open_ids(hub)) == 1
    sent = resume(hub.url, home=laptop, key=key, replace=True)
    assert open_ids(hub) == [sent.contribution.id]


def test_two_of_one_key_on_one_machine_do_not_overtake_each_other(
    hub: HubSimulator, corpus: Path
) -> None:
    home, refusals = hub.folder / "ann", []

    class Impatient(Stopper):
        def step(self, progress: Progress) -> None:
            contribute(hub.url, [corpus], Options(seed=3, dry_run=True), home=home)
            with pytest.raises(MoshiError, match="another process is working on") as refused:
                contribute(hub.url, [corpus], Options(seed=2), home=home)
            refusals.append(refused.value)

    first = Options(seed=1, steps=1)
    sent = contribute(hub.url, [corpus], first, home=home, listener=Impatient(0))
    assert open_ids(hub) == [sent.contribution.id]
    assert "of this key to round 0" in str(refusals[0])
    assert "--resume" in refusals[0].hint


def test_the_command_says_what_it_withdrew(
    hub: HubSimulator, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.folder / "ann"))
    argv = ["contribute", "--hub", hub.url, "--data", str(corpus), "--steps", "1"]
    assert main([*argv, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert "withdrawn" not in first
    assert main([*argv, "--seed", "2", "--replace"]) == 0
    shown = capsys.readouterr()
    assert re.search(rf"^withdrawn +{first['contribution']}$", shown.out, re.MULTILINE)
    assert "this one is to take its place" in shown.err


def test_nobody_stands_in_the_way_of_anothers_key(hub: HubSimulator, corpus: Path) -> None:
    """Records that name Ann's key without her signature, garbage, and far too large a branch."""
    ann, home = key_file("ann"), hub.folder / "home"
    theirs = hub.contribute("eve")
    false = msgspec.structs.replace(theirs, key=Signer(ann).public_key)
    hub.push_record(false, key="eve")
    hub.push_record(msgspec.structs.replace(false, num_examples=2), data=b"{}")
    hub.push_record(msgspec.structs.replace(false, num_examples=3), signature=b"")
    elsewhere = msgspec.structs.replace(false, hub="f" * 16)
    hub.push_record(elsewhere, key="ann")
    first = contribute(hub.url, [corpus], Options(seed=1, key=ann), home=home)
    hub.push_record(false, key="eve", extra={"noise": os.urandom(3 << 20)})
    others = set(open_ids(hub)) - {first.contribution.id}
    again = Options(seed=2, key=ann)
    with pytest.raises(Rejected, match="is open already"):
        contribute(hub.url, [corpus], again, home=home)
    second = contribute(hub.url, [corpus], replace(again, replace=True), home=home)
    assert set(open_ids(hub)) == others | {second.contribution.id}


def test_who_replaces_their_own_takes_no_delta_from_others(hub: HubSimulator, corpus: Path) -> None:
    """Equal work lies on one ref, whoever has sent it."""
    home = hub.folder / "ann"
    first = contribute(hub.url, [corpus], Options(seed=1), home=home).contribution
    theirs = msgspec.structs.replace(first, key=signer_of("eve").public_key)
    hub.push_record(theirs, key="eve")
    second = contribute(hub.url, [corpus], Options(seed=2, replace=True), home=home).contribution
    assert sorted(open_ids(hub)) == sorted([theirs.id, second.id])
    assert hub.codes() == []


def test_the_carry_of_what_was_replaced_is_not_used(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path / "hub", delta={"codec": "topk"})
    corpus, home = write_corpus(tmp_path / "code"), hub.folder / "ann"
    contribute(hub.url, [corpus], Options(seed=1), home=home)
    alone = hub.folder / "bob"
    for where, how in ((home, {"replace": True}), (alone, {})):
        options = Options(seed=2, contributor="ann", **how)
        contribute(hub.url, [corpus], options, home=where)
    deltas = [ref for ref in hub.refs() if "/delta/" in ref]
    assert len(deltas) == 1  # bit for bit what it would have been without the first


def test_the_command_shows_who_signs_before_anything_is_sent(
    hub: HubSimulator, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.folder / "ann"))
    key, before = key_file("ann", "ecdsa", 256), hub.refs()
    argv = ["contribute", "--hub", hub.url, "--data", str(corpus), "--steps", "1", "--json"]
    assert main([*argv, "--key", str(key), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["key"] == Signer(key).fingerprint
    assert "permanent" in err
    assert hub.refs() == before
    assert main(["config", "set", "signing_key", str(key)]) == 0
    assert main(["contribute", "--resume", "--hub", hub.url]) == 0
    assert hub.codes() == []
    assert not (hub.folder / "ann" / "identity").exists()
