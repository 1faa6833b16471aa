"""What is fuzzed: everything that reads bytes of strangers. One entry in ``TARGETS`` adds another.

A target makes an input from a random generator, and runs it. Running gives a short word for what
became of it, for the table; every exception but the project's own is a defect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import msgspec

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta, max_delta_bytes
from moshi_fl.errors import MoshiError
from moshi_fl.history import (
    DELTA_FILE,
    MAX_CONTRIBUTION_BYTES,
    contribution_branch,
    contribution_path,
    signature_path,
)
from moshi_fl.hubfile import MAX_HUBFILE_BYTES, parse_hubfile
from moshi_fl.models.speech.text_stream import MAX_MODEL_BYTES, TextStream
from moshi_fl.models.speech.tiny import tiny_text
from moshi_fl.records import MAX_RECORD_BYTES, Contribution, File, Location, Record, dump, load
from moshi_fl.signing import CONTRIBUTION_NAMESPACE, MAX_SIGNATURE_BYTES
from moshi_fl.snapshot import (
    INDEX,
    MAX_FILE_BYTES,
    decode_keyframe,
    decode_step,
    encode_keyframe,
    encode_step,
)
from moshi_fl.sshsig import armour, parse_key, parse_signature
from moshi_fl.store import TreeEntry
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.weights import MAX_HEADER_BYTES, Weights, parse_header, serialize, sha256_bytes
from moshi_hub.opened import rules_of, settings_on
from moshi_hub.verify import REASONS, Rules, Submission, verify
from tests.fuzz import mutate, speech, ssh
from tests.fuzz.examples import example, records_below
from tests.support.simulator import HubSimulator, random_delta

HUB_ID = "0123456789abcdef"
CODECS = ("topk", "f32", "f16", "int8")
LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        make: An input; depends on the generator alone.
        run: Reads it and says what became of it, in a word or two.
        limit: Bytes that a file of this kind may have; memory may reach twice that.
        weight: Share of the inputs.
    """

    make: Callable[[Random], Any]
    run: Callable[[Any], str]
    limit: int
    weight: int = 10


class Defect(AssertionError):
    """A reader's answer is not one that it may give."""


def said(read: Callable[[], object]) -> str:
    """``ok``, or what a reader refused, without the particulars."""
    try:
        read()
    except MoshiError as error:
        return refusal(error)
    return "ok"


def refusal(error: MoshiError) -> str:
    """A message with names, numbers and quotations left out."""
    text = str(error)
    if not text or len(text) > LONGEST_MESSAGE:
        raise Defect(f"a message of {len(text)} characters: {text[:200]!r}")
    text = text.partition(": ")[2] or text
    text = re.sub(r"(['\"`]).*?\1|[0-9.]+|\(.*\)", "", text, flags=re.DOTALL)
    return " ".join(text.split())[:44] or type(error).__name__


# A real hub with a real contribution, made equal in every run.


@dataclass(frozen=True)
class Stage:
    """Rules of a hub and an honest submission, for one codec."""

    rules: Rules
    record: Contribution
    delta: bytes
    scratch: Path

    def submission(
        self, record: bytes, contribution: Contribution | None, delta: bytes | None = None
    ) -> Submission:
        """What a branch with this record offers; named by the record's id if it has one."""
        number, name = 0, self.record.id
        if contribution is not None:
            number, name = contribution.round, contribution.id
        path = contribution_path(number, name)
        signature = ssh.sign(record, CONTRIBUTION_NAMESPACE)
        changes = (
            TreeEntry("100644", "blob", "0" * 40, len(record), path),
            TreeEntry("100644", "blob", "2" * 40, len(signature), signature_path(number, name)),
        )
        branch = contribution_branch(number, name)
        found = Submission(branch, "", changes, record, signature)
        if contribution is None or delta is None:
            return found
        file = self.scratch / "delta.safetensors"
        file.write_bytes(delta)
        entry = TreeEntry("100644", "blob", "1" * 40, len(delta), DELTA_FILE)
        commit = contribution.delta.commit
        return replace(found, delta_commit=commit, delta_entries=(entry,), delta=file)

    def named(self, delta: bytes) -> Contribution:
        """The honest record, of this delta instead."""
        sha256 = sha256_bytes(delta)
        location = Location(
            ref=self.rules.refs.delta(self.record.round, sha256),
            commit=self.record.delta.commit,
            files=(File(name=DELTA_FILE, bytes=len(delta), sha256=sha256),),
        )
        return msgspec.structs.replace(self.record, delta=location)


