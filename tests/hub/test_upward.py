"""Hubs that contribute to another hub: what goes up, what comes down, and what an auditor finds."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta
from moshi_fl.errors import CorruptRecord, HubError, MoshiError, UntrustedHub
from moshi_fl.records import Round, dump
from moshi_fl.replica import Replica
from moshi_fl.rules import shapes_of
from moshi_fl.signing import CONTRIBUTION_NAMESPACE, fingerprint
from moshi_fl.snapshot import encode_step
from moshi_fl.store import Author, RefUpdate
from moshi_fl.strategies import find_strategy
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.upstream import Origin, origin_of
from moshi_fl.weights import count_parameters, open_weights, sha256_bytes, weights_digest
from moshi_hub import taking, upward
from moshi_hub.bridge import Bridge
from moshi_hub.cli import main as hub_command
from moshi_hub.heldout import evaluator_for, store_pool
from moshi_hub.keys import passphrase_from_environment
from moshi_hub.local import ANCHOR, key_folder, local_signer
from moshi_hub.merge import Options, Outcome, findings_on, merge, publish_round, push_round
from moshi_hub.opened import look
from moshi_hub.pending import NothingToMerge
from moshi_hub.propose import Proposal, draft, keyframe_files
from moshi_hub.review import sign_round
from moshi_hub.upward import Upward, encode_within, send
from moshi_sdk.audit import Auditor, Finding
from moshi_sdk.cli import main as sdk_command
from tests.support.children import Ended, Nursery
from tests.support.http_hub import Faults, serve
from tests.support.keys import signature_by, signer_of
from tests.support.simulator import HubSimulator, random_delta, write_corpus


@pytest.fixture
def upstream(tmp_path: Path) -> HubSimulator:
    hub = HubSimulator.copied(tmp_path / "upstream", delta={"codec": "f32"})
    hub.edit_settings('strategy = "robust"', 'strategy = "fedavg"')
    return hub


@pytest.fixture
def region(tmp_path: Path, upstream: HubSimulator) -> HubSimulator:
    return HubSimulator(tmp_path / "region", upstream=upstream.url)


def bridge_of(region: HubSimulator, upstream: HubSimulator) -> Bridge:
    return Bridge(region.replica, Replica(upstream.url, region.home))


def up(region: HubSimulator, upstream: HubSimulator) -> Upward | None:
    return send(bridge_of(region, upstream), region.home, lambda _: None)


def down(region: HubSimulator, upstream: HubSimulator, publish: bool = True) -> Outcome | None:
    return taking.take(
        bridge_of(region, upstream),
        Options(publish=publish),
        evaluator=lambda _: None,
        passphrase=passphrase_from_environment,
    )


def audit(hub: HubSimulator, upstream: HubSimulator | None = None) -> list[Finding]:
    replica = hub.person("auditor")
    other = Replica(upstream.url, hub.folder / "auditor") if upstream else None
    auditor = Auditor(replica, find_strategy=find_strategy, upstream=other)
    return list(auditor.audit(1, replica.look().newest.round))


def changes(hub: HubSimulator, first: int, last: int) -> dict[str, np.ndarray]:
    old, new = (hub.person("reader").pull(number).load() for number in (first, last))
    return {name: new[name] - old[name] for name in old}


def decoded(hub: HubSimulator, outcome: Outcome, number: int) -> dict[str, np.ndarray]:
    """What the only contribution of a published round says, by its delta on the hub."""
    record: Round = outcome.built.record
    repo, (merged,) = hub.replica.repo, record.contributions
    rules = record.update
    place = record.archive or rules.location
    repo.fetch({place.ref: "refs/test/delta"})
    data = repo.read(place.commit, f"{merged.id}.safetensors", limit=1 << 24)
    shapes = shapes_of(hub.person("reader").pull(number).load())
    delta = Delta.parse(data, shapes, get_codec(rules.codec, rules.codec_options), "delta")
    return {name: delta.decode(name) for name in delta.names}


# Beginning.


def test_a_hub_begins_with_another_hubs_newest_round_and_says_so(
    tmp_path: Path, upstream: HubSimulator
) -> None:
    upstream.rounds(2)
    region = HubSimulator(tmp_path / "region", upstream=upstream.url)
    above, below = upstream.sync(), region.sync()
    assert below.round == 0
    assert below.record.weights == above.record.weights
    assert below.state.tokenizer == above.state.tokenizer
    assert below.state.config.model == above.state.config.model
    assert below.state.config.hub.id != above.state.config.hub.id
    origin = origin_of(below.record)
    assert (origin.hub, origin.round) == (above.state.config.hub.id, 2)
    assert region.replica.repo.remote_refs()["refs/heads/main"]


def test_what_the_other_hub_has_settled_cannot_be_asked_for(
    tmp_path: Path, upstream: HubSimulator, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init", str(tmp_path / "x.git"), "--upstream", upstream.url, "--preset", "base"]
    assert hub_command(words) == 2
    assert "--preset and --upstream exclude each other" in capsys.readouterr().err
    assert not (tmp_path / "x.git").exists()


def test_a_hub_of_its_own_has_nobody_above(upstream: HubSimulator, tmp_path: Path) -> None:
    other = HubSimulator(tmp_path / "other")
    with pytest.raises(HubError, match="did not begin with another hub's round"):
        up(other, upstream)


def test_a_third_hub_is_not_the_one_above(region: HubSimulator, tmp_path: Path) -> None:
    other = HubSimulator(tmp_path / "other")
    with pytest.raises(HubError, match="stands on hub"):
        up(region, other)


# Up.


def test_what_goes_up_is_the_sum_of_the_rounds(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(3, contributors=2)
    wanted = changes(region, 0, 3)
    sent = up(region, upstream)
    assert sent
    assert (sent.passed.first, sent.passed.last) == (0, 3)
    assert sent.contribution.num_examples == 3 * 2 * 12
    assert sent.contribution.contributor == "region"
    outcome = upstream.merge()
    (merged,) = outcome.built.record.contributions
    assert merged.id == sent.contribution.id
    said = decoded(upstream, outcome, 0)
    assert all(np.array_equal(said[name], wanted[name]) for name in wanted)
    key = key_folder(region.home, region.sync().state.config.hub.id, ANCHOR) / "identity.pub"
    assert merged.owner == fingerprint(" ".join(key.read_text().split()[:2]))


def test_nothing_is_sent_twice(region: HubSimulator, upstream: HubSimulator) -> None:
    region.rounds(1)
    assert up(region, upstream)
    refs = upstream.refs()
    assert up(region, upstream) is None
    region.rounds(1)
    assert up(region, upstream) is None  # one contribution for each round of the other hub
    assert upstream.refs() == refs


def test_another_machine_of_the_region_sends_only_what_is_new(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(2)
    up(region, upstream)
    upstream.merge()
    region.rounds(1)
    second = region.maintainer("second")
    bridge = Bridge(second, Replica(upstream.url, second.home))
    sent = send(bridge, second.home, lambda _: None)
    assert sent
    assert (sent.passed.first, sent.passed.last) == (2, 3)
    assert up(region, upstream) is None
    assert len([ref for ref in upstream.refs() if "/contribute/" in ref]) == 1


def test_rounds_made_meanwhile_go_to_the_next_round(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(1)
    up(region, upstream)
    region.rounds(2)
    upstream.merge()
    sent = up(region, upstream)
    assert sent
    assert (sent.passed.first, sent.passed.last) == (1, 3)
    assert (sent.contribution.round, sent.contribution.rebased_from) == (1, 0)
    outcome = upstream.merge()
    wanted, said = changes(region, 1, 3), decoded(upstream, outcome, 1)
    assert all(np.array_equal(said[name], wanted[name]) for name in wanted)


def test_what_the_codec_could_not_say_goes_into_the_next(tmp_path: Path) -> None:
    upstream = HubSimulator(tmp_path / "upstream", delta={"codec": "topk"})
    upstream.edit_settings('strategy = "robust"', 'strategy = "fedavg"')
    region = HubSimulator(tmp_path / "region", upstream=upstream.url)
    said: dict[str, np.ndarray] = {}
    for number in range(3):
        region.rounds(1)
        assert up(region, upstream)
        parts = decoded(upstream, upstream.merge(), number)
        said = {n: said.get(n, 0) + parts.get(n, 0) for n in {*said, *parts}}
    carries = region.replica.folder.glob("upward/*/feedback/*.safetensors")
    newest = max(carries, key=lambda path: path.stat().st_mtime)
    rest, wanted = open_weights(newest), changes(region, 0, 3)
    for name, value in wanted.items():
        total = said.get(name, np.zeros_like(value)) + rest.get(name, 0)
        np.testing.assert_allclose(total, value, atol=1e-6)


def test_a_change_longer_than_the_other_hub_accepts_arrives_in_parts(
    upstream: HubSimulator,
) -> None:
    base = upstream.sync().load()
    rules = msgspec.structs.replace(upstream.sync().state.config.delta, max_norm=1.0)
    delta = random_delta(base, 4, scale=0.05)
    norm = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in delta.values()))
    assert norm > 2
    data, rest = encode_within(delta, None, rules, shapes_of(base))
    codec = get_codec(rules.codec, rules.options)
    sent = Delta.parse(data, shapes_of(base), codec, "delta")
    assert 0.9 < sent.norm() < 1.0
    for name, value in delta.items():
        np.testing.assert_allclose(sent.decode(name) + rest[name], value, atol=1e-6)


def test_what_the_contributors_of_a_region_propose_is_proposed_above(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    region.contribute("ann", seed=1, proposed_characters="éß")
    region.contribute("bob", seed=2, proposed_characters="é→")
    record = region.merge().built.record
    assert record.growth is None  # the other hub decides
    assert up(region, upstream).contribution.proposed_characters == "é"


# Down.


def test_the_other_hubs_round_becomes_this_hubs_own_bit_for_bit(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(2)
    up(region, upstream)
    upstream.contribute("someone", seed=77)
    upstream.merge()
    assert down(region, upstream)
    below, above = region.sync("newcomer"), upstream.sync()
    assert (below.round, below.record.weights) == (3, above.record.weights)
    assert weights_digest(below.load()) == above.record.weights
    assert region.person("reader").pull(2)  # the way there still leads through the updates
    assert down(region, upstream) is None
    region.rounds(1)
    findings = audit(region, upstream)
    assert [finding.identical for finding in findings] == [True] * 4
    assert [finding.origin is not None for finding in findings] == [False, False, True, False]


def test_nothing_is_taken_before_all_is_sent(region: HubSimulator, upstream: HubSimulator) -> None:
    region.rounds(1)
    upstream.rounds(1)
    assert down(region, upstream) is None
    up(region, upstream)
    assert down(region, upstream)


def test_a_round_that_came_meanwhile_is_not_dropped(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    upstream.rounds(1)
    bridge = bridge_of(region, upstream)
    assert bridge.to_take()
    region.rounds(1)
    with pytest.raises(HubError, match="round 1 was published meanwhile"):
        taking.take(
            bridge,
            Options(publish=True),
            evaluator=lambda _: None,
            passphrase=passphrase_from_environment,
        )
    assert region.sync().round == 1


def test_a_hub_with_taken_rounds_is_in_order(
    region: HubSimulator, upstream: HubSimulator, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.rounds(1)
    down(region, upstream)
    region.rounds(1)
    assert hub_command(["doctor", region.url]) == 0, capsys.readouterr().out


def test_open_contributions_stay_open_over_a_taken_round(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    upstream.rounds(1)
    late = region.contribute("slow", seed=5)
    assert down(region, upstream)
    outcome = region.merge()
    assert [merged.id for merged in outcome.built.record.contributions] == [late.id]
    assert outcome.built.record.contributions[0].base_round == 0
    assert [finding.identical for finding in audit(region, upstream)] == [True, True]


def test_a_vocabulary_that_grew_above_grows_below(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(1)
    old = region.contribute("slow", seed=9)
    upstream.contribute("ann", seed=1, proposed_characters="é")
    upstream.contribute("bob", seed=2, proposed_characters="é")
    upstream.merge()
    sent = up(region, upstream)  # made of the shorter vocabulary
    assert sent
    upstream.merge()
    upstream.rounds(1)
    assert down(region, upstream)
    below, above = region.sync("newcomer"), upstream.sync()
    assert below.record.weights == above.record.weights
    assert below.record.growth.characters == "é"
    assert below.state.tokenizer == above.state.tokenizer
    outcome = region.merge()
    assert [merged.id for merged in outcome.built.record.contributions] == [old.id]
    assert outcome.built.record.contributions[0].missing_rows == 1
    assert [finding.identical for finding in audit(region, upstream)] == [True] * 3
    assert [finding.identical for finding in audit(upstream)] == [True] * 3


def test_a_taken_round_can_be_proposed_signed_and_published(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    upstream.rounds(1)
    assert down(region, upstream, publish=False)
    assert region.sync().round == 0
    signed = sign_round(region.replica, upstream=Replica(upstream.url, region.home))
    assert signed.record.round == 1
    record, leftovers = publish_round(region.replica)
    assert (origin_of(record).round, leftovers) == (1, "")
    assert region.sync().record.weights == upstream.sync().record.weights


# Lies.


def lie(region: HubSimulator, upstream: HubSimulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The region takes other weights than those that the other hub has, and says it does not."""
    honest = taking._proposal

    def falsify(bridge, found, origin, growth, folder, evaluate):
        proposal = honest(bridge, found, origin, growth, folder, evaluate)
        weights = {name: array.copy() for name, array in proposal.weights.items()}
        weights["fc_out.bias"][0] += np.float32(1e-3)
        out = folder / "lie"
        out.mkdir()
        base = found.snapshot.load()
        files = tuple(out / file.name for file in encode_step(base, weights, out))
        false = msgspec.structs.replace(origin, weights=weights_digest(weights))
        record = msgspec.structs.replace(
            proposal.record, weights=false.weights, strategy=false.strategy
        )
        return replace(proposal, record=record, weights=weights, update_files=files)

    with monkeypatch.context() as patch:
        patch.setattr(taking, "_proposal", falsify)
        down(region, upstream)


