"""The local half of the store: objects, refs, addresses, locks, and the hub's own repository."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moshi_fl.errors import ConfigError, CorruptRecord, HubError, MoshiError
from moshi_fl.store import (
    ANY,
    HubRepo,
    PushRejected,
    RefUpdate,
    create_hub,
    is_local,
    normalise_url,
    redact,
)
from tests.support.hubs import WHO, commit, files_below, git, noise, prepared, publish

MAIN = "refs/heads/main"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    create_hub(tmp_path / "hub.git")
    return tmp_path / "hub.git"


@pytest.fixture
def repo(tmp_path: Path, hub: Path) -> HubRepo:
    return prepared(tmp_path / "store", hub)


def test_an_empty_hub_has_no_refs(repo: HubRepo) -> None:
    assert repo.remote_refs() == {}


def test_what_one_pushes_another_fetches(tmp_path: Path, repo: HubRepo, hub: Path) -> None:
    weights = noise(3_000_000)
    oid = publish(repo, "refs/moshi/keyframe/0", {"manifest": b"{}", "chunks/0": weights})
    other = prepared(tmp_path / "other", hub)
    assert other.fetch({"refs/moshi/keyframe/0": "refs/kept/0"}) == {"refs/kept/0": oid}
    assert other.resolve("refs/kept/0") == oid
    assert other.read(oid, "chunks/0", limit=len(weights)) == weights
    assert other.read_many(oid, ["manifest", "chunks/0", "manifest"], limit=len(weights)) == [
        b"{}",
        weights,
        b"{}",
    ]


def test_streaming_gives_the_same_bytes(repo: HubRepo) -> None:
    weights = noise(2_500_000)
    oid = commit(repo, {"w": weights})
    out = io.BytesIO()
    assert repo.stream(oid, *repo.entries(oid), out, limit=len(weights)) == len(weights)
    assert out.getvalue() == weights


def test_a_file_goes_in_as_it_is_whatever_its_line_ends(tmp_path: Path, repo: HubRepo) -> None:
    source = tmp_path / "-rf"
    source.write_bytes(b"a\r\nb\n\0")
    blob = repo.put(source)
    assert blob == repo.put(b"a\r\nb\n\0")
    assert repo.put_many([b"", b"a\r\nb\n\0"])[1] == blob


def test_many_contents_keep_their_order_in_an_oddly_named_store(tmp_path: Path, hub: Path) -> None:
    repo = prepared(tmp_path / 'st"o\\re\n$HOME ~', hub)
    contents = [str(number).encode() for number in range(300)]
    blobs = repo.put_many(contents)
    tree = repo.tree({f"records/{n}.json": blob for n, blob in enumerate(blobs)})
    oid = repo.commit(tree, message="all", author=WHO, when=1)
    assert repo.read_many(oid, [f"records/{n}.json" for n in range(300)], limit=10) == contents


def test_a_tree_can_start_from_another(repo: HubRepo) -> None:
    a, b = repo.put(b"a"), repo.put(b"b")
    base = repo.commit(
        repo.tree({"keep": a, "x/drop": a, "x/y/change": a}), message="1", author=WHO, when=1
    )
    tree = repo.tree({"x/y/change": b, "new/one": b}, base=base, remove=["x/drop", "absent"])
    oid = repo.commit(tree, parents=[base], message="2", author=WHO, when=2)
    found = {entry.path: entry.oid for entry in repo.entries(oid)}
    assert found == {"keep": a, "new/one": b, "x/y/change": b}
    assert [entry.path for entry in repo.entries(oid, "x")] == ["x/y/change"]
    assert repo.log(oid, limit=5) == [(oid, "2"), (base, "1")]
    assert repo.is_ancestor(base, oid)
    assert not repo.is_ancestor(oid, base)


def test_a_tree_of_a_thousand_files_takes_two_processes(
    repo: HubRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = repo.put(b"x")
    started = count_processes(monkeypatch)
    repo.tree({f"d{n % 40}/{n}": blob for n in range(1000)})
    assert len(started) == 2


def count_processes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    started: list[object] = []
    original = subprocess.Popen.__init__

    def counting(self, args, **options):
        started.append(args)
        original(self, args, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", counting)
    return started


def test_the_same_commit_has_the_same_id_everywhere(
    tmp_path: Path, repo: HubRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = commit(repo, {"a": b"1"})
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody Else")
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2001-01-01T00:00:00")
    again = commit(prepared(tmp_path / "again", repo.url), {"a": b"1"})
    assert first == again == "13da8d5dd8f755be14b67383a85c885aa67ecd0e"


def test_refs_are_listed_set_and_deleted(repo: HubRepo) -> None:
    oid = commit(repo, {"a": b"1"})
    repo.set_ref("refs/kept/1", oid)
    repo.set_ref("refs/kept/2", oid)
    repo.set_ref("refs/other", oid)
    assert repo.refs("refs/kept/") == {"refs/kept/1": oid, "refs/kept/2": oid}
    repo.delete_refs("refs/kept/1", "refs/never/was")
    assert repo.refs("refs/") == {"refs/kept/2": oid, "refs/other": oid}
    assert repo.resolve("refs/kept/1") is None
    assert repo.resolve("0" * 40) is None


def test_reading_looks_at_kind_and_size_first(repo: HubRepo) -> None:
    oid = commit(repo, {"dir/big": b"x" * 100})
    for path, limit, reason in [
        ("dir/big", 99, "has 100 bytes, the limit is 99"),
        ("dir", 99, "has no file"),
        ("absent", 99, "has no file"),
        ("../up", 99, "not a usable path"),
    ]:
        with pytest.raises(CorruptRecord, match=reason):
            repo.read(oid, path, limit=limit)
    with pytest.raises(CorruptRecord, match="no readable tree"):
        repo.entries("1" * 40)
    with pytest.raises(CorruptRecord, match="more than 0 files"):
        repo.entries(oid, limit=0)


def test_one_of_two_racing_merges_wins(tmp_path: Path, repo: HubRepo, hub: Path) -> None:
    base = publish(repo, MAIN, {"round": b"0"})
    other = prepared(tmp_path / "other", hub)
    other.fetch({MAIN: MAIN})
    mine = commit(repo, {"round": b"1 mine"}, parents=(base,))
    theirs = commit(other, {"round": b"1 theirs"}, parents=(base,))
    other.push([RefUpdate(MAIN, theirs, base), RefUpdate("refs/moshi/update/1", theirs, None)])
    with pytest.raises(PushRejected) as rejected:
        repo.push([RefUpdate(MAIN, mine, base), RefUpdate("refs/moshi/mine", mine, None)])
    assert rejected.value.refs == (MAIN,)
    assert repo.remote_refs() == {MAIN: theirs, "refs/moshi/update/1": theirs}


def test_pushing_again_what_is_there_is_fine(repo: HubRepo) -> None:
    oid = publish(repo, MAIN, {"a": b"1"})
    repo.push([RefUpdate(MAIN, oid, None)])
    repo.push([RefUpdate("refs/moshi/x", None, oid), RefUpdate("refs/moshi/y", None, ANY)])
    moved = commit(repo, {"a": b"2"})
    repo.push([RefUpdate(MAIN, moved, ANY)])
    assert repo.remote_refs() == {MAIN: moved}
    repo.push([RefUpdate("refs/moshi/x", moved, None)])
    repo.push([RefUpdate("refs/moshi/x", None, moved)])
    assert repo.remote_refs() == {MAIN: moved}
    with pytest.raises(HubError, match="refused the push"):
        repo.push([RefUpdate(MAIN, None, moved)])


def test_deleting_a_ref_that_moved_is_rejected(repo: HubRepo) -> None:
    oid = publish(repo, "refs/moshi/x", {"a": b"1"})
    with pytest.raises(PushRejected):
        repo.push([RefUpdate("refs/moshi/x", None, commit(repo, {"a": b"2"}))])
    assert repo.remote_refs() == {"refs/moshi/x": oid}


def test_a_ref_below_another_ref_is_refused_but_has_not_moved(repo: HubRepo) -> None:
    publish(repo, "refs/moshi/x", {"a": b"1"})
    with pytest.raises(HubError) as refused:
        publish(repo, "refs/moshi/x/y", {"a": b"1"})
    assert not isinstance(refused.value, PushRejected)


def test_patterns_choose_refs(repo: HubRepo) -> None:
    oid = commit(repo, {"a": b"1"})
    names = ["refs/heads/contribute/1/a", "refs/heads/contribute/10/b", "refs/heads/main"]
    repo.push([RefUpdate(name, oid, None) for name in names])
    assert list(repo.remote_refs("refs/heads/contribute/1/")) == names[:1]
    assert list(repo.remote_refs("refs/heads/contribute/*", MAIN)) == names
    assert list(repo.remote_refs("refs/heads/main")) == names[2:]
    assert repo.remote_refs("refs/heads/contribute") == {}


def test_a_hub_gets_its_settings_and_may_be_filled_twice(hub: Path) -> None:
    create_hub(hub)
    assert git(hub, "config", "core.bigFileThreshold") == "65536\n"
    assert git(hub, "config", "receive.maxInputSize") == "1073741824\n"
    assert git(hub, "symbolic-ref", "HEAD") == "refs/heads/main\n"
    assert not (hub / "hooks").exists()


def test_a_folder_with_other_things_becomes_no_hub(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(MoshiError, match="not empty"):
        create_hub(tmp_path)
    assert files_below(tmp_path) == {"thesis.tex"}


def test_a_second_process_is_told_that_the_store_is_busy(repo: HubRepo) -> None:
    script = (
        "import sys; from pathlib import Path; from moshi_fl.store import HubRepo\n"
        "with HubRepo(Path(sys.argv[1]), sys.argv[2]).lock():\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(repo.path), repo.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(HubError, match="busy"), repo.lock(wait=0.1):
            pass
        holder.kill()
    with repo.lock(wait=5), repo.lock():
        repo.put(b"the lock died with its holder, and is reentrant")


def test_threads_take_turns(repo: HubRepo) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with repo.lock(wait=0.05):
                pass
        except HubError as error:
            refused.append(str(error))

    with repo.lock():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_a_dropped_store_is_gone_and_can_be_made_again(repo: HubRepo) -> None:
    repo.drop()
    assert not repo.path.exists()
    repo.prepare()
    assert repo.remote_refs() == {}


def test_settings_of_the_user_do_not_reach_the_store(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "user.gitconfig"
    config.write_text(
        "[core]\n\tautocrlf = true\n\thooksPath = /nowhere\n"
        "[init]\n\tdefaultObjectFormat = sha256\n"
        '[credential "https://example.org"]\n\thelper = store\n[http]\n\tproxy = http://proxy:1\n'
        '[url "https://evil.example/"]\n\tinsteadOf = /\n[safe]\n\tdirectory = "/srv/a \\"b\\""\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    for name in ("GIT_DIR", "GIT_OBJECT_DIRECTORY", "GIT_QUARANTINE_PATH", "GIT_NAMESPACE"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    repo = prepared(tmp_path / "store", hub)
    oid = publish(repo, MAIN, {"a": b"1\r\n"})
    assert repo.read(oid, "a", limit=9) == b"1\r\n"
    assert repo._user_settings() == [
        ("credential.https://example.org.helper", "store"),
        ("http.proxy", "http://proxy:1"),
        ("safe.directory", '/srv/a "b"'),
    ]
    assert 'directory = "/srv/a \\"b\\""' in (repo.path / "client.gitconfig").read_text()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("https://user:secret@example.org/hub.git/", "https://user:secret@example.org/hub.git"),
        ("HTTPS://example.org:8443/a", "https://example.org:8443/a"),
        ("ssh://git@example.org:22/hub.git", "ssh://git@example.org:22/hub.git"),
        ("git@example.org:team/hub.git", "git@example.org:team/hub.git"),
        ("http://127.0.0.1:8000/hub.git", "http://127.0.0.1:8000/hub.git"),
        ("http://[::1]:8000/hub.git", "http://[::1]:8000/hub.git"),
        ("file:///srv/my%20hub.git", "/srv/my hub.git"),
        ("/srv/../srv/hub.git", "/srv/hub.git"),
        ("/srv/a::b", "/srv/a::b"),
    ],
)
def test_addresses_have_one_spelling(given: str, means: str) -> None:
    assert normalise_url(given) == means
    assert normalise_url(means) == means


@pytest.mark.parametrize(
    "hostile",
    [
        "",
        "-oProxyCommand=touch x",
        "--upload-pack=touch x",
        "ext::sh -c touch% x",
        "fd::17",
        "transport::/srv/hub.git",
        "git://example.org/hub.git",
        "ftp://example.org/hub.git",
        "javascript://example.org",
        "https://example.org/hub.git\n--upload-pack=x",
        "https://exa mple.org/hub.git",
        "https://-oProxyCommand=x/hub.git",
        "ssh://-oProxyCommand=x/hub.git",
        "ssh://-oProxyCommand=x@example.org/hub.git",
        "https:///hub.git",
        "https://example.org:port/hub.git",
        "https://example.org/hub.git?x=y",
        "http://example.org/hub.git",
        "http://127.0.0.1.example.org/hub.git",
        "http://127.0.0.1@example.org/hub.git",
        "file://example.org/hub.git",
        "file://",
        "/srv/hub\0.git",
        " /srv/hub.git",
    ],
)
def test_addresses_that_could_do_something_else_are_refused(hostile: str) -> None:
    with pytest.raises(ConfigError):
        normalise_url(hostile)


@example("~nobody-has-this-name/hub.git")
@example("file://[")
@example("file:///a%0ab")
@given(st.text(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_an_address_or_a_clear_error(text: str) -> None:
    try:
        address = normalise_url(text)
    except ConfigError:
        return
    assert not address.startswith("-")
    assert normalise_url(address) == address
    if is_local(text):
        assert Path(address).is_absolute()


def test_passwords_are_not_shown() -> None:
    secret = "https://user:p%40ss@example.org/hub.git"
    assert redact(f"fatal: {secret}: no, {secret}") == (
        "fatal: https://example.org/hub.git: no, https://example.org/hub.git"
    )
    with pytest.raises(ConfigError) as refused:
        normalise_url("https://user:p%40ss@example.org/hub.git?x")
    assert "p%40ss" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "main",
        "refs/heads/a..b",
        "refs/heads/a b",
        "refs/heads/-\n",
        "refs/heads/a.lock",
        "refs/x/",
        "refs/heads/@{u}",
        "refs//x",
        "refs/.x",
        "--all",
        "refs/heads/a^",
        "refs/heads/a:b",
        "refs/*",
    ],
)
def test_names_that_git_might_take_for_something_else_are_refused(repo: HubRepo, name: str) -> None:
    oid = commit(repo, {"a": b"1"})
    for attempt in (
        lambda: repo.fetch({name: "refs/kept/a"}),
        lambda: repo.fetch({MAIN: name}),
        lambda: repo.push([RefUpdate(name, oid, None)]),
        lambda: repo.set_ref(name, oid),
        lambda: repo.delete_refs(name),
        lambda: repo.resolve(name),
        lambda: repo.entries(name),
    ):
        with pytest.raises(CorruptRecord):
            attempt()
