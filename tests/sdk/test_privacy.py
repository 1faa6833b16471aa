"""``contribute --dp``: what the record says, what the ledger spends, and what stays at home."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from moshi_fl.errors import ConfigError, CorruptRecord, MoshiError
from moshi_fl.records import Privacy
from moshi_fl.replica import Replica
from moshi_fl.weights import open_weights
from moshi_sdk.cli import main
from moshi_sdk.contribute import Options, contribute, discard, resume
from moshi_sdk.privacy import Account, Ledger, PrivacyOptions
from moshi_sdk.runs import Runs
from tests.support.children import Nursery
from tests.support.simulator import HubSimulator, write_corpus

pytest.importorskip("opacus", reason="needs the extra dp (pip install 'moshi-fl[dp]')")

HUB = "0123456789abcdef"
DP = PrivacyOptions()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A source tree of some hundred windows."""
    return write_corpus(tmp_path / "code", files=12)


class Hears:
    """A listener that keeps what it hears, and may interrupt."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stages: list[tuple[str, str]] = []
        self._stop_at = stop_at

    def stage(self, name: str, text: str) -> None:
        self.stages.append((name, text))

    def step(self, progress) -> None:
        if progress.step == self._stop_at:
            raise KeyboardInterrupt

    def said(self, name: str) -> str:
        return "\n".join(text for stage, text in self.stages if stage == name)


def send(hub: HubSimulator, corpus: Path, *, listener=None, **options):
    chosen = Options(**{"seed": 1, "contributor": "ann", "privacy": DP} | options)
    home = hub.folder / "ann"
    return contribute(hub.url, [corpus], chosen, home=home, listener=listener).contribution


def ledger(hub: HubSimulator) -> Ledger:
    config = hub.sync("ann").state.config
    return Account(hub.folder / "ann", config.hub.id).read()


def asked(epsilon: float = 1.0, **fields) -> Privacy:
    given = {
        "mechanism": "dp-sgd", "noise_multiplier": 1.0, "max_gradient_norm": 1.0,
        "sample_rate": 0.01, "steps": 200, "delta": 1e-5, "epsilon": epsilon, "accountant": "prv",
        "unit": "window",
    }  # fmt: skip
    return Privacy(**given | fields)


# The record.


def test_the_record_says_what_was_done_and_nothing_that_follows_from_data(
    hub: HubSimulator, corpus: Path
) -> None:
    (corpus / "odd.py").write_text("é" * 90)
    record = send(hub, corpus)
    stated = record.privacy
    assert stated
    assert (stated.mechanism, stated.accountant, stated.unit) == ("dp-sgd", "prv", "window")
    assert (stated.noise_multiplier, stated.max_gradient_norm, stated.delta) == (1.0, 1.0, 1e-5)
    assert stated.steps == record.training.steps == 3
    assert 0 < stated.epsilon < 8
    assert record.metrics.held_out_before is record.metrics.held_out_after is None
    assert record.proposed_characters == ""
    assert record.training.precision == "fp32"
    assert record.num_examples == 3 * 4  # as planned, not as drawn
    assert hub.verdicts()[record.id].accepted
    assert ledger(hub).total == stated.epsilon


def test_without_dp_nothing_is_claimed_and_the_first_time_says_so(
    hub: HubSimulator, corpus: Path
) -> None:
    hears = Hears()
    assert send(hub, corpus, privacy=None, listener=hears).privacy is None
    assert "public and, in Git, permanent" in hears.said("public")
    assert "without --dp no privacy is claimed" in hears.said("public")
    assert ledger(hub).runs == ()
    later = Hears()
    send(hub, corpus, privacy=None, seed=2, replace=True, listener=later)
    assert later.said("public") == ""


def test_a_hub_that_trains_in_bfloat16_gets_float32(tmp_path: Path, corpus: Path) -> None:
    hub = HubSimulator.copied(tmp_path, training={"precision": "bf16"})
    assert send(hub, corpus).training.precision == "fp32"
    with pytest.raises(ConfigError, match="bf16 is asked for"):
        send(hub, corpus, precision="bf16")


def test_a_delta_that_promises_too_little_is_refused(hub: HubSimulator, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="means little") as caught:
        send(hub, corpus, privacy=PrivacyOptions(delta=0.1))
    assert "--dp-delta" in caught.value.hint
    assert ledger(hub).runs == ()


def test_a_moved_contribution_keeps_its_claim_and_spends_nothing_more(
    hub: HubSimulator, corpus: Path
) -> None:
    dry = send(hub, corpus, dry_run=True)
    hub.rounds(3)
    moved = resume(hub.url, home=hub.folder / "ann").contribution
    assert moved.rebased_from == 0
    assert moved.privacy == dry.privacy
    assert len(ledger(hub).runs) == 1


# Error feedback.


def test_what_was_left_by_an_open_contribution_stays_out_of_a_private_one(
    hub: HubSimulator, corpus: Path
) -> None:
    send(hub, corpus, privacy=None)
    hub.merge()
    hears = Hears()
    send(hub, corpus, listener=hears, dry_run=True)
    assert "what the codec could not say of earlier contributions" in hears.said("privacy")
    assert "earlier ones were sent without --dp" in hears.said("privacy")
    run = next(iter(Runs(Replica(hub.url, hub.folder / "ann").folder / "runs")))
    assert is_all_its_own(run)


def is_all_its_own(run) -> bool:
    """Whether what was sent and what was left add up to what was trained."""
    from moshi_fl.codec import get_codec
    from moshi_fl.codec.delta import Delta
    from moshi_fl.rules import shapes_of

    base, trained, carry = map(open_weights, (run.base, run.trained, run.carry))
    delta = Delta.open(run.delta, shapes_of(base), get_codec("topk", {}))
    return all(
        abs(
            (delta.decode(name) if name in delta.names else 0)
            + carry.get(name, 0)
            - (trained[name] - base[name])
        ).max()
        < 1e-6
        for name in base
    )


def test_what_a_private_one_left_goes_on_in_the_next(hub: HubSimulator, corpus: Path) -> None:
    send(hub, corpus)
    hub.merge()
    hears = Hears()
    send(hub, corpus, listener=hears, dry_run=True)
    assert "earlier" not in hears.said("privacy")
    run = next(iter(Runs(Replica(hub.url, hub.folder / "ann").folder / "runs")))
    assert not is_all_its_own(run)


# The ledger.


def test_rounds_add_up_until_the_budget_ends_it(hub: HubSimulator, corpus: Path) -> None:
    first = send(hub, corpus).privacy.epsilon
    hub.merge()
    send(hub, corpus)
    spent = ledger(hub)
    assert len(spent.runs) == 2
    assert first < spent.total < 2 * first
    hub.merge()
    with pytest.raises(MoshiError, match="privacy budget") as caught:
        send(hub, corpus, privacy=PrivacyOptions(budget=spent.total))
    assert f"epsilon {spent.total:g} is spent in 2 run(s)" in str(caught.value)
    assert "--dp-budget" in caught.value.hint
    assert ledger(hub) == spent
    more = resume(hub.url, home=hub.folder / "ann", privacy_budget=50)
    assert more.sent
    assert len(ledger(hub).runs) == 3


def test_what_is_interrupted_resumed_or_repeated_is_spent_once(
    hub: HubSimulator, corpus: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        send(hub, corpus, listener=Hears(stop_at=2))
    spent = ledger(hub)
    assert len(spent.runs) == 1  # before anything was sent
    sent = resume(hub.url, home=hub.folder / "ann").contribution
    assert send(hub, corpus).id == sent.id
    assert ledger(hub) == spent


def test_what_is_discarded_stays_spent(hub: HubSimulator, corpus: Path) -> None:
    first = send(hub, corpus, dry_run=True)
    discard(hub.url, home=hub.folder / "ann")
    second = send(hub, corpus, dry_run=True)
    assert second.id != first.id  # the same command, and other noise
    assert len(ledger(hub).runs) == 2


def test_a_ledger_that_is_damaged_stops_everything_but_a_look(
    hub: HubSimulator, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    send(hub, corpus)
    path = next((hub.folder / "ann" / "privacy").glob("*.json"))
    path.write_bytes(path.read_bytes().replace(b'"steps": 3', b'"steps":  3'))
    with pytest.raises(CorruptRecord, match="canonical"):
        send(hub, corpus, seed=2, replace=True)
    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.folder / "ann"))
    assert main(["status", "--hub", hub.url]) == 0
    assert "nothing can be sent with --dp" in capsys.readouterr().err


def test_a_ledger_of_another_hub_is_refused(tmp_path: Path) -> None:
    Account(tmp_path, HUB).spend("1" * 32, 0, asked(), 8)
    path = tmp_path / "privacy" / f"{HUB}.json"
    path.rename(tmp_path / "privacy" / f"{'f' * 16}.json")
    with pytest.raises(CorruptRecord, match="ledger of hub"):
        Account(tmp_path, "f" * 16).read()


def test_the_smallest_delta_counts_for_all(tmp_path: Path) -> None:
    account = Account(tmp_path, HUB)
    loose = account.spend("1" * 32, 0, asked(delta=1e-4), 8).total
    both = account.spend("2" * 32, 0, asked(delta=1e-6, steps=0), 8)
    assert both.delta == 1e-6
    assert both.total > loose


SPEND = """
import sys, msgspec
from pathlib import Path
from moshi_fl.errors import MoshiError
from moshi_fl.records import Privacy
from moshi_sdk.privacy import Account
asked = msgspec.json.decode(sys.argv[3], type=Privacy)
sys.stdin.readline()
try:
    Account(Path(sys.argv[1]), "0123456789abcdef").spend(sys.argv[2], 0, asked, 1.0)
    print("spent")