def test_a_region_that_takes_other_weights_than_it_says_is_found_out(
    region: HubSimulator, upstream: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.rounds(1)
    lie(region, upstream, monkeypatch)
    (finding,) = audit(region)
    assert finding.identical  # by itself it is consistent: its word is shown as such
    assert finding.origin
    (finding,) = audit(region, upstream)
    assert finding.identical is False
    assert "is not round 1 of" in finding.problem


def forge(
    hub: HubSimulator,
    origin: Origin,
    weights: dict[str, np.ndarray],
    publisher: Replica | None = None,
) -> None:
    """Propose weights under the name of another hub's round, without any key of this hub.

    With the keys of a publisher, it is published at once.
    """
    replica, options = publisher or hub.person("eve"), Options(publish=publisher is not None)
    with replica.workspace() as folder:
        found = look(replica, folder)
        snapshot = found.snapshot
        record = draft(snapshot.state, found.rules, (), origin.strategy)
        update = msgspec.structs.replace(record.update, kind="step")
        count = count_parameters(weights)
        record = msgspec.structs.replace(
            record, weights=origin.weights, parameters=count, update=update
        )
        out, base = folder / "step", snapshot.load()
        out.mkdir()
        reached = weights if shapes_of(base) == shapes_of(weights) else base
        files = tuple(out / file.name for file in encode_step(base, reached, out))
        # Where no step leads there, only who begins with the keyframe sees what was made.
        whole = () if reached is weights else keyframe_files(weights, folder / "keyframe")
        config, tokenizer = found.rules.config, snapshot.state.tokenizer
        proposal = Proposal(record, config, tokenizer, reached, {}, folder / "deltas", files, whole)
        findings = findings_on(replica, found, proposal, [], None)
        push_round(replica, found, findings, options, passphrase_from_environment)


def filled(hub: HubSimulator, value: float) -> dict[str, np.ndarray]:
    return {name: np.full_like(array, value) for name, array in hub.sync().load().items()}


def test_weights_that_only_call_themselves_another_hubs_are_not_signed(
    region: HubSimulator, upstream: HubSimulator, tmp_path: Path
) -> None:
    upstream.rounds(1)
    evil = filled(region, 0.5)
    there, other = upstream.sync().state.config.hub.id, Replica(upstream.url, region.home)
    forged = Origin(hub=there, round=1, weights=weights_digest(evil))
    alone = HubSimulator(tmp_path / "alone")
    cases = [
        (alone, forged, other, "did not begin with another hub's"),
        (region, msgspec.structs.replace(forged, hub="f" * 16), other, "stands on hub"),
        (region, msgspec.structs.replace(forged, round=0), other, "has taken round 0 already"),
        (region, forged, None, "by its own word only"),
        (region, forged, other, "is not round 1 of"),
        (region, msgspec.structs.replace(forged, round=7), other, "is not round 7 of"),
    ]
    for hub, origin, compared, said in cases:
        forge(hub, origin, evil)
        proposal = hub.refs()["refs/moshi/next/1"]
        with pytest.raises(UntrustedHub, match=said):
            sign_round(hub.replica, upstream=compared)
        assert hub.refs()["refs/moshi/next/1"] == proposal


def test_a_taken_round_gets_a_signature_only_beside_the_hub_that_it_is_of(
    region: HubSimulator, upstream: HubSimulator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MOSHI_FL_HOME", str(region.home))
    upstream.rounds(1)
    true = upstream.sync()
    there = true.state.config.hub.id
    origin = Origin(hub=there, round=1, weights=true.record.weights)
    forge(region, origin, dict(true.load()))
    assert hub_command(["publish", "--hub", region.url, "--upstream", upstream.url]) == 2
    assert "--upstream is for --sign" in capsys.readouterr().err
    words = ["publish", "--hub", region.url, "--sign"]
    assert hub_command(words) == 1
    said = capsys.readouterr().err
    assert "by its own word only" in said
    assert "--upstream URL" in said
    assert region.sync().round == 0
    assert hub_command(["sign", "--hub", region.url]) == 1
    assert hub_command([*words, "--upstream", upstream.url]) == 0
    assert region.sync().record.weights == true.record.weights


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "holds a value that is not finite"),
        (3e38, "the held-out loss of the proposed round is"),
    ],
)
def test_an_upstream_whose_weights_are_no_model_does_not_stop_its_regions(
    region: HubSimulator, upstream: HubSimulator, tmp_path: Path, value: float, said: str
) -> None:
    state = region.replica.look()
    held = write_corpus(tmp_path / "held")
    store_pool(region.replica, state.config, state.tokenizer, [held])
    evil = filled(upstream, value)
    origin = Origin(hub="f" * 16, round=7, weights=weights_digest(evil))
    forge(upstream, origin, evil, upstream.replica)
    assert upstream.sync().round == 1
    refs = region.refs()
    with pytest.raises(HubError, match=said):
        taking.take(
            bridge_of(region, upstream),
            Options(publish=True),
            evaluator=evaluator_for(region.replica),
            passphrase=passphrase_from_environment,
        )
    assert region.refs() == refs
    assert region.sync().round == 0


