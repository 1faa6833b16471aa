"""The gate against every way to be wrong: real submissions on a real hub, each falsified in one
respect, and each refused for that reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from moshi_fl.history import MAIN, contribution_branch, contribution_path
from moshi_fl.records import File, dump
from moshi_fl.store import ANY, Author, RefUpdate
from moshi_hub.verify import REASONS
from tests.support.simulator import HubSimulator, random_delta


def test_an_honest_contribution_is_accepted(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    verdict = hub.verdicts()[record.id]
    assert verdict.accepted
    assert verdict.norm
    assert verdict.norm > 0


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(edit: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def mutate(data: bytes) -> bytes:
        header, body = header_of(data)
        edit(header)
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + body

    return mutate


def rename(header: dict) -> None:
    header["stranger.weight"] = header.pop("fc_out.weight")


def reshape(header: dict) -> None:
    header["fc_out.weight"]["shape"] = [header["fc_out.weight"]["shape"][0], 1]


def retype(header: dict) -> None:
    header["fc_out.weight"]["dtype"] = "I8"


def overlap(header: dict) -> None:
    entry = header["fc_out.weight"]
    entry["data_offsets"] = [entry["data_offsets"][0] - 4, entry["data_offsets"][1] - 4]


def with_nan(data: bytes) -> bytes:
    return data[:-4] + np.float32(np.nan).tobytes()


def duplicate_key(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    entry = text[text.index(b'"fc_out.bias"') : text.index(b"}", text.index(b'"fc_out.bias"')) + 1]
    text = text[:-1] + b"," + entry + b"}"
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def huge_header(data: bytes) -> bytes:
    return (2 << 20).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize(
    ("mutate", "code"),
    [
        (lambda _: b"", "not-safetensors"),
        (lambda _: b"PK\x03\x04" * 100, "not-safetensors"),
        (lambda data: data[:-1], "not-safetensors"),
        (lambda data: data + b"\0", "not-safetensors"),
        (duplicate_key, "not-safetensors"),
        (huge_header, "not-safetensors"),
        (with_header(overlap), "not-safetensors"),
        (with_header(rename), "unknown-tensor"),
        (with_header(reshape), "wrong-layout"),
        (with_header(retype), "wrong-layout"),
        (with_nan, "bad-values"),
        (lambda data: data + bytes(10**6), "oversize"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_falsified_delta_is_refused(tmp_path: Path, mutate, code: str) -> None:
    hub = HubSimulator.copied(tmp_path, delta={"codec": "f32"})
    delta = random_delta(hub.sync().load(), 1)
    del delta["embedding.weight"]  # leaves room below the size limit
    hub.contribute("eve", delta=delta, mutate=mutate)
    found = hub.codes()
    # A header that lies about shapes may already contradict itself.
    assert found == [code] or (code == "wrong-layout" and found == ["not-safetensors"])


def test_a_delta_of_zeros_is_refused(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path, delta={"codec": "f32"})
    zeros = {name: np.zeros_like(array) for name, array in hub.sync().load().items()}
    hub.contribute("idler", delta=zeros)
    assert hub.codes()[0] in {"empty", "zero-delta"}


def test_a_delta_beyond_the_norm_limit_is_refused(hub: HubSimulator) -> None:
    hub.contribute("shouter", delta=random_delta(hub.sync().load(), 1, scale=1e4))
    assert hub.codes() == ["over-norm"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"hub": "0" * 16}, "wrong-hub"),
        ({"family": "moc"}, "wrong-family"),
        ({"codec": "f32"}, "wrong-codec"),
        ({"base": "0" * 64}, "unknown-base"),
        ({"round": 7}, "unknown-base"),
    ],
)
def test_a_record_with_a_false_claim_is_refused(hub: HubSimulator, fields, code: str) -> None:
    hub.contribute("eve", **fields)
    assert hub.codes() == [code]


def test_a_base_that_is_too_old_is_refused(hub: HubSimulator) -> None:
    old = hub.sync("slow")
    hub.rounds(3)
    hub.contribute("slow", on=old, seed=99)
    assert hub.codes() == ["stale-base"]


def test_the_same_delta_twice_counts_once(hub: HubSimulator) -> None:
    delta = random_delta(hub.sync().load(), 1)
    hub.contribute("ann", delta=delta)
    hub.contribute("copier", delta=delta)
    assert hub.codes() == ["replay"]


def test_a_delta_of_an_earlier_round_is_a_replay(hub: HubSimulator) -> None:
    delta = random_delta(hub.sync().load(), 1)
    hub.contribute("ann", delta=delta)
    hub.merge()
    hub.contribute("ann", delta=delta)
    assert hub.codes() == ["replay"]


def test_a_delta_on_another_ref_is_refused(hub: HubSimulator) -> None:
    honest = hub.contribute("ann")
    moved = msgspec.structs.replace(honest.delta, ref="refs/moshi/keyframe/0")
    repo = hub.replica.repo
    record = msgspec.structs.replace(honest, delta=moved)
    hub.push_record(record)
    assert hub.verdicts()[record.id].findings[0].code == "wrong-ref"
    assert repo.remote_refs("refs/moshi/keyframe/0")


def test_a_branch_that_changes_more_is_refused(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.push_record(record, extra={"hub.toml": b"[hub]\n"})
    assert hub.codes() == ["extra-files"]


def test_a_record_in_another_spelling_is_refused(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.push_record(record, data=dump(record).replace(b": ", b":  ", 1))
    assert hub.codes() == ["bad-record"]


def test_a_record_under_another_id_is_refused(hub: HubSimulator) -> None:
    record, other = hub.contribute("ann"), hub.contribute("bob", seed=2)
    hub.push_record(record, data=dump(other))
    assert hub.codes() == ["wrong-id"]


def test_an_enormous_record_is_not_even_read(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.push_record(record, data=b"{" + b" " * 100_000 + b"}")
    assert hub.codes() == ["oversize"]


@pytest.mark.parametrize("mode", ["120000", "100755"])
def test_a_record_that_is_no_plain_file_is_refused(hub: HubSimulator, mode: str) -> None:
    record = hub.contribute("ann")
    repo, main = hub.replica.repo, hub.replica.fetch_main()
    path = contribution_path(record.round, record.id)
    tree = tree_with_mode(hub, main, path, repo.put(dump(record)), mode)
    commit = repo.commit(tree, parents=(main,), message="x\n", author=Author("eve", "e@x"), when=0)
    repo.push([RefUpdate(contribution_branch(record.round, record.id), commit, ANY)])
    assert hub.codes() == ["wrong-mode"]


def tree_with_mode(hub: HubSimulator, base: str, path: str, blob: str, mode: str) -> str:
    """A tree as no well-meaning tool would write it; made with Git's own index."""
    import os
    import subprocess

    folder = hub.replica.repo.path
    env = os.environ | {"GIT_DIR": str(folder), "GIT_INDEX_FILE": str(folder / "evil-index")}

    def git(*argv: str) -> str:
        done = subprocess.run(["git", *argv], env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("read-tree", base)
    git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")
    return git("write-tree")


def test_a_branch_with_a_history_of_its_own_is_refused(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    repo = hub.replica.repo
    path = contribution_path(record.round, record.id)
    tree = repo.tree({path: repo.put(dump(record))})
    orphan = repo.commit(tree, message="x\n", author=Author("eve", "e@x"), when=0)
    repo.push([RefUpdate(contribution_branch(record.round, record.id), orphan, ANY)])
    assert hub.codes() == ["wrong-history"]


def test_a_branch_on_commits_that_main_lacks_is_refused(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    repo, main = hub.replica.repo, hub.replica.fetch_main()
    author = Author("eve", "e@x")
    sneaky = repo.commit(
        repo.tree({"hub.toml": repo.put(b"x")}, base=main),
        parents=(main,),
        message="x\n",
        author=author,
        when=0,
    )
    path = contribution_path(record.round, record.id)
    tree = repo.tree({path: repo.put(dump(record))}, base=sneaky)
    commit = repo.commit(tree, parents=(sneaky,), message="x\n", author=author, when=0)
    repo.push([RefUpdate(contribution_branch(record.round, record.id), commit, ANY)])
    assert hub.codes() == ["wrong-history"]


@pytest.mark.parametrize("name", ["contribute/0/short", "contribute/00/" + "a" * 32])
def test_a_branch_with_a_false_name_is_refused(hub: HubSimulator, name: str) -> None:
    repo = hub.replica.repo
    hub.replica.pull()
    repo.push([RefUpdate(f"refs/heads/{name}", hub.replica.fetch_main(), ANY)])
    assert hub.codes() == ["wrong-branch"]


def test_a_delta_that_is_gone_is_missed(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    hub.replica.repo.push([RefUpdate(record.delta.ref, None, ANY)])
    assert hub.codes() == ["delta-missing"]


def test_a_delta_that_was_exchanged_is_noticed(hub: HubSimulator) -> None:
    record, other = hub.contribute("ann"), hub.contribute("bob", seed=2)
    replica = hub.person("ann")
    replica.repo.push([RefUpdate(record.delta.ref, _commit_of(hub, other), ANY)])
    assert hub.codes() == ["delta-mismatch"]


def _commit_of(hub: HubSimulator, record) -> str:
    repo = hub.person("ann").repo
    repo.fetch({record.delta.ref: "refs/moshi-fl/other"})
    return record.delta.commit


def test_a_delta_announced_as_huge_is_never_fetched(hub: HubSimulator) -> None:
    honest = hub.contribute("ann")
    file = File(name="delta.safetensors", bytes=10**12, sha256=honest.delta.files[0].sha256)
    delta = msgspec.structs.replace(honest.delta, files=(file,))
    hub.contribute("eve", seed=3)
    record = msgspec.structs.replace(honest, delta=delta)
    hub.push_record(record)
    assert hub.verdicts()[record.id].findings[0].code == "oversize"


def test_one_bad_contribution_does_not_hold_up_the_others(hub: HubSimulator) -> None:
    honest = [hub.contribute(f"person{seed}", seed=seed).id for seed in range(1, 4)]
    hub.contribute("eve", seed=9, mutate=lambda data: data[:-3])
    record = hub.merge().proposal.record
    assert [merged.id for merged in record.contributions] == sorted(honest)
    assert hub.refs()[MAIN]


def test_every_reason_has_a_sentence() -> None:
    assert all(sentence and not sentence.endswith(".") for sentence in REASONS.values())
