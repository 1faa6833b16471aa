"""Syncing: cold, warm, offline, old rounds; and a hub that takes back what it said."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moshi_fl.errors import CorruptRecord, HubError, UntrustedHub
from moshi_fl.history import MAIN
from moshi_fl.store import ANY, RefUpdate
from moshi_fl.weights import weights_digest
from moshi_sdk.sync import SyncManager
from tests.support.simulator import HubSimulator


def test_a_cold_start_gives_the_newest_round(hub: HubSimulator) -> None:
    hub.rounds(2)
    snapshot = hub.sync()
    assert (snapshot.round, snapshot.online) == (2, True)
    assert weights_digest(snapshot.load()) == snapshot.record.weights
    assert snapshot.received > 0


def test_an_unchanged_hub_costs_nothing(hub: HubSimulator) -> None:
    first = hub.sync()
    again = hub.sync()
    assert (again.round, again.received) == (first.round, 0)


def test_an_update_fetches_only_what_is_new(hub: HubSimulator) -> None:
    cold = hub.sync("cold").received
    hub.sync()
    hub.rounds(1)
    warm = hub.sync()
    assert warm.round == 1
    assert 0 < warm.received < cold / 4
    assert weights_digest(warm.load()) == hub.sync("other").record.weights


def test_whoever_was_away_for_long_takes_the_cheaper_way(hub: HubSimulator) -> None:
    hub.sync("traveller")
    hub.rounds(12, contributors=3)
    back, fresh = hub.sync("traveller"), hub.sync("newcomer")
    assert back.round == fresh.round == 12
    assert back.received <= fresh.received
    assert back.load().keys() == fresh.load().keys()


def test_an_old_round_can_be_had(hub: HubSimulator) -> None:
    digests = [hub.replica.pull().record.weights]
    for seed in range(4):
        hub.contribute("ann", seed=seed)
        hub.merge()
        digests.append(hub.replica.pull().record.weights)
    for number in (2, 0, 4, 1):
        snapshot = hub.sync("historian", number=number)
        assert snapshot.round == number
        assert weights_digest(snapshot.load()) == digests[number]


def test_an_old_round_before_the_manifest_can_be_had(hub: HubSimulator) -> None:
    hub.edit_settings('keyframes = "auto"', 'keyframes = "every-round"')
    hub.rounds(5)
    assert hub.replica.look().manifest.rounds[0].round == 4
    assert hub.sync("historian", number=2).load()  # its own keyframe is gone: from keyframe 0 on


def test_a_round_that_the_hub_no_longer_keeps_is_said(hub: HubSimulator) -> None:
    hub.edit_settings('keyframes = "auto"', 'keyframes = "every-round"')
    hub.edit_settings("keep_rounds = 0", "keep_rounds = 1")
    hub.rounds(5)
    with pytest.raises(HubError, match="round 1 cannot be had: the hub no longer keeps"):
        hub.sync("historian", number=1)


def test_a_round_that_does_not_exist_is_said(hub: HubSimulator) -> None:
    with pytest.raises(HubError, match="round 9 does not exist: the newest is 0") as missing:
        hub.sync(number=9)
    assert missing.value.hint == "--round 0 or less; without it, the newest"


def test_only_so_many_rounds_stay_on_this_machine(hub: HubSimulator) -> None:
    manager = SyncManager(hub.url, home=hub.folder / "tidy", keep_rounds=2)
    for seed in range(4):
        hub.contribute("ann", seed=seed)
        hub.merge()
        manager.pull()
    assert manager.replica.rounds_at_hand() == [3, 4]


def test_without_the_hub_the_cache_answers_and_tells_its_age(hub: HubSimulator) -> None:
    online = hub.sync()
    hub.path.rename(hub.folder / "gone")
    offline = hub.sync()
    assert not offline.online
    assert offline.round == online.round
    assert abs(offline.checked - online.checked) < 60
    assert offline.load()


def test_without_hub_and_cache_there_is_one_clear_error(hub: HubSimulator) -> None:
    hub.path.rename(hub.folder / "gone")
    with pytest.raises(
        HubError, match=r"no hub at .*\. On this machine there is no round"
    ) as error:
        hub.sync("newcomer")
    assert "access rights" not in str(error.value), "what Git adds to every failure says nothing"


def test_an_empty_repository_is_no_hub(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--bare", "-q", tmp_path / "plain.git"], check=True)
    with pytest.raises(HubError, match="no moshi-fl hub") as missing:
        SyncManager(str(tmp_path / "plain.git"), home=tmp_path / "home").pull()
    assert missing.value.hint.startswith("Check the address: --hub URL, or moshi-fl config set hub")


def test_a_damaged_cache_is_noticed_before_use(hub: HubSimulator) -> None:
    snapshot = hub.sync()
    data = bytearray(snapshot.path.read_bytes())
    data[-1] ^= 1
    snapshot.path.write_bytes(data)
    with pytest.raises(CorruptRecord, match="is damaged"):
        hub.sync().load()
    hub.rounds(1)
    assert hub.sync().load()  # the damaged base is thrown away, and a keyframe fetched


def test_a_rewound_hub_is_refused(hub: HubSimulator) -> None:
    hub.rounds(1)
    earlier = hub.refs()
    hub.rounds(1)
    reader = hub.sync()
    repo = hub.person("reader").repo
    back = [RefUpdate(ref, earlier[ref], ANY) for ref in (MAIN, "refs/moshi/latest")]
    hub.replica.repo.push(back)
    with pytest.raises(
        UntrustedHub, match=r"rewound: it offers version 2 of timestamp.json, but version 3"
    ):
        hub.sync()
    assert repo
    assert hub.sync(offline=True).round == reader.round == 2


def test_a_hub_with_another_identity_is_refused(hub: HubSimulator, tmp_path: Path) -> None:
    hub.sync()
    hub.path.rename(hub.folder / "old.git")
    HubSimulator.__init__(other := object.__new__(HubSimulator), tmp_path)
    with pytest.raises(UntrustedHub, match="another hub than before"):
        other.sync()


def test_a_branches_only_hub_works_alike(tmp_path: Path) -> None:
    from moshi_fl.history import PREFIXES
    from moshi_hub.create import Plan, create
    from tests.support.simulator import small_preset

    url = str(tmp_path / "hub.git")
    plan = Plan(url=url, family="char", preset="tiny", name="test", prefix=PREFIXES[1])
    create(plan, tmp_path / "maintainer", small_preset())
    snapshot = SyncManager(url, home=tmp_path / "reader").pull()
    assert snapshot.state.refs.prefix == "refs/heads/moshi/"
    assert snapshot.load()


def test_syncing_imports_neither_torch_nor_flower(hub: HubSimulator) -> None:
    script = (
        "import sys; from pathlib import Path; from moshi_sdk.sync import SyncManager; "
        "SyncManager(sys.argv[1], home=Path(sys.argv[2])).pull(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'flwr')))"
    )
    argv = [sys.executable, "-c", script, hub.url, str(hub.folder / "lean")]
    assert subprocess.run(argv, check=False).returncode == 0


def test_a_sync_that_finds_nothing_new_loads_no_tuf(hub: HubSimulator) -> None:
    script = (
        "import sys; from pathlib import Path; from moshi_sdk.sync import SyncManager; "
        "SyncManager(sys.argv[1], home=Path(sys.argv[2])).pull(); "
        "sys.exit(any(name in sys.modules for name in ('tuf', 'cryptography', 'urllib3')))"
    )
    argv = [sys.executable, "-c", script, hub.url, str(hub.folder / "lean")]
    statuses = [subprocess.run(argv, check=False).returncode for _ in range(2)]
    assert statuses == [1, 0]


def test_the_commands_show_the_root_and_take_only_the_one_demanded(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moshi_sdk.cli import main

    def run(*words: str, home: str = "ann") -> tuple[int, dict, str]:
        monkeypatch.setenv("MOSHI_FL_HOME", str(hub.folder / home))
        capsys.readouterr()
        status = main([*words, "--hub", hub.url, "--json"])
        out, err = capsys.readouterr()
        return status, json.loads(out), err

    status, first, said = run("sync")
    assert status == 0
    assert "First contact: from now on this hub must be signed under the root" in said
    assert "First contact" not in run("sync")[2]
    assert run("status")[1]["root"] == run("status", "--offline")[1]["root"] == first["root"]
    file = hub.folder / "1.root.json"
    file.write_bytes(hub.latest()["1.root.json"])
    whole = hashlib.sha256(file.read_bytes()).hexdigest()
    for number, root in enumerate((first["root"], whole, whole[:32].upper(), str(file))):
        assert run("sync", "--root", root, home=f"bob{number}")[1]["root"] == first["root"]
    status, document, _ = run("sync", "--root", "0" * 32, home="carl")
    assert status == 1
    assert "not the one demanded" in document["error"]["message"]
    status, document, _ = run("sync", "--root", "no such file", home="carl")
    assert status == 1
    assert "neither a fingerprint" in document["error"]["message"]
    assert run("sync", "--min-attestations", "1", home="carl")[0] == 0  # round 0 is exempt
    hub.rounds(1)
    status, document, _ = run("sync", "--min-attestations", "1", home="carl")
    assert status == 1
    assert "you demand 1" in document["error"]["message"]