def test_an_upstream_with_a_model_of_other_shapes_is_refused(
    region: HubSimulator, upstream: HubSimulator, tmp_path: Path
) -> None:
    evil = filled(upstream, 0.5)
    evil["fc_out.bias"] = np.zeros((3, 3), np.float32)
    origin = Origin(hub="f" * 16, round=7, weights=weights_digest(evil))
    forge(upstream, origin, evil, upstream.replica)
    with pytest.raises(HubError, match=r"'fc_out.bias' is \(3, 3\) instead of"):
        taking.take(
            Bridge(region.replica, Replica(upstream.url, tmp_path / "fresh")),
            Options(publish=True),
            evaluator=lambda _: None,
            passphrase=passphrase_from_environment,
        )
    assert region.sync().round == 0
    with pytest.raises(CorruptRecord, match=r"fc_out.bias is float32 \[3, 3\] instead of"):
        HubSimulator(tmp_path / "another", upstream=upstream.url)
    assert not (tmp_path / "another" / "hub.git").exists()


def test_weights_that_are_not_finite_are_not_signed(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    evil = filled(upstream, float("nan"))
    there = upstream.sync().state.config.hub.id
    origin = Origin(hub="f" * 16, round=7, weights=weights_digest(evil))
    forge(upstream, origin, evil, upstream.replica)
    forge(region, Origin(hub=there, round=1, weights=origin.weights), evil)
    with pytest.raises(UntrustedHub, match="is not finite"):
        sign_round(region.replica, upstream=Replica(upstream.url, region.home))


def test_a_region_that_takes_the_weights_with_another_tokenizer_is_found_out(
    region: HubSimulator, upstream: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.rounds(1)
    honest = taking._proposal

    def falsify(*how):
        proposal = honest(*how)
        known = CharVocabulary.from_bytes(proposal.tokenizer)
        tokenizer = replace(known, characters=known.characters[::-1]).to_bytes()
        record = msgspec.structs.replace(proposal.record, tokenizer=sha256_bytes(tokenizer))
        return replace(proposal, record=record, tokenizer=tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(taking, "_proposal", falsify)
        down(region, upstream, publish=False)
    with pytest.raises(UntrustedHub, match="is not round 1 of"):
        sign_round(region.replica, upstream=Replica(upstream.url, region.home))
    publish_round(region.replica)
    (finding,) = audit(region, upstream)
    assert finding.identical is False
    assert "is not round 1 of" in finding.problem


def test_a_region_that_began_elsewhere_than_it_says_is_found_out(
    region: HubSimulator, tmp_path: Path
) -> None:
    region.rounds(1)
    other = HubSimulator(tmp_path / "other")
    (finding,) = audit(region, other)
    assert finding.identical is False
    assert "round 0 takes a round of hub" in finding.problem


def test_whose_weights_a_hub_begins_with_is_compared_before_it_has_a_round(
    region: HubSimulator, upstream: HubSimulator, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "auditor"))
    words = ["audit", "--hub", region.url]
    there = upstream.sync().state.config.hub.id
    assert sdk_command(words) == 0
    assert f"round 0 of hub {there}, by this hub's word" in capsys.readouterr().err
    assert sdk_command([*words, "--all", "--upstream", upstream.url]) == 0
    assert f"round 0 of hub {there}, as {upstream.url} has it" in capsys.readouterr().err
    assert sdk_command(["audit", "--hub", upstream.url]) == 0
    assert "no other hub's weights" in capsys.readouterr().err
    other = HubSimulator(tmp_path / "other")
    assert sdk_command([*words, "--upstream", other.url]) == 1
    assert f"round 0 takes a round of hub {there}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "0" * 64}, "its weights are not those"),
        ({"contributions": "some"}, "contributions of its own"),
        ({"options": {"hub": "x"}}, "its options"),
    ],
)
def test_a_record_that_only_claims_to_take_a_round_is_refused(
    region: HubSimulator, upstream: HubSimulator, change: dict[str, object], said: str
) -> None:
    region.rounds(1)
    upstream.rounds(1)
    up(region, upstream)
    record = down(region, upstream).built.record
    made = region.replica.chain(region.replica.look(), 1)[0]
    if "options" in change:
        strategy = msgspec.structs.replace(record.strategy, options=change["options"])
        change = {"strategy": strategy}
    elif "contributions" in change:
        change = {"contributions": made.contributions}
    with pytest.raises(UntrustedHub, match=said):
        origin_of(msgspec.structs.replace(record, **change))