_folder: Path | None = None


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Where targets keep files, and temporary ones lie; signatures are judged in this process."""
    global _folder  # noqa: PLW0603 - set once, before the processes are forked
    _folder = folder
    try:
        stages()
        with patch("moshi_fl.signing._run", ssh.verdict), patch("tempfile.tempdir", str(folder)):
            yield
    finally:
        stages.cache_clear()
        _snapshots.cache_clear()
        _folder = None


def scratch() -> Path:
    """This process's folder."""
    import os

    assert _folder is not None, "use working_in"
    folder = _folder / str(os.getpid())
    folder.mkdir(exist_ok=True)
    return folder


@cache
def stages() -> dict[str, Stage]:
    """A stage for each codec, from one real hub."""
    assert _folder is not None
    hub = HubSimulator(_folder / "hub")
    snapshot, main = hub.replica.pull(), hub.replica.fetch_main()
    config = settings_on(hub.replica.repo, main)
    real = rules_of(hub.replica, snapshot, main, config)
    record = hub.contribute("ann")
    weights = random_delta(snapshot.load(), 1)
    made = {}
    for name in CODECS:
        codec = get_codec(name, {})
        rules = replace(
            real,
            config=msgspec.structs.replace(
                config,
                hub=msgspec.structs.replace(config.hub, id=HUB_ID),
                delta=msgspec.structs.replace(config.delta, codec=name, options={}),
            ),
        )
        data = delta_bytes(encode_delta(weights, codec, None)[0], codec)
        own = msgspec.structs.replace(record, hub=HUB_ID, codec=name, key=ssh.KEY.text)
        stage = Stage(rules, own, data, Path())
        made[name] = replace(stage, record=stage.named(data))
    return made


def stage_of(codec: str) -> Stage:
    """The stage, with files in this process's own folder."""
    return replace(stages()[codec], scratch=scratch())


def judged(submission: Submission, rules: Rules) -> str:
    """The gate's first reason."""
    verdict = verify(submission, rules)
    for finding in verdict.findings:
        if finding.code not in REASONS or not 0 < len(finding.message) <= LONGEST_MESSAGE:
            raise Defect(f"{finding.code}: {finding.message[:200]!r}")
    if verdict.accepted and verdict.norm is None and submission.delta:
        raise Defect("accepted, but its norm was not taken")
    return verdict.findings[0].code if verdict.findings else "accepted"


# The gate.


@dataclass(frozen=True)
class GateInput:
    """A record, and whether its branch is named by it; perhaps a delta, or another signature."""

    codec: str
    record: bytes
    renamed: bool = True
    delta: bytes | None = None
    signature: bytes | None = None


def make_gate_record(random: Random) -> GateInput:
    """A mutated record, mostly on the branch that its new id asks for."""
    codec = random.choice(CODECS)
    stage = stages()[codec]
    tree = msgspec.to_builtins(stage.record)
    if random.random() < 0.001:
        return GateInput(codec, mutate.dense(random, MAX_CONTRIBUTION_BYTES))
    if random.random() < 0.1:
        return GateInput(codec, mutate.mutate_bytes(random, dump(stage.record)))
    if random.random() < 0.4:  # fields that are well-formed, and some of them true
        other = example(Contribution, random, full=random.random() < 0.7)
        tree |= {key: other[key] for key in tree if random.random() < 0.15}
        return GateInput(codec, mutate.canonical(tree), delta=stage.delta)
    record = mutate.spelled(random, mutate.mutate_tree(random, tree))
    return GateInput(codec, record, random.random() < 0.95, stage.delta)


def make_gate_signature(random: Random) -> GateInput:
    """An honest record with a mutated signature, or a mutated key."""
    stage = stages()["topk"]
    record = stage.record
    if random.random() < 0.3:
        key = mutate.mutate_bytes(random, record.key.encode()).decode("utf-8", "replace")
        record = msgspec.structs.replace(record, key=key)
    data = dump(record)
    return GateInput("topk", data, delta=stage.delta, signature=_mutated_signature(random, data))


def _mutated_signature(random: Random, data: bytes) -> bytes:
    space = (
        CONTRIBUTION_NAMESPACE if random.random() < 0.9 else random.choice(("", "file", "x" * 99))
    )
    blob = ssh.signature_blob(data, space)
    if random.random() < 0.7:  # what is inside, armoured as it should be
        return armour(mutate.mutate_bytes(random, blob)).encode()
    return mutate.mutate_bytes(random, armour(blob).encode())


