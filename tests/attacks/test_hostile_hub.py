"""A hub that means harm: nothing of it is executed, nothing is written outside the store."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from moshi_fl.errors import ConfigError, CorruptRecord, HubError, MoshiError, UntrustedHub
from moshi_fl.store import HubRepo, RefUpdate, create_hub
from tests.support.http_hub import Faults, serve
from tests.support.hubs import commit, files_below, git, noise, prepared, publish

MAIN = "refs/heads/main"
WHO = "Test <test@example.org> 1 +0000"


@pytest.fixture(autouse=True)
def nothing_escapes(tmp_path: Path) -> Iterator[None]:
    """Whatever happens in a test, only the folders that it names exist afterwards."""
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("served", "store", "author", "moshi-home", "user.gitconfig", "elsewhere.git")
    }


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    create_hub(tmp_path / "served" / "hub.git")
    return tmp_path / "served" / "hub.git"


@pytest.fixture(params=["folder", "http"])
def address(request: pytest.FixtureRequest, hub: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(hub)
        return
    with serve(hub.parent) as base:
        yield f"{base}/hub.git"


@pytest.fixture
def store(tmp_path: Path, address: str) -> HubRepo:
    return prepared(tmp_path / "store", address)


def raw(hub: Path, kind: str, content: bytes) -> str:
    """An object of any content, written past all of Git's checks."""
    framed = f"{kind} {len(content)}\0".encode() + content
    oid = hashlib.sha1(framed).hexdigest()
    file = hub / "objects" / oid[:2] / oid[2:]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(zlib.compress(framed, 1))
    return oid


def raw_tree(hub: Path, *entries: tuple[str, bytes, str]) -> str:
    lines = (
        mode.encode() + b" " + name + b"\0" + bytes.fromhex(oid) for mode, name, oid in entries
    )
    return raw(hub, "tree", b"".join(lines))


def offer(hub: Path, tree: str, ref: str = MAIN) -> str:
    oid = raw(hub, "commit", f"tree {tree}\nauthor {WHO}\ncommitter {WHO}\n\nx\n".encode())
    file = hub / ref
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(oid + "\n")
    return oid


