"""Both transports, bad networks, many pushers at once, processes that are killed in the middle."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moshi_fl.errors import HubError, MoshiError
from moshi_fl.replica import Replica
from moshi_fl.store import HubRepo, PushRejected, RefUpdate, create_hub
from tests.support.http_hub import Faults, serve
from tests.support.hubs import commit, files_below, git, noise, prepared, publish

MAIN = "refs/heads/main"
PASSWORD = "p@ss:w/rd"


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    create_hub(tmp_path / "served" / "hub.git")
    return tmp_path / "served"


@pytest.fixture(params=["folder", "http"])
def address(request: pytest.FixtureRequest, root: Path, faults: Faults) -> Iterator[str]:
    if request.param == "folder":
        yield str(root / "hub.git")
        return
    with serve(root, faults=faults) as base:
        yield f"{base}/hub.git"


@pytest.fixture
def web(root: Path, faults: Faults) -> Iterator[str]:
    with serve(root, faults=faults) as base:
        yield f"{base}/hub.git"


def test_a_round_trip_of_a_large_file(tmp_path: Path, address: str) -> None:
    weights = noise(9_000_000)  # well above the 1 MiB from which Git sends chunks over HTTP
    repo = prepared(tmp_path / "a", address)
    assert repo.remote_refs() == {}
    oid = publish(repo, "refs/moshi/keyframe/0", {"w": weights, "manifest": b"{}"})
    assert repo.remote_refs("refs/moshi/") == {"refs/moshi/keyframe/0": oid}
    other = prepared(tmp_path / "b", address)
    ref = "refs/moshi/keyframe/0"
    got = other.fetch({ref: "refs/kept/0"}, max_bytes=len(weights) + 2, expect={ref: oid})
    assert got == {"refs/kept/0": oid}
    assert other.read(oid, "w", limit=len(weights)) == weights
    assert not [name for name in files_below(other.path) if name.endswith((".promisor", ".keep"))]


def test_twenty_contributors_push_at_the_same_moment(
    tmp_path: Path, address: str, root: Path
) -> None:
    start = threading.Barrier(20)
    repos = [prepared(tmp_path / f"contributor-{n}", address) for n in range(20)]
    oids = [commit(repo, {"record": b"%d" % n}, when=n) for n, repo in enumerate(repos)]

    def contribute(n: int) -> None:
        start.wait()
        record = RefUpdate(f"refs/heads/contribute/1/{n}", oids[n], None)
        repos[n].push([record, RefUpdate(f"refs/moshi/delta/1/{n}", oids[n], None)])

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(contribute, range(20)))
    wanted = {f"refs/heads/contribute/1/{n}": oids[n] for n in range(20)}
    wanted |= {f"refs/moshi/delta/1/{n}": oids[n] for n in range(20)}
    assert repos[0].remote_refs() == wanted
    git(root / "hub.git", "fsck", "--strict", "--no-dangling")


def test_of_five_racing_merges_exactly_one_wins(tmp_path: Path, address: str) -> None:
    base = publish(prepared(tmp_path / "first", address), MAIN, {"round": b"0"})
    start = threading.Barrier(5)

    def merge(n: int) -> str | tuple[str, ...]:
        repo = prepared(tmp_path / f"merger-{n}", address)
        repo.fetch({MAIN: MAIN})
        oid = commit(repo, {"round": b"1 by %d" % n}, parents=(base,))
        start.wait()
        try:
            repo.push([RefUpdate(MAIN, oid, base), RefUpdate(f"refs/moshi/by/{n}", oid, None)])
        except PushRejected as rejected:
            return rejected.refs
        return oid

    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(merge, range(5)))
    (winner,) = [result for result in results if isinstance(result, str)]
    assert [result for result in results if result != winner] == [(MAIN,)] * 4
    refs = prepared(tmp_path / "reader", address).remote_refs()
    assert refs == {MAIN: winner, f"refs/moshi/by/{results.index(winner)}": winner}


def test_the_same_push_four_times_at_once_is_fine(tmp_path: Path, address: str) -> None:
    """As when a killed push still comes through while its successor pushes again."""
    repos = [prepared(tmp_path / f"again-{n}", address) for n in range(4)]
    oids = {commit(repo, {"record": b"1"}) for repo in repos}
    assert len(oids) == 1
    updates = [RefUpdate(f"refs/heads/contribute/{n}", min(oids), None) for n in range(5)]
    start = threading.Barrier(4)

    def contribute(repo: HubRepo) -> None:
        start.wait()
        repo.push(updates)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(contribute, repos))
    assert repos[0].remote_refs() == {update.ref: update.new for update in updates}


def test_a_push_whose_answer_was_lost_can_be_sent_again(
    tmp_path: Path, web: str, faults: Faults
) -> None:
    repo = prepared(tmp_path / "a", web, timeout=20)
    update = RefUpdate(MAIN, commit(repo, {"a": b"1"}), None)
    faults.on, faults.cut_after = "git-receive-pack", 0
    with pytest.raises(HubError):
        repo.push([update])
    faults.cut_after = None
    repo.push([update])
    assert repo.remote_refs() == {MAIN: update.new}


def test_pushing_needs_the_password_and_reading_does_not(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(root, user="anna", password=PASSWORD) as base:
        url = f"{base}/hub.git"
        with_login = url.replace("//", "//anna:p%40ss%3Aw%2Frd@")
        oid = publish(prepared(tmp_path / "a", with_login), MAIN, {"a": b"1"})
        reader = prepared(tmp_path / "b", url)
        assert reader.fetch({MAIN: MAIN}) == {MAIN: oid}
        with pytest.raises(HubError, match="refused access") as refused:
            publish(reader, "refs/heads/other", {"a": b"2"})
        assert "credential helper" in refused.value.hint
        with pytest.raises(HubError, match="refused access") as refused:
            publish(
                prepared(tmp_path / "c", url.replace("//", "//anna:wr0ng@")),
                "refs/heads/x",
                {"a": b"2"},
            )
        assert "wr0ng" not in str(refused.value)
        monkeypatch.setenv("MOSHI_FL_TOKEN", PASSWORD)
        with pytest.raises(HubError, match="refused access"):
            publish(prepared(tmp_path / "d", url), "refs/heads/x", {"a": b"2"})


def test_a_token_or_the_users_credential_helper_opens_a_private_hub(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(root, user="x-access-token", password=PASSWORD, private=True) as base:
        with pytest.raises(HubError, match="refused access"):
            prepared(tmp_path / "a", f"{base}/hub.git").remote_refs()
        with monkeypatch.context() as patch:
            patch.setenv("MOSHI_FL_TOKEN", PASSWORD)
            assert prepared(tmp_path / "b", f"{base}/hub.git").remote_refs() == {}
        config = tmp_path / "user.gitconfig"
        config.write_text(
            '[credential]\n\thelper = "!f() { echo username=x-access-token; '
            f"echo 'password={PASSWORD}'; }}; f\"\n"
        )
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
        assert prepared(tmp_path / "c", f"{base}/hub.git").remote_refs() == {}


def test_the_token_is_shown_to_the_hubs_own_server_only(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_TOKEN", PASSWORD)
    create_hub(root / "other.git")
    with serve(root, user="x-access-token", password=PASSWORD, private=True) as base:
        hub = Replica(f"{base}/hub.git", tmp_path / "home")
        assert hub.repo.remote_refs() == hub.beside(f"{base}/other.git").repo.remote_refs() == {}
        with hub.beside(f"{base}/other.git").scratch() as scratch:
            assert scratch.remote_refs() == {}
        elsewhere = Faults()
        with serve(root, user="x-access-token", password=PASSWORD, private=True,
                   faults=elsewhere) as stranger:  # fmt: skip
            other = hub.beside(f"{stranger}/other.git")
            with pytest.raises(HubError, match="refused access"):
                other.repo.remote_refs()
            with other.scratch() as scratch, pytest.raises(HubError, match="refused access"):
                scratch.remote_refs()
        assert elsewhere.seen
        assert not elsewhere.logins


def test_no_password_is_in_any_command_line(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    original = subprocess.Popen.__init__

    def noting(self, args, **options):
        started.append(repr(args))
        original(self, args, **options)

    with serve(root, user="anna", password=PASSWORD, private=True) as base:
        monkeypatch.setattr(subprocess.Popen, "__init__", noting)
        url = f"{base}/hub.git".replace("//", "//anna:p%40ss%3Aw%2Frd@")
        publish(prepared(tmp_path / "a", url), MAIN, {"a": b"1"})
    encoded = base64.b64encode(f"anna:{PASSWORD}".encode()).decode()
    assert any("push" in line for line in started)
    assert not [line for line in started if "p%40ss" in line or PASSWORD in line or encoded in line]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Faults(status=401), "refused access"),
        (Faults(status=403), "refused access"),
        (Faults(status=404), "there is no hub"),
        (Faults(status=500), "failed|broken answer"),
        (Faults(garbage=b"<html>Welcome to the airport</html>"), "broken answer"),
        (Faults(garbage=b""), "broken answer"),
        (Faults(garbage=b"001e# service=git-upload-pack\n0000zzzz"), "broken answer"),
        (Faults(on="info/refs", cut_after=20), "broken answer|cannot be reached"),
    ],
)
def test_a_broken_server_is_one_clear_error(
    tmp_path: Path, root: Path, fault: Faults, told: str
) -> None:
    with serve(root, faults=fault) as base:
        repo = prepared(tmp_path / "a", f"{base}/hub.git", timeout=20)
        with pytest.raises(HubError, match=told):
            repo.remote_refs()
        with pytest.raises(HubError, match=told):
            repo.fetch({MAIN: MAIN})


@pytest.mark.parametrize("bytes_sent", [0, 10, 400, 100_000, 2_900_000])
def test_an_answer_cut_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, web: str, faults: Faults, bytes_sent: int
) -> None:
    weights = noise(3_000_000)
    oid = publish(prepared(tmp_path / "a", web), MAIN, {"w": weights})
    repo = prepared(tmp_path / "b", web, timeout=20)
    before = files_below(repo.path)
    faults.on, faults.cut_after = "git-upload-pack", bytes_sent
    with pytest.raises(HubError):
        repo.fetch({MAIN: MAIN}, max_bytes=len(weights))
    assert files_below(repo.path) - before <= {"FETCH_HEAD"}
    assert repo.refs("refs/") == {}
    faults.cut_after = None
    assert repo.fetch({MAIN: MAIN}, max_bytes=len(weights)) == {MAIN: oid}


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, web: str, faults: Faults) -> None:
    faults.stall = threading.Event()
    repo = prepared(tmp_path / "a", web, timeout=0.5)
    with pytest.raises(HubError, match=r"did not finish within 0\.5 s|stopped answering"):
        repo.remote_refs()


def test_a_server_that_never_stops_talking_is_given_up(
    tmp_path: Path, web: str, faults: Faults
) -> None:
    faults.on, faults.flood = "info/refs", b"x" * 100_000
    repo = prepared(tmp_path / "a", web, timeout=1)
    with pytest.raises(HubError):
        repo.remote_refs()


def test_nobody_listens_at_the_address(tmp_path: Path, root: Path) -> None:
    with serve(root) as base:
        pass
    with pytest.raises(HubError, match="cannot be reached"):
        prepared(tmp_path / "a", f"{base}/hub.git").remote_refs()


def test_a_push_larger_than_the_hub_takes_is_refused(tmp_path: Path, root: Path, web: str) -> None:
    create_hub(root / "hub.git", max_push_bytes=100_000)
    with pytest.raises(HubError, match="too big"):
        publish(prepared(tmp_path / "a", web), MAIN, {"w": noise(200_000)})


def test_a_hub_that_says_no_is_quoted(tmp_path: Path, root: Path, web: str) -> None:
    hook = root / "hub.git" / "hooks" / "pre-receive"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nprintf 'only on \\033[31mTuesdays\\n' >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(HubError, match="refused the push") as refused:
        publish(prepared(tmp_path / "a", web), MAIN, {"a": b"1"})
    assert "only on" in str(refused.value)
    assert "\033" not in str(refused.value)
    assert not isinstance(refused.value, PushRejected)


# Killed in the middle.

CHILD = """
import sys
from pathlib import Path
from moshi_fl.store import HubRepo, RefUpdate
path, url, verb, oid = sys.argv[1:]
repo = HubRepo(Path(path), url)
repo.resolve(oid or "0" * 40)  # everything is loaded
print("go", flush=True)
if verb == "fetch":
    repo.fetch({"refs/heads/main": "refs/heads/main"}, max_bytes=20_000_000)