# A round that is proposed.


def proposed(region: HubSimulator) -> str:
    return region.refs()["refs/heads/round/1"]


def test_what_is_proposed_is_not_proposed_again_until_there_is_more_to_take(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    upstream.rounds(1)
    first = down(region, upstream, publish=False)
    sign_round(region.replica, upstream=region.replica.beside(upstream.url))
    signed = region.refs()
    with pytest.raises(NothingToMerge, match="round 1 is proposed already"):
        down(region, upstream, publish=False)
    region.contribute("ann", seed=5)
    with pytest.raises(NothingToMerge, match="another hub's round"):
        merge(region.replica, Options(if_ready=True), evaluator=lambda _: None)
    names = [name for name in signed if "next" in name or "round/" in name]
    assert len(names) == 2
    assert {name: region.refs()[name] for name in names} == {name: signed[name] for name in names}
    upstream.rounds(1)
    second = down(region, upstream, publish=False)
    assert second.built.record.weights != first.built.record.weights
    assert proposed(region) != signed["refs/heads/round/1"]


def test_a_round_that_is_merged_and_waits_is_not_replaced(
    region: HubSimulator, upstream: HubSimulator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    upstream.rounds(1)
    region.contribute("ann", seed=5)
    merge(region.replica, Options(publish=False), evaluator=lambda _: None)
    commit = proposed(region)
    repo = region.replica.repo
    main = region.refs()["refs/heads/main"]
    repo.push([RefUpdate("refs/heads/main", commit, main)])  # its pull request is merged
    monkeypatch.setenv("MOSHI_FL_HOME", str(region.home))
    assert hub_command(["upward", "--hub", region.url, "--upstream", upstream.url]) == 0
    assert "Nothing to take: round 1 is merged and waits" in capsys.readouterr().err
    assert proposed(region) == commit


# Two machines.


def another_machine(region: HubSimulator, home: Path) -> Path:
    """A home with the keys of the region's, and nothing else."""
    for name in ("keys", "evaluators"):
        shutil.copytree(region.home / name, home / name)
    return home


def test_what_lies_ready_is_not_sent_after_another_machine_sent_more(
    tmp_path: Path, region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(1)
    here = bridge_of(region, upstream)
    key = local_signer(region.home, here.below.state.config.hub.id, ANCHOR).public_key
    left = upward._prepare(here, key, lambda _: None)  # and here it was killed
    assert (left.passed.first, left.passed.last) == (0, 1)
    region.contribute("zed", seed=77)
    region.merge()
    upstream.rounds(1)
    home = another_machine(region, tmp_path / "other")
    replicas = (Replica(hub.url, home) for hub in (region, upstream))
    there = send(Bridge(*replicas), home, lambda _: None)
    assert (there.passed.first, there.passed.last) == (0, 2)
    assert up(region, upstream) is None
    assert len(upstream.look().verdicts) == 1
    upstream.merge()
    assert up(region, upstream) is None
    assert bridge_of(region, upstream).passed() == there.passed


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_delta_that_is_not_as_it_was_made_is_not_sent_and_can_be_made_anew(
    region: HubSimulator, upstream: HubSimulator, damage: str
) -> None:
    region.rounds(1)
    here = bridge_of(region, upstream)
    key = local_signer(region.home, here.below.state.config.hub.id, ANCHOR).public_key
    upward._prepare(here, key, lambda _: None)  # and here it was killed
    work = here.folder / "work"
    delta = work / "delta.safetensors"
    delta.unlink() if damage == "missing" else delta.write_bytes(delta.read_bytes() + b" ")
    with pytest.raises(MoshiError) as refused:
        up(region, upstream)
    command, _, _ = refused.value.hint.partition("   ")
    assert shlex.split(command) == ["rm", "-r", str(work)]
    shutil.rmtree(work)
    assert up(region, upstream).passed.last == 1


def ready(region: HubSimulator, upstream: HubSimulator) -> Bridge:
    """A machine that has prepared what is unsent, and was killed then."""
    bridge = bridge_of(region, upstream)
    key = local_signer(region.home, bridge.below.state.config.hub.id, ANCHOR).public_key
    upward._prepare(bridge, key, lambda _: None)
    return bridge


def claimed(region: HubSimulator, upstream: HubSimulator) -> Bridge:
    """A machine that has said on the hub what it sends, and was killed then."""
    bridge = ready(region, upstream)
    signer = local_signer(region.home, bridge.below.state.config.hub.id, ANCHOR)
    upward._claim(bridge, upward._at_hand(bridge), signer)
    return bridge


def elsewhere(region: HubSimulator, upstream: HubSimulator, home: Path) -> Upward | None:
    """Another machine of the region sends."""
    if not home.exists():
        another_machine(region, home)
    replicas = (Replica(hub.url, home) for hub in (region, upstream))
    return send(Bridge(*replicas), home, lambda _: None)


def test_of_two_machines_that_prepare_at_once_one_sends(
    tmp_path: Path, region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(1)
    slow = ready(region, upstream)
    assert slow.told.waiting is None  # it has looked, and then another one is faster
    region.rounds(1)
    sent = elsewhere(region, upstream, tmp_path / "other")
    signer = local_signer(region.home, slow.below.state.config.hub.id, ANCHOR)
    with pytest.raises(HubError, match="another machine sends this hub's rounds"):
        upward._claim(slow, upward._at_hand(slow), signer)
    assert up(region, upstream) is None
    (verdict,) = upstream.look().verdicts
    assert verdict.contribution == sent.contribution


def test_what_waits_is_sent_by_whoever_comes_next(
    tmp_path: Path, region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(1)
    left = claimed(region, upstream).told.waiting
    region.rounds(1)
    there = elsewhere(region, upstream, tmp_path / "other")
    assert (there.contribution, there.passed) == (left.contribution, left.passed)
    assert up(region, upstream) is None  # noted as sent, by the other
    upstream.merge()
    rest = up(region, upstream)
    assert (rest.passed.first, rest.passed.last) == (1, 2)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_what_waits_is_sent_whole_whatever_happened_to_it_here(
    region: HubSimulator, upstream: HubSimulator, damage: str
) -> None:
    region.rounds(1)
    bridge = claimed(region, upstream)
    path = bridge.folder / "work" / "delta.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(b"x")
    sent = up(region, upstream)
    assert sent.contribution == bridge.told.waiting.contribution
    assert upstream.codes() == []
    assert len(upstream.merge().built.record.contributions) == 1


def test_a_machine_that_wakes_up_late_sends_nothing_again(
    tmp_path: Path, region: HubSimulator, upstream: HubSimulator
) -> None:
    """It has claimed, and slept while others sent that, and the next, and the other hub merged."""
    region.rounds(1)
    sleeper = claimed(region, upstream)
    assert sleeper.above.round == 0
    elsewhere(region, upstream, tmp_path / "other")
    upstream.merge()
    region.rounds(1)
    elsewhere(region, upstream, tmp_path / "other")
    upstream.merge()
    key = sleeper.told.waiting.contribution.key
    with pytest.raises(HubError, match="another machine sends"):
        upward._deliver(sleeper, key)
    assert upstream.codes() == ["replay"] or upstream.codes() == []
    assert [v for v in upstream.look().verdicts if v.accepted] == []
    assert bridge_of(region, upstream).first_unsent() == 2


def test_what_has_waited_for_too_long_is_made_anew_with_all_its_rounds(
    region: HubSimulator, upstream: HubSimulator
) -> None:
    region.rounds(1)
    old = claimed(region, upstream).told.waiting
    upstream.rounds(3)  # its base is too old for the other hub now
    region.rounds(1)
    sent = up(region, upstream)
    assert (sent.passed.first, sent.passed.last) == (0, 2)
    assert sent.contribution.id != old.contribution.id
    assert [v.contribution.id for v in upstream.look().verdicts if v.accepted] == [sent.passed.id]


@pytest.mark.parametrize("planted", ["foreign", "unsigned", "garbage", "changed", "empty"])
def test_what_somebody_planted_is_not_sent(
    region: HubSimulator, upstream: HubSimulator, planted: str
) -> None:
    region.rounds(1)
    bridge = claimed(region, upstream)
    told, repo, ref = bridge.told, region.replica.repo, "refs/moshi/upward"
    waiting, folder = told.waiting, bridge.folder / "work"
    signature, delta = ((folder / n).read_bytes() for n in ("record.sig", "delta.safetensors"))
    data = b"{"
    if planted != "garbage":
        entry = waiting.contribution
        if planted == "foreign":
            entry = msgspec.structs.replace(entry, key=signer_of("eve").public_key)
        if planted == "unsigned":
            entry = msgspec.structs.replace(entry, num_examples=1 << 40)
        if planted == "empty":
            nothing = msgspec.structs.replace(entry.delta, files=())
            entry = msgspec.structs.replace(entry, delta=nothing)
        delta = delta + b" " if planted == "changed" else delta
        passed = msgspec.structs.replace(waiting.passed, id=entry.id)
        data = dump(msgspec.structs.replace(waiting, passed=passed, contribution=entry))
        if planted == "foreign":
            signature = signature_by("eve", dump(entry), CONTRIBUTION_NAMESPACE).encode()
    files = {"prepared.json": data, "record.sig": signature, "delta.safetensors": delta}
    tree = repo.tree({name: repo.put(content) for name, content in files.items()})
    commit = repo.commit(tree, message="x\n", author=Author("eve", "e@x"), when=0)
    repo.push([RefUpdate(ref, commit, told.commit)])
    shutil.rmtree(folder)
    before = upstream.refs()
    with pytest.raises(MoshiError) as refused:
        up(region, upstream)
    assert f"delete {ref}" in refused.value.hint
    assert f":{ref}" in refused.value.hint
    assert upstream.refs() == before
    repo.push([RefUpdate(ref, None, commit)])  # as the message says
    assert up(region, upstream).contribution.key == waiting.contribution.key
    assert len(upstream.look().verdicts) == 1


@pytest.mark.parametrize("kind", ["file", "folder", "stranger"])
def test_what_is_no_note_at_all_on_its_ref_is_named_with_the_way_out(
    region: HubSimulator, upstream: HubSimulator, kind: str
) -> None:
    region.rounds(1)
    repo, ref = region.replica.repo, "refs/moshi/upward"
    repo.prepare()
    blob = repo.put(b"hello")
    tree = repo.tree({"hello.txt": blob})
    stranger = repo.commit(tree, message="x\n", author=Author("eve", "e@x"), when=0)
    repo.push([RefUpdate(ref, {"file": blob, "folder": tree, "stranger": stranger}[kind], None)])
    with pytest.raises(MoshiError, match=ref) as refused:
        up(region, upstream)
    assert f"delete {ref}" in refused.value.hint


# The command, and its deaths.


class Scene:
    """An upstream and a region with one round to send; put back as often as wanted."""

    def __init__(self, upstream: HubSimulator, region: HubSimulator, commands: Nursery) -> None:
        self.upstream, self.region, self.commands = upstream, region, commands

    def keep(self, folder: Path) -> None:
        for hub in (self.upstream, self.region):
            shutil.copytree(hub.folder, folder / hub.folder.name)

    def put_back(self, folder: Path) -> None:
        for hub in (self.upstream, self.region):
            shutil.rmtree(hub.folder)
            shutil.copytree(folder / hub.folder.name, hub.folder)

    def upward(self, **how: object) -> Ended:
        words = ("moshi-hub", "upward", "--publish", "--hub", self.region.url)
        words += ("--upstream", self.upstream.url, "--json")
        return self.commands.run(*words, home=self.region.home, **how)


@pytest.mark.slow
def test_an_upward_run_killed_at_every_write_in_turn_sends_once_and_takes_once(
    region: HubSimulator, upstream: HubSimulator, commands: Nursery
) -> None:
    scene = Scene(upstream, region, commands)
    region.rounds(1)
    upstream.rounds(1)  # so that there is something to send, and something to take
    deaths = 0
    while (ended := scene.upward(kill_at=deaths + 1)).was_killed:
        deaths += 1
    assert ended.status == 0, ended.err
    assert deaths > 10
    assert len([ref for ref in upstream.refs() if "/contribute/" in ref]) == 1
    assert region.sync().round == 2
    assert [finding.identical for finding in audit(region, upstream)] == [True, True]
    outcome = upstream.merge()
    assert len(outcome.built.record.contributions) == 1
    left = [path.name for path in region.replica.folder.glob("upward/*/*")]
    assert "work" not in left


@pytest.mark.slow
def test_a_machine_killed_at_any_moment_while_another_sends_counts_no_round_twice_or_never(
    tmp_path: Path, region: HubSimulator, upstream: HubSimulator, commands: Nursery
) -> None:
    """At each write of an upward run after which anything has left it; then another machine sends.

    In between, the other hub makes a round of what has come, and the region makes another round.
    """
    region.rounds(1)
    local_signer(region.home, region.sync().state.config.hub.id, ANCHOR)  # both machines have it
    scene, start = Scene(upstream, region, commands), upstream.sync().load()
    start = {name: array.copy() for name, array in start.items()}
    scene.keep(tmp_path / "kept")
    events = scene.upward(trace=True).events
    pushes = [n for n, event in enumerate(events, 1) if event.startswith("git push")]
    assert len(pushes) == 3  # it is claimed, sent, noted
    came = []
    for moment in range(pushes[0], len(events) + 1):
        scene.put_back(tmp_path / "kept")
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        assert scene.upward(kill_at=moment).was_killed
        came.append(bool(upstream.look().verdicts))
        if came[-1]:
            upstream.merge()
        region.rounds(1)
        for _ in range(2):
            elsewhere(region, upstream, tmp_path / "other")
            if upstream.look().verdicts:
                upstream.merge()
        assert up(region, upstream) is None
        weights = upstream.sync("checker").load()
        for name, value in changes(region, 0, 2).items():
            np.testing.assert_allclose(weights[name] - start[name], value, atol=1e-6)
    assert came == sorted(came)
    assert came.count(True) == len(events) - pushes[1]


def test_two_machines_at_the_same_moment_send_once(
    tmp_path: Path, region: HubSimulator, upstream: HubSimulator, commands: Nursery
) -> None:
    local_signer(region.home, region.sync().state.config.hub.id, ANCHOR)
    region.rounds(1)
    homes = [region.home, another_machine(region, tmp_path / "other")]
    words = ("moshi-hub", "upward", "--publish", "--hub", region.url)
    words += ("--upstream", upstream.url, "--json")
    both = [commands.start(*words, home=home) for home in homes]
    ended = [child.wait() for child in both]
    assert 0 in {one.status for one in ended}
    for one in ended:
        assert not one.status or "another machine sends this hub's rounds" in one.err
    assert len(upstream.look().verdicts) == 1
    assert bridge_of(region, upstream).first_unsent() == 1


def test_the_command_sends_and_takes_and_then_has_nothing_to_do(
    region: HubSimulator, upstream: HubSimulator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MOSHI_FL_HOME", str(region.home))
    words = ["upward", "--hub", region.url, "--upstream", upstream.url, "--publish", "--json"]
    region.rounds(1)
    upstream.rounds(1)
    capsys.readouterr()
    assert hub_command(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rounds"], said["upstream_round"], said["round"], said["taken"]) == (1, 1, 2, 1)
    assert hub_command(words) == 0
    assert json.loads(capsys.readouterr().out) == {"unsent": 0, "upstream_round": 1}
    command = ["audit", "--hub", region.url, "--all", "--upstream", upstream.url, "--json"]
    assert sdk_command(command) == 0
    rows = json.loads(capsys.readouterr().out)["rounds"]
    assert [row["upstream"] and row["upstream"]["round"] for row in rows] == [None, 1]


def test_the_token_for_a_hub_is_not_shown_to_the_server_of_the_other(
    tmp_path: Path, region: HubSimulator, upstream: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(region.home))
    monkeypatch.setenv("MOSHI_FL_TOKEN", "the-regions-own")
    upstream.rounds(1)
    seen = Faults()
    with serve(upstream.folder, faults=seen) as base:
        url = f"{base}/{Path(upstream.url).name}"
        here = ("--hub", region.url)
        assert hub_command(["upward", *here, "--upstream", url, "--publish"]) == 0
        assert sdk_command(["audit", *here, "--upstream", url]) == 0
        assert hub_command(["init", str(tmp_path / "x.git"), "--upstream", url]) == 0
    assert len(seen.seen) > 3
    assert not seen.logins


# Two tiers, with training.


class Tiers:
    """An upstream and two regions with two contributors each, who really train."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.held = write_corpus(folder / "held", files=4)
        self.upstream = HubSimulator(folder / "upstream", training={"steps": 15, "batch_size": 8})
        self.upstream.edit_settings('strategy = "robust"', 'strategy = "fedavg"')
        names = {"west": ("ann", "bob"), "east": ("cat", "dan")}
        self.regions = {
            name: (HubSimulator(folder / name, upstream=self.upstream.url), people)
            for name, people in names.items()
        }
        for hub, _ in self.regions.values():  # what evaluators say of a round is told elsewhere
            hub.edit_settings("[evaluation]\n", "[evaluation]\ngate = false\n")
        self.losses: dict[str, list[tuple[float, float]]] = {}

    def command(self, home: Path, *words: str) -> None:
        self._patch.setenv("MOSHI_FL_HOME", str(home))
        run = sdk_command if words[0] == "contribute" else hub_command
        assert run([*words, "--quiet"]) == 0

    def merge(self, hub: HubSimulator) -> None:
        data = ("--eval-data", str(self.held))
        self.command(hub.home, "merge", "--publish", "--hub", hub.url, *data)
        found = hub.replica.look().newest.evaluation
        self.losses.setdefault(hub.folder.name, []).append((found.before, found.after))

    def round_below(self, name: str) -> None:
        hub, people = self.regions[name]
        for number, person in enumerate(people):
            data = self.folder / f"data-{person}"
            if not data.exists():
                write_corpus(data, files=2 + number)
            words = ("contribute", "--hub", hub.url, "--contributor", person, "--data", str(data))
            self.command(self.folder / f"home-{person}", *words)
        self.merge(hub)

    def upward(self, name: str) -> None:
        hub, _ = self.regions[name]
        to = ("--upstream", self.upstream.url)
        self.command(hub.home, "upward", "--publish", "--hub", hub.url, *to)

    def round_above(self) -> None:
        for name in ("west", "west", "east"):
            self.round_below(name)
        for name in self.regions:
            self.upward(name)
        self.merge(self.upstream)
        for name in self.regions:
            self.upward(name)


@pytest.mark.slow
def test_two_regions_under_one_hub_learn_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiers of rounds: held-out loss falls in the regions, and above them."""
    tiers = Tiers(tmp_path, monkeypatch)
    tiers.round_above()
    tiers.round_above()
    above = tiers.upstream.replica.chain(tiers.upstream.replica.look(), 1)
    assert [len(record.contributions) for record in above] == [2, 2]
    for name, number in (("west", 6), ("east", 4)):
        region, _ = tiers.regions[name]
        assert region.sync().round == number
        assert region.sync().record.weights == above[-1].weights
        assert all(finding.identical for finding in audit(region, tiers.upstream))
    assert all(finding.identical for finding in audit(tiers.upstream))
    for name, found in tiers.losses.items():
        assert all(after < before for before, after in found), (name, found)
        assert found[-1][1] < found[0][0] - 0.05, (name, found)