HOSTILE_NAMES = [b"..", b".", b".git", b".GIT", b"git~1", b"a/b", b"", b".git\xe2\x80\x8c"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_would_escape_never_enter_the_store(
    hub: Path, store: HubRepo, name: bytes
) -> None:
    blob = raw(hub, "blob", b"#!/bin/sh\n")
    before = files_below(store.path)
    offer(hub, raw_tree(hub, ("100644", name, blob)))
    with pytest.raises(HubError, match="broken answer"):
        store.fetch({MAIN: MAIN})
    assert files_below(store.path) - before <= {"FETCH_HEAD"}
    assert store.refs("refs/") == {}


def test_links_submodules_and_scripts_are_listed_as_what_they_are_and_never_read(
    hub: Path, store: HubRepo
) -> None:
    blob = raw(hub, "blob", b"/etc/passwd")
    tree = raw_tree(
        hub,
        ("100644", b".gitattributes", blob),
        ("160000", b"module", "1" * 40),
        ("120000", b"round.json", blob),
        ("100755", b"run", blob),
    )
    oid = offer(hub, tree)
    store.fetch({MAIN: MAIN})
    entries = {entry.path: entry for entry in store.entries(oid)}
    found = {path: (entry.mode, entry.is_plain_file) for path, entry in entries.items()}
    assert found == {
        ".gitattributes": ("100644", True),
        "module": ("160000", False),
        "round.json": ("120000", False),
        "run": ("100755", False),
    }
    for path in ("round.json", "module", "run"):
        with pytest.raises(CorruptRecord, match="no plain file"):
            store.read(oid, path, limit=1000)
        with pytest.raises(CorruptRecord, match="no plain file"):
            store.stream(oid, entries[path], io.BytesIO(), limit=1000)


def test_attributes_of_the_hub_change_no_byte(hub: Path, store: HubRepo) -> None:
    text = b"$Id$ line\r\n"
    attributes = b"* text eol=lf ident filter=evil -delta\n"
    oid = offer(
        hub,
        raw_tree(
            hub,
            ("100644", b".gitattributes", raw(hub, "blob", attributes)),
            ("100644", b"a", raw(hub, "blob", text)),
        ),
    )
    store.fetch({MAIN: MAIN})
    assert store.read(oid, "a", limit=100) == text


def test_names_with_control_characters_are_told_apart(hub: Path, store: HubRepo) -> None:
    blob = raw(hub, "blob", b"x")
    names = [b"100644 blob\tx", b"a\nb", b"\x1b[31m", b"\xff\xfe", b"*"]
    oid = offer(hub, raw_tree(hub, *(("100644", name, blob) for name in sorted(names))))
    store.fetch({MAIN: MAIN})
    paths = {entry.path for entry in store.entries(oid)}
    assert paths == {"100644 blob\tx", "a\nb", "\x1b[31m", "\\xff\\xfe", "*"}
    with pytest.raises(CorruptRecord):
        store.read(oid, "a\nb", limit=10)
    assert store.read(oid, "*", limit=10) == b"x"


def test_a_tree_that_unfolds_without_end_is_cut_off(hub: Path, store: HubRepo) -> None:
    blob = raw(hub, "blob", b"x")
    tree = raw_tree(hub, *(("100644", b"%d" % n, blob) for n in range(10)))
    for _ in range(9):  # ten to the tenth files in eleven small objects
        tree = raw_tree(hub, *(("40000", b"%d" % n, tree) for n in range(10)))
    oid = offer(hub, tree)
    store.fetch({MAIN: MAIN}, max_bytes=1000)
    with pytest.raises(CorruptRecord, match="listing is too long"):
        store.entries(oid, limit=1000)


def test_a_file_larger_than_announced_is_refused_for_a_kilobyte(hub: Path, store: HubRepo) -> None:
    bomb = raw(hub, "blob", bytes(100_000_000))  # 400 KB on the wire
    offer(hub, raw_tree(hub, ("100644", b"w", bomb)))
    before = files_below(store.path)
    with pytest.raises(UntrustedHub, match="a file of more than 1000000 bytes"):
        store.fetch({MAIN: MAIN}, max_bytes=1_000_000)
    assert files_below(store.path) - before <= {"FETCH_HEAD"}
    assert store.refs("refs/") == {}


def test_many_files_that_are_larger_together_are_refused_in_mid_transfer(
    hub: Path, store: HubRepo
) -> None:
    blobs = [raw(hub, "blob", noise(400_000)) for _ in range(10)]
    offer(hub, raw_tree(hub, *(("100644", b"%d" % n, blob) for n, blob in enumerate(blobs))))
    before = files_below(store.path)
    with pytest.raises(UntrustedHub, match="sends more than 500000 bytes"):
        store.fetch({MAIN: MAIN}, max_bytes=500_000)
    assert files_below(store.path) - before <= {"FETCH_HEAD"}


def test_a_hub_that_ignores_the_filter_meets_the_limit(tmp_path: Path, hub: Path) -> None:
    git(hub, "config", "uploadpack.allowFilter", "false")
    offer(hub, raw_tree(hub, ("100644", b"w", raw(hub, "blob", noise(5_000_000)))))
    with serve(hub.parent) as base:
        store = prepared(tmp_path / "store", f"{base}/hub.git")
        before = files_below(store.path)
        with pytest.raises(UntrustedHub, match="sends more than 500000 bytes"):
            store.fetch({MAIN: MAIN}, max_bytes=500_000)
        assert files_below(store.path) - before <= {"FETCH_HEAD"}


def test_streaming_a_bomb_stops_at_its_size_in_the_tree(hub: Path, store: HubRepo) -> None:
    bomb = raw(hub, "blob", bytes(30_000_000))
    oid = offer(hub, raw_tree(hub, ("100644", b"w", bomb)))
    store.fetch({MAIN: MAIN})
    out = io.BytesIO()
    with pytest.raises(CorruptRecord, match="30000000 bytes, the limit is 1000"):
        store.stream(oid, *store.entries(oid), out, limit=1000)
    assert out.getvalue() == b""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_a_large_file_is_streamed_in_little_memory(tmp_path: Path, hub: Path) -> None:
    store = prepared(tmp_path / "store", hub)
    oid = commit(store, {"w": noise(100_000_000)})
    script = (
        "import sys, resource; from pathlib import Path; from moshi_fl.store import HubRepo\n"
        "repo = HubRepo(Path(sys.argv[1]), sys.argv[2]); (w,) = repo.entries(sys.argv[3])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with open('/dev/null', 'wb') as out: repo.stream(sys.argv[3], w, out, limit=1 << 30)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)\n"
    )
    argv = [sys.executable, "-c", script, str(store.path), store.url, oid]
    grown = int(subprocess.run(argv, check=True, capture_output=True).stdout)
    assert grown < 24 * 1024


def test_another_commit_than_promised_is_not_taken(hub: Path, store: HubRepo) -> None:
    offer(hub, raw_tree(hub, ("100644", b"w", raw(hub, "blob", noise(2_000_000)))))
    before = files_below(store.path)
    with pytest.raises(UntrustedHub, match="its records promise"):
        store.fetch({MAIN: MAIN}, expect={MAIN: "1" * 40})
    assert files_below(store.path) - before <= {"FETCH_HEAD"}
    assert store.refs("refs/") == {}


def test_a_rewound_hub_is_seen(tmp_path: Path, hub: Path, store: HubRepo) -> None:
    author = prepared(tmp_path / "author", hub)
    first = publish(author, MAIN, {"round": b"0"})
    second = commit(author, {"round": b"1"}, parents=(first,))
    author.push([RefUpdate(MAIN, second, first)])
    store.fetch({MAIN: MAIN})
    git(hub, "update-ref", MAIN, first)
    seen = store.resolve(MAIN)
    now = store.fetch({MAIN: "refs/incoming/main"})["refs/incoming/main"]
    assert not store.is_ancestor(seen, now)
    assert store.resolve(MAIN) == second


def arm(hub: Path, trap: str) -> None:
    """Make everything that a repository's own config can run, run ``trap``."""
    hooks = hub / "hooks"
    hooks.mkdir()
    names = ["pre-receive", "update", "post-receive", "post-update", "reference-transaction"]
    for name in [*names, "proc-receive", "push-to-checkout", "post-checkout", "pre-push"]:
        (hooks / name).write_text(f"#!/bin/sh\n{trap}\n")
        (hooks / name).chmod(0o755)
    for key, value in {
        "core.hooksPath": str(hooks),
        "core.fsmonitor": trap,
        "core.alternateRefsCommand": trap,
        "core.sshCommand": trap,
        "core.pager": trap,
        "core.gitProxy": trap,
        "uploadpack.packObjectsHook": trap,
        "receive.denyCurrentBranch": "updateInstead",
        "filter.evil.smudge": trap,
        "filter.evil.clean": trap,
        "gpg.program": trap,
        "credential.helper": f"!{trap}",
        "gc.auto": "1",
        "receive.autogc": "true",
        "extensions.partialClone": "origin",
        "remote.origin.promisor": "true",
        "remote.origin.url": str(hub),
        "remote.origin.uploadpack": trap,
    }.items():
        git(hub, "config", key, value)


def test_a_hub_on_this_machine_runs_nothing_of_its_own(tmp_path: Path, hub: Path) -> None:
    create_hub(tmp_path / "elsewhere.git")
    trap = f"touch '{tmp_path / 'trapped'}'"
    arm(hub, trap)
    (hub / "objects" / "info").mkdir(exist_ok=True)
    (hub / "objects" / "info" / "alternates").write_text(
        f"{tmp_path / 'elsewhere.git' / 'objects'}\n"
    )
    store = prepared(tmp_path / "store", hub)
    oid = publish(store, MAIN, {".gitattributes": b"* filter=evil\n", "a": b"1"})
    store.push([RefUpdate("refs/heads/x", oid, None)])
    store.push([RefUpdate("refs/heads/x", None, oid)])
    assert store.remote_refs() == {MAIN: oid}
    other = prepared(tmp_path / "author", hub)
    other.fetch({MAIN: MAIN}, max_bytes=1000)
    assert other.read(oid, "a", limit=10) == b"1"
    # An object is missing: Git would ask the "origin" of the hub for it.
    missing = offer(hub, raw_tree(hub, ("100644", b"gone", "1" * 40)), "refs/heads/gap")
    with pytest.raises(MoshiError):
        other.fetch({"refs/heads/gap": "refs/heads/gap"})
    assert other.refs("refs/heads/gap") == {}
    assert missing
    assert not (tmp_path / "trapped").exists()


def test_the_trap_of_these_tests_does_snap(tmp_path: Path, hub: Path) -> None:
    """The same hub, used by plain Git, runs its hooks: so the test above can fail."""
    trapped = hub / "trapped"
    arm(hub, f"touch '{trapped}'")
    store = prepared(tmp_path / "store", hub)
    oid = commit(store, {"a": b"1"})
    subprocess.run(
        ["git", "--git-dir", str(store.path), "push", "-q", str(hub), f"{oid}:{MAIN}"],
        check=False,
        capture_output=True,
    )
    assert trapped.exists()


def test_templates_and_hooks_of_the_user_do_not_reach_the_store(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = hub / "template"
    (template / "hooks").mkdir(parents=True)
    (template / "hooks" / "reference-transaction").write_text(f"#!/bin/sh\ntouch {hub}/trapped\n")
    (template / "hooks" / "reference-transaction").chmod(0o755)
    config = tmp_path / "user.gitconfig"
    config.write_text(
        f"[init]\n\ttemplateDir = {template}\n[core]\n\thooksPath = {template}/hooks\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(template))
    publish(prepared(tmp_path / "store", hub), MAIN, {"a": b"1"})
    assert not (tmp_path / "store" / "hooks").exists()
    assert not (hub / "trapped").exists()


@pytest.mark.parametrize(
    "url",
    [
        "ext::sh -c touch% {trap}",
        "--upload-pack=touch {trap}",
        "-u touch {trap}",
        "ssh://-oProxyCommand=touch {trap}/x",
        "git@-oProxyCommand=touch:{trap}",
        "fd::0",
    ],
)
def test_an_address_that_runs_a_command_is_no_address(tmp_path: Path, url: str) -> None:
    with pytest.raises((ConfigError, HubError)):
        prepared(tmp_path / "store", url.format(trap=tmp_path / "trapped")).remote_refs()
    assert not (tmp_path / "trapped").exists()


def advertise(*lines: bytes) -> bytes:
    packets = [b"# service=git-upload-pack\n", b"", *lines, b""]
    return b"".join(b"%04x%s" % (len(p) + 4, p) if p else b"0000" for p in packets)


def test_refs_with_hostile_names_are_not_passed_on(tmp_path: Path, hub: Path) -> None:
    oid = b"1" * 40
    names = [b"refs/heads/ok", b"refs/heads/../../x", b"refs/heads/a\x1b[31m", b"--all", b"HEAD"]
    lines = [oid + b" " + name + b"\n" for name in names]
    lines[0] = lines[0].rstrip() + b"\0report-status\n"
    faults = Faults(garbage=advertise(*lines))
    with serve(hub.parent, faults=faults) as base:
        store = prepared(tmp_path / "store", f"{base}/hub.git")
        assert store.remote_refs() == {"refs/heads/ok": oid.decode()}


def test_a_hub_that_chatters_fills_no_memory(tmp_path: Path, hub: Path) -> None:
    """Messages of a server go to stderr, however many there are."""
    hook = hub / "hooks" / "pre-receive"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nyes 'buy now' | head -c 10000000 >&2\nexit 1\n")
    hook.chmod(0o755)
    with serve(hub.parent) as base:
        store = prepared(tmp_path / "store", f"{base}/hub.git")
        with pytest.raises(HubError, match="refused the push") as refused:
            publish(store, MAIN, {"a": b"1"})
    assert len(str(refused.value)) < 1500