def make_signature(random: Random) -> tuple[str, str]:
    """A mutated signature, and a mutated key of some kind."""
    kinds = [wire_key(kind) for kind in ("ed25519", "ecdsa", "rsa", "sk")]
    key = armoured_key(random, random.choice(kinds))
    return _mutated_signature(random, b"x").decode("utf-8", "replace"), key


def wire_key(kind: str) -> bytes:
    """The bytes of a key that looks right."""
    number = b"\0" + bytes([255]) * 256
    parts = {
        "ed25519": (b"ssh-ed25519", bytes(32)),
        "ecdsa": (b"ecdsa-sha2-nistp256", b"nistp256", b"\4" + bytes(64)),
        "rsa": (b"ssh-rsa", b"\1\0\1", number),
        "sk": (b"sk-ssh-ed25519@openssh.com", bytes(32), b"ssh:"),
    }[kind]
    return b"".join(map(ssh.string, parts))


def armoured_key(random: Random, blob: bytes) -> str:
    """A mutated key as text, mostly in base64 that fits."""
    import base64

    if random.random() < 0.8:
        blob = mutate.mutate_bytes(random, blob)
    kind = blob[4 : 4 + blob[3]] if len(blob) > 4 else b"x"
    text = kind + b" " + base64.b64encode(blob)
    text = mutate.mutate_bytes(random, text) if random.random() < 0.2 else text
    return text.decode("utf-8", "replace")


def run_signature(made: tuple[str, str]) -> str:
    """Both are taken apart; a sentence in a ``ValueError`` is their way to refuse."""
    words = []
    for read, text in ((parse_signature, made[0]), (parse_key, made[1])):
        try:
            read(text)
            words.append("ok")
        except ValueError as error:
            if type(error) is not ValueError or len(str(error)) > LONGEST_MESSAGE:
                raise Defect(repr(error)[:300]) from error
            words.append(" ".join(re.sub(r"'.*?'|[0-9]+", "", str(error)).split())[:20])
    return "/".join(words)


def make_gate_delta(random: Random) -> GateInput:
    """A mutated delta with an honest record of it."""
    codec = random.choice(CODECS)
    stage, other = stages()[codec], stages()[random.choice(CODECS)]
    data = mutate.mutate_safetensors(random, stage.delta, other.delta)
    return GateInput(codec, dump(stage.named(data)), delta=data)


def run_gate(made: GateInput) -> str:
    """``verify`` of the whole submission."""
    stage = stage_of(made.codec)
    contribution = None
    if made.renamed:
        try:
            contribution = load(made.record, Contribution, name="record")
        except MoshiError:
            contribution = None
    submission = stage.submission(made.record, contribution, made.delta)
    if made.signature is not None:
        submission = replace(submission, signature=made.signature)
    return judged(submission, stage.rules)


@dataclass(frozen=True)
class Listing:
    """How a submission's branch and trees look, apart from the bytes."""

    branch: str
    history: str
    unreadable: str
    changes: tuple[TreeEntry, ...]
    delta_entries: tuple[TreeEntry, ...]
    commit: str | None


def make_listing(random: Random) -> Listing:
    """Names, modes and sizes of an honest submission, each now and then another."""
    record = stages()["topk"].record
    path = contribution_path(record.round, record.id)
    odd = partial(random.choice, mutate.SPECIAL_TEXT)
    branch = contribution_branch(record.round, record.id)
    if random.random() < 0.3:
        branch = mutate.mutate_bytes(random, branch.encode()).decode("utf-8", "backslashreplace")
    text = lambda: odd() if random.random() < 0.05 else ""  # noqa: E731
    commit = random.choice((record.delta.commit, record.delta.commit, None, odd()))
    changes = _entries(random, path, len(dump(record)))
    changes += _entries(random, signature_path(record.round, record.id), 300)
    return Listing(
        branch, text(), text(), changes, _entries(random, DELTA_FILE, record.delta.bytes), commit
    )


def _entries(random: Random, path: str, size: int) -> tuple[TreeEntry, ...]:
    entries = []
    for _ in range(random.choice((1, 1, 1, 1, 0, 2, 40))):
        mode, kind = random.choice((("100644", "blob"),) * 12 + MODES)
        name = path if random.random() < 0.8 else random.choice(mutate.SPECIAL_TEXT)
        length = random.choice((size, size, size, None, 0, 1 << 60))
        entries.append(TreeEntry(mode, kind, "0" * 40, length, name))
    return tuple(entries)