except MoshiError as error:
    print("refused" if "would be exceeded" in str(error) else error)
"""


def test_two_processes_at_once_cannot_both_spend_the_last(tmp_path: Path) -> None:
    wanted = msgspec.json.encode(asked()).decode()  # 0.93; both together cost more
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SPEND, str(tmp_path), name * 32, wanted],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in "12"
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda child: child.communicate("go\n")[0].strip(), children))
    assert sorted(said) == ["refused", "spent"]
    assert len(Account(tmp_path, HUB).read().runs) == 1


# The command.


def test_the_command_shows_what_it_costs_and_status_what_was_spent(
    hub: HubSimulator, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["contribute", "--hub", hub.url, "--data", str(corpus), "--dp", "--dp-noise", "2"]
    assert main([*words, "--dp-clip", "0.5", "--json"]) == 0
    said = msgspec.json.decode(capsys.readouterr().out)
    assert 0 < said["epsilon"] < 8
    assert said["loss_after"] is None
    assert main(["status", "--hub", hub.url, "--json"]) == 0
    shown = msgspec.json.decode(capsys.readouterr().out)["privacy"]
    assert shown[0]["epsilon"] == said["epsilon"]
    assert shown[0]["delta"] == 1e-5


@pytest.mark.parametrize("flag", ["--dp-noise", "--dp-clip", "--dp-budget"])
def test_a_flag_of_dp_without_dp_is_a_mistake(
    hub: HubSimulator, corpus: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["contribute", "--hub", hub.url, "--data", str(corpus), flag, "1"]
    assert main(words) == 2
    assert f"{flag} needs --dp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields", [{"noise_multiplier": 0.1}, {"max_gradient_norm": 0.0}, {"delta": 1.0}, {"budget": 0}]
)
def test_senseless_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="differential privacy"):
        replace(DP, **fields)


@pytest.mark.slow
def test_killed_again_and_again_it_arrives_once_and_spends_once(
    tmp_path: Path, commands: Nursery
) -> None:
    hub, data = HubSimulator.copied(tmp_path / "stage"), write_corpus(tmp_path / "data", files=12)
    words = ("moshi-fl", "contribute", "--hub", hub.url, "--data", str(data), "--json", "--dp")
    words = (*words, "--steps", "1", "--batch-size", "2", "--seed", "7", "--contributor", "ann")
    deaths = 0
    for moment in (4, 8, 12, 16, 20):
        deaths += commands.run(*words, home=hub.folder / "ann", kill_at=moment).was_killed
    last = commands.run(*words, home=hub.folder / "ann")
    assert last.status == 0, last.err
    assert deaths >= 3
    assert len(ledger(hub).runs) == 1
    assert len([ref for ref in hub.refs() if ref.startswith("refs/heads/contribute/")]) == 1