else:
    repo.push([RefUpdate("refs/heads/main", oid, None), RefUpdate("refs/moshi/w", oid, None)])
"""


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def run_and_kill(repo: HubRepo, verb: str, oid: str, after: float) -> None:
    argv = [sys.executable, "-c", CHILD, str(repo.path), repo.url, verb, oid]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout.readline() == b"go\n"
        try:
            child.wait(after)
        except subprocess.TimeoutExpired:
            for pid in descendants(child.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


needs_proc = pytest.mark.skipif(
    not Path("/proc/1/stat").exists(), reason="no /proc to find children"
)


@needs_proc
@pytest.mark.parametrize("part", [0.1, 0.35, 0.6, 0.85])
def test_a_killed_fetch_is_recovered(tmp_path: Path, address: str, part: float) -> None:
    weights = noise(8_000_000)
    oid = publish(prepared(tmp_path / "a", address), MAIN, {"w": weights})
    began = time.monotonic()
    prepared(tmp_path / "measured", address).fetch({MAIN: MAIN}, max_bytes=20_000_000)
    whole = time.monotonic() - began
    repo = prepared(tmp_path / "killed", address)
    run_and_kill(repo, "fetch", oid, part * whole)
    for name in ("shallow.lock", "packed-refs.lock", "index.lock", "refs/heads/main.lock"):
        (repo.path / name).touch()
    (repo.path / "objects" / "pack" / "tmp_pack_x").write_bytes(b"PACK")
    (repo.path / "objects" / "pack" / ".tmp-1-pack-x.pack").write_bytes(b"PACK")
    (repo.path / "moshi-scratch" / "x").mkdir(parents=True)
    repo.recover()
    left = files_below(repo.path)
    assert not [name for name in left if name.endswith((".lock", ".keep")) and "moshi" not in name]
    assert not [name for name in left if "tmp" in name or "scratch" in name]
    assert repo.fetch({MAIN: MAIN}, max_bytes=20_000_000) == {MAIN: oid}
    assert repo.read(oid, "w", limit=len(weights)) == weights


@needs_proc
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_killed_push_is_recovered(tmp_path: Path, address: str, root: Path, part: float) -> None:
    repo = prepared(tmp_path / "killed", address)
    oid = commit(repo, {"w": noise(8_000_000)})
    began = time.monotonic()
    repo.push([RefUpdate("refs/heads/measured", commit(repo, {"w": noise(8_000_000)}), None)])
    whole = time.monotonic() - began
    run_and_kill(repo, "push", oid, part * whole)
    repo.prepare()
    repo.push([RefUpdate(MAIN, oid, None), RefUpdate("refs/moshi/w", oid, None)])
    refs = repo.remote_refs()
    assert refs[MAIN] == refs["refs/moshi/w"] == oid
    git(root / "hub.git", "fsck", "--strict", "--no-dangling")


def test_a_fresh_lock_of_a_killed_push_in_a_hub_on_this_machine_is_waited_out(
    tmp_path: Path, root: Path
) -> None:
    repo = prepared(tmp_path / "a", root / "hub.git")
    lock = root / "hub.git" / "refs" / "heads" / "main.lock"
    lock.touch()
    almost = time.time() - 4.5  # it becomes stale after five seconds
    os.utime(lock, (almost, almost))
    repo.recover()
    assert not lock.exists()
    oid = publish(repo, MAIN, {"a": b"1"})
    assert repo.remote_refs() == {MAIN: oid}


def test_what_a_killed_push_left_in_a_hub_on_this_machine_goes_when_it_is_old(
    tmp_path: Path, root: Path
) -> None:
    hub = root / "hub.git"
    repo = prepared(tmp_path / "a", hub)
    old, young = hub / "objects" / "tmp_objdir-incoming-old", hub / "objects" / "tmp_objdir-new"
    for folder in (old, young):
        (folder / "pack").mkdir(parents=True)
    kept = hub / "objects" / "pack" / "pack-1.keep"
    for file in (old / "pack" / "tmp_pack_1", kept, hub / "packed-refs.lock"):
        file.touch()
    for path in (old, old / "pack", old / "pack" / "tmp_pack_1", kept, hub / "packed-refs.lock"):
        os.utime(path, (1, 1))
    repo.recover()
    assert not old.exists()
    assert not (hub / "packed-refs.lock").exists()
    assert young.exists()
    assert kept.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if (
        sys.platform != "linux"
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_nothing_half_stays(
    tmp_path: Path, address: str, small_disk: Path
) -> None:
    big = publish(prepared(tmp_path / "a", address), MAIN, {"w": noise(8_000_000)})
    repo = prepared(small_disk / "store", address)
    small = publish(repo, "refs/heads/small", {"a": b"1"})
    before = files_below(repo.path)
    with pytest.raises(MoshiError, match=r"No space left on the disk of .*small-disk"):
        repo.fetch({MAIN: MAIN})
    with pytest.raises(MoshiError, match=r"No space left on the disk of .*small-disk"):
        repo.put(noise(8_000_000))
    repo.recover()
    assert files_below(repo.path) - before <= {"FETCH_HEAD"}
    reader = prepared(tmp_path / "b", address)
    reader.fetch({MAIN: MAIN})
    with (small_disk / "out").open("wb") as out, pytest.raises(MoshiError, match="No space left"):
        reader.stream(big, *reader.entries(big), out, limit=8_000_000)
    (small_disk / "out").unlink()
    assert repo.fetch({"refs/heads/small": "refs/kept/small"}) == {"refs/kept/small": small}


def test_a_hub_with_a_full_disk_says_so(tmp_path: Path, small_disk: Path) -> None:
    create_hub(small_disk / "hub.git")
    with serve(small_disk) as base:
        repo = prepared(tmp_path / "a", f"{base}/hub.git")
        with pytest.raises(HubError):
            publish(repo, MAIN, {"w": noise(8_000_000)})
        publish(repo, MAIN, {"w": noise(1_000)})