MODES = (("120000", "blob"), ("100755", "blob"), ("160000", "commit"), ("000000", "none"))


def run_listing(made: Listing) -> str:
    """``verify`` of a submission with this listing, its record and delta honest."""
    stage = stage_of("topk")
    honest = stage.submission(dump(stage.record), stage.record, stage.delta)
    return judged(
        replace(
            honest,
            branch=made.branch,
            history=made.history,
            unreadable=made.unreadable,
            changes=made.changes,
            delta_entries=made.delta_entries,
            delta_commit=made.commit,
        ),
        stage.rules,
    )


# Readers of single files.


def make_delta(random: Random) -> tuple[str, bytes]:
    """A mutated delta of some codec."""
    codec = random.choice(CODECS)
    data = stages()[codec].delta
    if random.random() < 0.001:
        stage = stages()[codec]
        limit = max_delta_bytes(stage.rules.bases[0].shapes, get_codec(codec, {}))
        header = mutate.dense(random, min(limit, MAX_HEADER_BYTES) - 8)
        return codec, len(header).to_bytes(8, "little") + header
    return codec, mutate.mutate_safetensors(random, data, stages()["f32"].delta)


def run_delta(made: tuple[str, bytes]) -> str:
    """``Delta.open`` and one look at all values."""
    codec, data = made
    stage = stage_of(codec)
    file = stage.scratch / "one.safetensors"
    file.write_bytes(data)

    def read() -> None:
        delta = Delta.open(file, stage.rules.bases[0].shapes, get_codec(codec, {}))
        if not 0 <= delta.norm() < float("inf"):
            raise Defect(f"a norm of {delta.norm()}")

    return said(read)


@cache
def _kinds() -> list[type[Record]]:
    import moshi_hub.results  # noqa: F401
    import moshi_sdk.runs  # noqa: F401 - to know their records

    return list(records_below())


@dataclass(frozen=True)
class Said:
    """Bytes that claim to be a record."""

    kind: str
    data: bytes = field(repr=False)


def make_record(random: Random) -> Said:
    """A mutated example of any record that there is."""
    kind = random.choice(_kinds())
    tree = example(kind, random, full=random.random() < 0.8)
    if random.random() < 0.0005:
        return Said(kind.__qualname__, mutate.dense(random, MAX_RECORD_BYTES))
    if random.random() < 0.05:
        tree = example(random.choice(_kinds()), random, full=True)
    if random.random() < 0.1:
        return Said(kind.__qualname__, mutate.mutate_bytes(random, mutate.canonical(tree)))
    return Said(kind.__qualname__, mutate.spelled(random, mutate.mutate_tree(random, tree)))


def run_record(made: Said) -> str:
    """``load``; what it accepts must have that very spelling."""
    kind = next(kind for kind in _kinds() if kind.__qualname__ == made.kind)

    def read() -> None:
        if dump(load(made.data, kind, name="record")) != made.data:
            raise Defect("a record with two spellings")

    return said(read)


@cache
def _hubfile() -> str:
    from moshi_fl.models import get_preset
    from moshi_hub.create import Plan, render_hubfile

    plan = Plan(url="x", family="char", preset="tiny", name="x")
    text = render_hubfile(plan, get_preset("char", "tiny"))
    return re.sub(r'(?m)^id = ".*"', f'id = "{HUB_ID}"', text)


def make_hubfile(random: Random) -> str:
    """Lines of a hub.toml moved, doubled and given other values, or bytes of it hurt."""
    if random.random() < 0.3:
        return mutate.mutate_bytes(random, _hubfile().encode()).decode("utf-8", "replace")
    if random.random() < 0.0005:
        return "x = " + mutate.dense(random, MAX_HUBFILE_BYTES - 9).decode()
    lines = _hubfile().splitlines()
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(lines))
        key = lines[at].partition("=")[0]
        value = random.choice((*map(str, mutate.SPECIAL_NUMBERS), '"x"', "[]", "{}", "true", "nan"))
        other = random.choice((f"{key}= {value}", lines[random.randrange(len(lines))], "", "[x.y]"))
        lines[at : at + random.choice((0, 1))] = [other]
    return "\n".join(lines)


def make_header(random: Random) -> bytes:
    """A mutated weights file."""
    if random.random() < 0.0005:
        header = mutate.dense(random, MAX_HEADER_BYTES - 8)
        return len(header).to_bytes(8, "little") + header
    return mutate.mutate_safetensors(random, _weights_file())


