"""Whose signatures count: keys of one or several maintainers, and how they change."""

from __future__ import annotations

import io
import json
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moshi_fl.errors import ConfigError, HubError, UntrustedHub
from moshi_fl.history import MAIN, accepted_signature_path
from moshi_fl.records import dump
from moshi_fl.replica import Replica
from moshi_fl.signed.files import TIMESTAMP, fingerprint
from moshi_fl.signing import CONTRIBUTION_NAMESPACE
from moshi_fl.store import ANY, Author, PushRejected, RefUpdate
from moshi_hub.cli import main
from moshi_hub.create import Plan, create
from moshi_hub.keys import KeyStore, passphrase_from_environment
from moshi_hub.local import local_signer
from moshi_hub.merge import publish_round
from moshi_hub.metadata import TooFewSignatures
from moshi_hub.publish import commit_latest, latest_files
from moshi_hub.review import sign_round
from moshi_hub.rootchange import keep
from moshi_hub.rotation import change_root, open_bench, refresh
from tests.support.hubs import git
from tests.support.keys import signature_by
from tests.support.simulator import HubSimulator, small_preset

Run = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    return HubSimulator.copied(tmp_path)


@pytest.fixture
def run(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """A command on the hub, by the maintainer or somebody else: its JSON document."""

    def command(*words: str | Path, by: str = "maintainer", status: int = 0) -> Any:
        monkeypatch.setenv("MOSHI_FL_HOME", str(hub.folder / by))
        capsys.readouterr()
        assert main([*map(str, words), "--hub", hub.url, "--json"]) == status
        return json.loads(capsys.readouterr().out)

    return command


def bob_joins(hub: HubSimulator, run: Run, *roles: str) -> None:
    """A second maintainer makes keys, the first adds them, and two signatures are needed."""
    for role in roles:
        made = run("keys", "new", role, by="bob")
        public = hub.folder / f"bob-{role}.pem"
        public.write_text("\n".join(made["lines"]) + "\n")
        run("keys", "add", role, public)
        assert run("keys", "threshold", role, "2")["published"] is False
        assert run("keys", "sign", by="bob")["published"] is False  # the online key is elsewhere
        assert run("keys", "sign")["published"] is True


# Where keys lie.


def test_keys_lie_outside_the_hub_where_only_their_owner_reads(hub: HubSimulator) -> None:
    store = KeyStore(hub.home, hub.replica.look().config.hub.id)
    assert [key.role for key in store.stored()] == ["online", "root", "targets"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()}
    assert modes == {0o600}
    assert {stat.S_IMODE(f.stat().st_mode) for f in (store.folder, store.folder.parent)} == {0o700}
    assert b"PRIVATE" not in git(hub.path, "grep", "-h", "", hub.main()).encode()


def test_keys_with_a_passphrase_sign_only_for_who_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(str(tmp_path / "hub.git"), "char", "tiny", "locked", passphrase=b"open sesame")
    create(plan, tmp_path / "home", small_preset())
    replica = Replica(plan.url, tmp_path / "home")
    store = KeyStore(tmp_path / "home", replica.look().config.hub.id)
    assert all(b"ENCRYPTED" in key.path.read_bytes() for key in store.stored())
    monkeypatch.delenv("MOSHI_HUB_PASSPHRASE", raising=False)
    with pytest.raises(ConfigError, match="has a passphrase, and nobody is there") as error:
        refresh(open_bench(replica), with_snapshot=False)
    assert "--passphrase-env" in error.value.hint
    with pytest.raises(ConfigError, match="its passphrase is another"):
        refresh(open_bench(replica, lambda _: b"abracadabra"), with_snapshot=False)
    monkeypatch.setenv("MOSHI_HUB_PASSPHRASE", "open sesame")
    refresh(open_bench(replica, passphrase_from_environment), with_snapshot=False)


def test_a_maintainer_without_keys_is_told_before_any_work(hub: HubSimulator) -> None:
    hub.contribute("ann")
    with pytest.raises(TooFewSignatures, match=r"takes 1 targets key\(s\), 0 of them") as error:
        hub.merge(replica=hub.person("stranger"))
    assert "moshi-hub merge" in error.value.hint
    assert hub.sync().round == 0


def test_the_online_key_may_come_from_a_variable(
    hub: HubSimulator, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(run("keys", "export")["lines"])
    assert "PRIVATE KEY" in text
    before = json.loads(hub.latest()[TIMESTAMP])["signed"]["version"]
    run("keys", "refresh", by="ci", status=1)
    monkeypatch.setenv("MOSHI_HUB_ONLINE_KEY", text)
    run("keys", "refresh", by="ci")
    listed = run("keys", "list", by="ci")["keys"]
    assert {row["role"]: row["here"] for row in listed}["online"] == "$MOSHI_HUB_ONLINE_KEY"
    assert json.loads(hub.latest()[TIMESTAMP])["signed"]["version"] == before + 1
    monkeypatch.setenv("MOSHI_HUB_ONLINE_KEY", "something else")
    run("keys", "refresh", by="ci", status=1)
    assert hub.sync().online


def test_the_anchors_key_is_exported_only_where_it_is(
    hub: HubSimulator, run: Run, tmp_path: Path
) -> None:
    """Before a hub has an anchor, its key is made on first use: a CI's secrets come first."""
    first = run("keys", "export", "--role", "anchor")["lines"]
    assert "PRIVATE KEY" in first[0]
    eve = local_signer(tmp_path / "eve", "hub", "1").public_key
    (tmp_path / "eve.pub").write_text(eve)
    run("evaluators", "add", tmp_path / "eve.pub", "--owner", "eve")  # main names the anchor
    assert run("keys", "export", "--role", "anchor")["lines"] == first

    told = run("keys", "export", "--role", "anchor", by="bob", status=1)
    assert "the key of this hub's anchor is not in" in told["error"]["message"]
    assert not (hub.folder / "bob" / "evaluators").exists()
    local_signer(hub.folder / "bob", hub.replica.look().config.hub.id, "anchor")
    run("keys", "export", "--role", "anchor", by="bob", status=1)
    run("keys", "export", "abc", "--role", "anchor", status=2)


# Rounds of several maintainers.


def test_a_round_needs_as_many_signatures_as_the_hub_demands(hub: HubSimulator, run: Run) -> None:
    bob_joins(hub, run, "targets")
    hub.contribute("ann")
    with pytest.raises(TooFewSignatures, match=r"takes 2 targets key\(s\), 1 of them"):
        hub.merge()
    hub.merge(publish=False)
    with pytest.raises(TooFewSignatures, match="has 1 of the 2 signature"):
        publish_round(hub.replica)
    bob = hub.person("bob")
    signed = sign_round(bob)
    assert (signed.have, signed.need, signed.added) == (2, 2, True)
    refs = hub.refs()
    again = sign_round(bob)
    assert (again.have, again.added) == (2, False)
    assert hub.refs() == refs
    refresh(open_bench(hub.replica), with_snapshot=True)  # a cron job came in between
    publish_round(hub.replica)
    assert hub.sync().round == 1
    assert hub.sync("newcomer").round == 1


def test_the_sign_command_says_how_many_are_missing(hub: HubSimulator, run: Run) -> None:
    hub.contribute("ann")
    run("sign", status=1)
    run("merge")
    assert run("sign")["added"] is False
    run("sign", "1", by="stranger", status=1)
    run("publish")
    assert hub.sync().round == 1


def lie(hub: HubSimulator, change: Callable[[Any], Any]) -> None:
    """Propose the round that is proposed with another record, signed, as a maintainer could."""
    repo, state = hub.replica.repo, hub.replica.look()
    found = hub.refs()
    branch, ref = "refs/heads/round/1", "refs/moshi/next/1"
    repo.fetch({branch: "refs/x/branch", ref: "refs/x/next"})
    from moshi_fl.history import Refs
    from moshi_hub.proposed import fetch_proposed
    from moshi_hub.publish import author

    proposed = fetch_proposed(repo, Refs("refs/moshi/"), 1)
    record = change(proposed.manifest.newest)
    manifest = msgspec.structs.replace(
        proposed.manifest, rounds=(*proposed.manifest.rounds[:-1], record)
    )
    files = latest_files(manifest, state.hubfile.encode(), state.tokenizer)
    metadata = hub.desk().propose(files, 1)
    latest = commit_latest(repo, manifest, {**files, **metadata}, author("liar"))
    tree = repo.tree({"rounds/0001/round.json": repo.put(dump(record))}, base=found[branch])
    main_ = repo.commit(tree, parents=(found[MAIN],), message="x\n", author=author("l"), when=1)
    repo.push([RefUpdate(ref, latest, ANY), RefUpdate(branch, main_, ANY)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": "0" * 64}, "is not what its contributions make"),
        ({"contributions": ()}, "names no contributions"),
        ({"previous": "0" * 64}, "chain of rounds is broken"),
        ({"round": 7}, "does not extend round 0"),
        ({"tokenizer": "0" * 64}, "tokenizer is not the one"),
    ],
)
def test_nobody_signs_what_they_recompute_otherwise(
    hub: HubSimulator, fields: dict[str, Any], words: str
) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    lie(hub, lambda record: msgspec.structs.replace(record, **fields))
    with pytest.raises(UntrustedHub, match=words):
        sign_round(hub.maintainer("second"))


def test_nobody_signs_a_round_in_which_a_key_counts_twice(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = hub.sync("ann")
    hub.contribute("ann", on=base, seed=1)
    hub.merge()
    hub.contribute("ann", on=base, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr("moshi_hub.opened.known_keys", lambda *_: {})
        hub.merge(publish=False)
    with pytest.raises(UntrustedHub, match=r"a second one of the key SHA256:.*: round 1 has"):
        sign_round(hub.maintainer("second"))


def test_nobody_signs_what_its_contributor_has_not(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.merge(publish=False)
    repo, branch = hub.replica.repo, "refs/heads/round/1"
    forged = signature_by("eve", dump(record), CONTRIBUTION_NAMESPACE)
    path = accepted_signature_path(1, record.id)
    tree = repo.tree({path: repo.put(forged.encode())}, base=hub.refs()[branch])
    eve = Author("eve", "eve@x")
    commit = repo.commit(tree, parents=(hub.main(),), message="x\n", author=eve, when=1)
    repo.push([RefUpdate(branch, commit, ANY)])
    with pytest.raises(UntrustedHub, match="is not signed by its key"):
        sign_round(hub.maintainer("second"))


def test_nobody_signs_what_the_branch_does_not_show(hub: HubSimulator) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    git(hub.path, "update-ref", "refs/heads/round/1", hub.main())
    with pytest.raises(UntrustedHub, match="is not what would be published"):
        sign_round(hub.maintainer("second"))


def test_a_proposal_from_before_a_change_of_keys_is_signed_anew(
    hub: HubSimulator, run: Run
) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    run("keys", "rotate", "targets")
    with pytest.raises(HubError, match="does not follow on what the hub has now") as error:
        publish_round(hub.replica)
    assert "moshi-hub sign 1" in error.value.hint
    assert sign_round(hub.replica).added
    publish_round(hub.replica)
    assert hub.sync().round == 1


def test_a_refresh_and_a_merge_race_and_nothing_is_mixed(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.contribute("ann")
    push = hub.replica.repo.push

    def late(updates: Any) -> None:
        monkeypatch.undo()
        refresh(open_bench(hub.maintainer("cron")), with_snapshot=True)
        push(updates)

    monkeypatch.setattr(hub.replica.repo, "push", late)
    with pytest.raises(PushRejected):
        hub.merge()
    assert hub.sync().round == 0
    hub.merge()
    assert hub.sync().round == 1
    assert hub.sync("newcomer").round == 1


def test_settings_that_came_to_main_unsigned_are_named_before_they_are_signed(
    hub: HubSimulator, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.contribute("ann")
    hub.edit_settings("max_examples = 100000 ", "max_examples = 5 ")
    run("merge", "--dry-run")
    assert main(["merge", "--hub", hub.url]) == 0
    said = "aggregation.max_examples: 100000 -> 5"
    assert said in capsys.readouterr().err
    assert main(["sign", "--hub", hub.url]) == 0
    assert said in capsys.readouterr().err
    run("publish")
    hub.contribute("bob", seed=2)
    assert main(["merge", "--hub", hub.url, "--dry-run"]) == 0
    words = capsys.readouterr().err
    assert "hub.toml is not" not in words
    assert "without --dry-run proposes it" in words


# Changes of keys.


def test_whoever_skipped_several_roots_still_follows(hub: HubSimulator, run: Run) -> None:
    first = hub.sync("sleeper").root
    hub.sync("awake")
    for role in ("root", "targets", "online", "root"):
        run("keys", "rotate", role)
        assert hub.sync("awake").online
    hub.rounds(1)
    for who in ("sleeper", "awake", "newcomer"):
        snapshot = hub.sync(who)
        assert (snapshot.round, snapshot.root) == (1, first)
    assert sorted(name for name in hub.latest() if "root" in name) == [
        f"{version}.root.json" for version in range(1, 6)
    ]
    shown = run("keys", "fingerprint")
    newest = fingerprint(hub.latest()["5.root.json"])
    assert (shown["root"], shown["version"], shown["newest_root"]) == (first, 5, newest)
    pinned = Replica(hub.url, hub.folder / "pinned", root=newest).pull()
    assert (pinned.root, pinned.round) == (newest, 1)


def test_a_revoked_key_signs_nothing_any_more(hub: HubSimulator, run: Run) -> None:
    bob_joins(hub, run, "targets")
    listed = run("keys", "list")["keys"]
    bobs = next(row["key"] for row in listed if row["role"] == "targets" and not row["here"])
    assert run("keys", "revoke", bobs, status=1)["error"]  # two are needed, one would be left
    run("keys", "threshold", "targets", "1")
    run("keys", "revoke", bobs)
    hub.contribute("ann")
    hub.merge(publish=False)
    with pytest.raises(HubError, match="none of the hub's targets keys"):
        sign_round(hub.person("bob"))
    publish_round(hub.replica)
    assert hub.sync().round == 1


def test_a_root_of_two_changes_only_when_both_have_signed(hub: HubSimulator, run: Run) -> None:
    hub.sync("reader")
    made = run("keys", "new", "root", by="bob")
    (hub.folder / "bob.pem").write_text("\n".join(made["lines"]) + "\n")
    run("keys", "add", "root", hub.folder / "bob.pem")
    assert run("keys", "threshold", "root", "2")["published"] is False  # bob must sign it, too
    assert run("keys", "list", by="bob")["waiting"][0]["change"] == "threshold 1 to 2"
    run("keys", "rotate", "online", status=1)  # one change at a time
    assert run("keys", "sign", by="bob")["published"] is True
    waiting = run("keys", "rotate", "online")
    assert waiting["published"] is False
    assert hub.sync("reader").online
    assert run("keys", "sign", by="bob")["published"] is False  # the online key is elsewhere
    assert run("keys", "sign")["published"] is True
    assert hub.sync("reader").online
    assert run("keys", "renew")["published"] is False
    assert run("keys", "drop")["dropped"] is True
    assert run("keys", "drop")["dropped"] is False
    hub.rounds(1)
    assert hub.sync("newcomer").round == 1


def test_a_change_that_would_leave_a_role_without_keys_is_refused(
    hub: HubSimulator, run: Run
) -> None:
    key = run("keys", "list")["keys"][0]["key"]
    assert "would have 0 key(s)" in run("keys", "revoke", key, status=1)["error"]["message"]
    assert "need 3" in run("keys", "threshold", "root", "3", status=1)["error"]["message"]
    (hub.folder / "no.pem").write_text("no key\n")
    run("keys", "add", "root", hub.folder / "no.pem", status=1)


def test_renewing_moves_every_date(hub: HubSimulator, run: Run) -> None:
    before = json.loads(hub.latest()["1.root.json"])["signed"]
    change_root(open_bench(hub.replica), keep)
    after = json.loads(hub.latest()["2.root.json"])["signed"]
    assert after["keys"] == before["keys"]
    assert after["roles"] == before["roles"]
    assert run("keys", "refresh", "--snapshot")["expires"]
    assert hub.sync().online


def test_the_settings_say_how_long_signatures_hold(hub: HubSimulator, run: Run) -> None:
    hub.edit_settings("timestamp_days = 90", "timestamp_days = 1")
    end = run("keys", "refresh")["expires"]
    assert datetime.fromisoformat(end) - datetime.now(UTC) < timedelta(days=1)


def test_a_second_machine_needs_nothing_but_a_copy_of_the_keys(hub: HubSimulator, run: Run) -> None:
    public = run("keys", "export-public", "targets")["lines"]
    assert public[0].startswith("-----BEGIN PUBLIC KEY-----")
    shutil.copytree(hub.home / "keys", hub.folder / "laptop" / "keys")
    hub.contribute("ann")
    run("merge", "--publish", by="laptop")
    assert hub.sync().round == 1


def test_init_shows_the_root_and_locks_keys_with_a_passphrase(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "ann"))
    url = str(tmp_path / "locked.git")
    assert main(["init", url, "--passphrase", "--json"]) == 1  # nobody is there to ask
    assert main(["init", url, "--passphrase-env", "MISSING", "--json"]) == 1
    monkeypatch.setenv("SESAME", "open sesame")
    capsys.readouterr()
    assert main(["init", url, "--passphrase-env", "SESAME", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    files = list(Path(made["keys"]).iterdir())
    assert len(files) == 3
    assert all(b"ENCRYPTED PRIVATE KEY" in file.read_bytes() for file in files)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["keys", "refresh", "--hub", url]) == 1
    assert "has a passphrase, and nobody is there" in capsys.readouterr().err
    assert main(["keys", "refresh", "--hub", url, "--passphrase-env", "SESAME"]) == 0
    assert main(["keys", "rotate", "online", "--hub", url, "--passphrase-env", "SESAME"]) == 0
    newest = max(Path(made["keys"]).glob("online-*"), key=lambda path: path.stat().st_mtime_ns)
    assert b"ENCRYPTED PRIVATE KEY" in newest.read_bytes()
    capsys.readouterr()
    assert main(["keys", "fingerprint", "--hub", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["root"] == made["root"]


def test_a_maintainer_pinned_to_a_later_root_keeps_the_earlier_ones(
    hub: HubSimulator, run: Run
) -> None:
    run("keys", "rotate", "root")
    newest = fingerprint(hub.latest()["2.root.json"])
    shutil.rmtree(hub.replica.folder)
    late = Replica(hub.url, hub.home, root=newest)
    assert late.pull().root == newest
    refresh(open_bench(late), with_snapshot=False)
    assert hub.sync("newcomer").root == fingerprint(hub.latest()["1.root.json"])


def test_keys_that_others_can_read_are_told_of(
    hub: HubSimulator, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("keys", "list")
    KeyStore(hub.home, hub.replica.look().config.hub.id).stored()[0].path.chmod(0o644)
    assert main(["keys", "list", "--hub", hub.url]) == 0
    assert "others can read your keys" in capsys.readouterr().err


@pytest.mark.parametrize("root", [b"", b"{}", None])
def test_nobody_signs_a_change_of_keys_that_no_maintainer_began(
    hub: HubSimulator, run: Run, root: bytes | None
) -> None:
    files = hub.latest()
    stranger = HubSimulator(hub.folder / "stranger's").latest()["1.root.json"]
    forged = stranger.replace(b'"version":1', b'"version":2') if root is None else root
    repo = hub.replica.repo
    tree = repo.tree({n: repo.put(d) for n, d in {**files, "2.root.json": forged}.items()})
    commit = repo.commit(tree, message="x\n", author=Author("l", "l@x"), when=1)
    repo.push([RefUpdate("refs/moshi/next/root", commit, None)])
    assert "none of the hub's root keys" in run("keys", "sign", status=1)["error"]["message"]
    assert run("keys", "list")["keys"]
    assert run("keys", "drop")["dropped"] is True
    assert hub.sync().online


def test_garbage_in_the_place_of_a_proposals_signatures_is_no_proposal(hub: HubSimulator) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    repo, ref = hub.replica.repo, "refs/moshi/next/1"
    commit = repo.fetch({ref: "refs/x/next"})["refs/x/next"]
    tree = repo.tree({"targets.json": repo.put(b"{}")}, base=commit)
    broken = repo.commit(tree, message="x\n", author=Author("l", "l@x"), when=1)
    repo.push([RefUpdate(ref, broken, ANY)])
    with pytest.raises(HubError, match="does not follow on what the hub has now"):
        publish_round(hub.replica)
    assert sign_round(hub.replica).added
    publish_round(hub.replica)
    assert hub.sync().round == 1