@cache
def _weights_file() -> bytes:
    return b"".join(serialize(_weights(), {"x": "y"}))


@cache
def _weights(seed: int = 1) -> Weights:
    import numpy as np

    shapes: Mapping[str, tuple[int, ...]] = {"a": (64, 16), "b": (70,), "c": (2, 3, 4), "d": ()}
    return random_delta({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, seed)


@cache
def _snapshots() -> dict[str, dict[str, bytes]]:
    files = {}
    for kind in ("keyframe", "step"):
        folder = scratch() / kind
        if kind == "keyframe":
            encode_keyframe(_weights(), folder)
        else:
            encode_step(_weights(), _weights(2), folder)
        files[kind] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files


def make_snapshot(random: Random) -> tuple[str, dict[str, bytes]]:
    """A keyframe or step of which one file is not as it was; sometimes one is missing."""
    kind = random.choice(("keyframe", "step"))
    files = dict(_snapshots()[kind])
    name = random.choice(sorted(files))
    if random.random() < 0.02:
        del files[name]
    elif name == INDEX:
        tree = msgspec.json.decode(files[name])
        files[name] = mutate.spelled(random, mutate.mutate_tree(random, tree))
    else:
        files[name] = mutate.mutate_bytes(random, files[name])
    return kind, files


def run_snapshot(made: tuple[str, dict[str, bytes]]) -> str:
    """``decode_keyframe`` or ``decode_step``; nothing half-written may stay."""
    kind, files = made
    folder, out = scratch() / "snapshot", scratch() / "out"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    parameters = sum(array.size for array in _weights().values())

    def read() -> None:
        if kind == "keyframe":
            decode_keyframe(folder, out, parameters=parameters)
        else:
            decode_step(_weights(), folder)

    word = said(read)
    if left := [path.name for path in out.parent.iterdir() if path.name.startswith(".tmp-")]:
        raise Defect(f"left behind: {left}")
    return word


def make_tokenizer(random: Random) -> bytes:
    """A mutated vocabulary file."""
    tree = msgspec.json.decode(CharVocabulary("abcé😀").to_bytes())
    return mutate.spelled(random, mutate.mutate_tree(random, tree))


def make_pieces(random: Random) -> bytes:
    """A mutated SentencePiece file."""
    return mutate.mutate_bytes(random, tiny_text())


def run_pieces(made: bytes) -> str:
    """Read it, and write and read text with it."""

    def read() -> None:
        text = TextStream(made)
        tokens = text.encode("Zürich 日本 river \0")
        text.decode([*tokens, *range(text.size)])
        for token in tokens:
            text.piece(token)

    return said(read)


TARGETS: dict[str, Target] = {
    "gate-record": Target(make_gate_record, run_gate, MAX_CONTRIBUTION_BYTES, 30),
    "gate-signature": Target(make_gate_signature, run_gate, MAX_CONTRIBUTION_BYTES, 5),
    "gate-delta": Target(make_gate_delta, run_gate, MAX_CONTRIBUTION_BYTES, 25),
    "gate-listing": Target(make_listing, run_listing, MAX_CONTRIBUTION_BYTES, 5),
    "delta": Target(make_delta, run_delta, 1 << 17, 10),
    "record": Target(make_record, run_record, MAX_RECORD_BYTES, 20),
    "signature": Target(make_signature, run_signature, MAX_SIGNATURE_BYTES, 4),
    "hubfile": Target(
        make_hubfile, lambda made: said(partial(parse_hubfile, made)), MAX_HUBFILE_BYTES, 2
    ),
    "header": Target(
        make_header,
        lambda made: said(partial(parse_header, made, len(made), name="file")),
        12 * MAX_HEADER_BYTES,  # as objects; that of a stranger's delta is bounded by its model
        5,
    ),
    "snapshot": Target(make_snapshot, run_snapshot, MAX_FILE_BYTES, 2),
    "tokenizer": Target(
        make_tokenizer, lambda made: said(partial(CharVocabulary.from_bytes, made)), 8 << 20, 1
    ),
    "pieces": Target(make_pieces, run_pieces, MAX_MODEL_BYTES, 2),
    "sound": Target(
        speech.make_sound,
        lambda made: said(partial(speech.read_sound, made, scratch())),
        8 << 20,
        2,
    ),
    "words": Target(
        speech.make_words, lambda made: said(partial(speech.read_words, made)), 8 << 20, 2
    ),
    "speech-settings": Target(
        speech.make_settings, lambda made: said(partial(speech.read_settings, made)), 8 << 20, 2
    ),
}
