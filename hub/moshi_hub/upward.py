"""What a hub's rounds have learned, as a contribution to the hub that it began with.

The change of the rounds that have not been sent yet goes to the other hub's newest round, in that
one's codec, signed by this hub's anchor. It is prepared on disk, then waits on this hub itself
(``moshi_hub.outbox``), then goes up: a killed run goes on, here or on another machine, and nothing
is sent twice.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.errors import CorruptRecord, HubError, UntrustedHub
from moshi_fl.history import DELTA_FILE, check_signature
from moshi_fl.hubfile import DeltaRules, VocabularyRules
from moshi_fl.pull_request import forge_of, propose, pushing_to
from moshi_fl.records import Contribution, Metrics, Training, dump, load
from moshi_fl.rules import Shapes, accepted_characters, shapes_of
from moshi_fl.signing import Signer
from moshi_fl.snapshot import lengthened
from moshi_fl.store.locking import LOCK_FILE, FolderLock
from moshi_fl.submit import (
    Sent,
    delta_location,
    is_merged,
    merged_test,
    signature_of,
    submit,
)
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.weights import (
    Array,
    Weights,
    open_weights,
    save_weights,
    sha256_file,
    write_atomic,
)
from moshi_hub.bridge import Bridge
from moshi_hub.local import ANCHOR, local_signer
from moshi_hub.outbox import PREPARED_FILE, SIGNATURE_FILE, Passed, Prepared
from moshi_hub.propose import software

LARGEST = (1 << 53) - 1  # count that a record holds
MOST_CHARACTERS = 1000  # that a record proposes
SAFE = 0.99  # of the largest norm: the codec rounds

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Upward:
    """What went up.

    Attributes:
        passed: Which rounds, in which contribution.
        contribution: Its record.
        sent: Where it went.
        url: Its pull request, or the page on which one can be opened; empty without a forge.
        problem: Why there is no pull request, where there should be one.
    """

    passed: Passed
    contribution: Contribution
    sent: Sent
    url: str
    problem: str


def send(bridge: Bridge, home: Path, tell: Tell) -> Upward | None:
    """Send what is unsent; None where there is nothing, or nothing that can be sent now.

    Args:
        bridge: The two hubs.
        home: Folder of this user's moshi-fl data, with the anchor's key.
        tell: Told what is done.

    Raises:
        HubError: A hub cannot be reached, or refuses.
    """
    bridge.folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(bridge.folder / LOCK_FILE).held(0):
        signer = local_signer(home, bridge.below.state.config.hub.id, ANCHOR)
        waiting = bridge.told.waiting
        if waiting is None or _is_late(bridge, waiting.contribution):
            prepared = _prepared(bridge, signer.public_key)
            if prepared is None:
                if bridge.first_unsent() >= bridge.below.round or bridge.must_wait():
                    return None
                prepared = _prepare(bridge, signer.public_key, tell)
            _claim(bridge, prepared, signer)
        return _deliver(bridge, signer.public_key)


def _work(bridge: Bridge) -> Path:
    return bridge.folder / "work"


def _is_late(bridge: Bridge, entry: Contribution) -> bool:
    """Whether the other hub has not taken a contribution, and never will: its base is too old."""
    state = bridge.above.state
    age = state.newest.round - entry.round
    return age > state.config.delta.max_staleness and not is_merged(bridge.upstream, state, entry)


def _prepared(bridge: Bridge, key: str) -> Prepared | None:
    """What an earlier run left ready, unless it is sent, also by others, or has grown too old."""
    prepared = _at_hand(bridge)
    if prepared is None:
        return None
    entry = prepared.contribution
    is_sent = prepared.passed.first != bridge.first_unsent()  # from here, or another machine
    if is_sent or entry.key != key or _is_late(bridge, entry):
        shutil.rmtree(_work(bridge))
        return None
    return prepared


def _at_hand(bridge: Bridge) -> Prepared | None:
    path = _work(bridge) / PREPARED_FILE
    return load(path.read_bytes(), Prepared, name=path.name) if path.exists() else None


def _prepare(bridge: Bridge, key: str, tell: Tell) -> Prepared:
    first, last, state = bridge.first_unsent(), bridge.below.round, bridge.above.state
    rules, old, new = state.config.delta, bridge.weights(first), bridge.weights(last)
    delta = {name: np.subtract(new[name], old[name]) for name in old}
    delta = lengthened(delta, state.newest.vocabulary_tensors, bridge.missing_rows())
    carry = bridge.feedback.load(bridge.feedback.base(merged_test(bridge.upstream, state)))
    data, rest = encode_within(delta, carry, rules, shapes_of(delta))
    tell(f"rounds {first + 1} to {last}: {len(data):,} bytes as {rules.codec}")
    contribution = _record(bridge, first, data, key)
    passed = Passed(
        upstream=state.config.hub.id,
        id=contribution.id,
        round=contribution.round,
        first=first,
        last=last,
    )
    prepared, folder = Prepared(passed=passed, contribution=contribution), _work(bridge)
    save_weights(folder / "carry.safetensors", rest)
    write_atomic(folder / DELTA_FILE, data)
    write_atomic(folder / PREPARED_FILE, dump(prepared))
    return prepared


def _record(bridge: Bridge, first: int, data: bytes, key: str) -> Contribution:
    config, state, rounds = (
        bridge.below.state.config,
        bridge.above.state,
        bridge.rounds[first + 1 :],
    )
    entries = bridge.contributions(rounds)
    measured = [record.evaluation for record in rounds if record.evaluation]
    number = state.newest.round
    return Contribution(
        hub=state.config.hub.id,
        round=number,
        base=state.newest.weights,
        family=state.config.family,
        codec=state.config.delta.codec,
        contributor=config.hub.name,
        key=key,
        delta=delta_location(bridge.upstream.repo, state.refs, number, data),
        num_examples=min(sum(entry.num_examples for entry in entries), LARGEST),
        training=Training(
            steps=min(sum(entry.training.steps for entry in entries), LARGEST),
            batch_size=config.training.batch_size,
            learning_rate=config.training.learning_rate,
            seed=0,
            precision=entries[0].training.precision,
        ),
        metrics=Metrics(
            held_out_before=round(measured[0].before, 6) if measured else None,
            held_out_after=round(measured[-1].after, 6) if measured else None,
        ),
        proposed_characters=_wanted_characters(bridge, entries),
        rebased_from=bridge.stand.origin.round if bridge.is_behind() else None,
        software=software(),
    )


def _wanted_characters(bridge: Bridge, entries: Sequence[Contribution]) -> str:
    """What so many of this hub's contributors propose as the hub asks for."""
    state, wanted = bridge.above.state, bridge.below.state.config.vocabulary.min_proposals
    if not state.newest.vocabulary_tensors:
        return ""
    known = set(CharVocabulary.from_bytes(state.tokenizer).characters)
    rules = VocabularyRules(min_proposals=wanted, max_size=MOST_CHARACTERS)
    texts = ("".join(set(entry.proposed_characters) - known) for entry in entries)
    return accepted_characters(rules, 0, texts)


def _claim(bridge: Bridge, prepared: Prepared, signer: Signer) -> None:
    """Put what lies ready on this hub, before it goes to the other one.

    Raises:
        HubError: Another machine was faster, or the delta is not what was prepared.
    """
    entry, folder = prepared.contribution, _work(bridge)
    if not _has_delta(folder, entry):
        raise HubError("the delta on disk is not the one in the record.", hint=_anew(bridge))
    signature = signature_of(folder / SIGNATURE_FILE, entry, signer)
    bridge.claim(prepared, signature, (folder / DELTA_FILE).read_bytes())


def _has_delta(folder: Path, entry: Contribution) -> bool:
    path = folder / DELTA_FILE
    return path.exists() and [sha256_file(path)] == [file.sha256 for file in entry.delta.files]


def _anew(bridge: Bridge) -> str:
    return f"rm -r {shlex.quote(str(_work(bridge)))}   (makes another one)"


def _deliver(bridge: Bridge, key: str) -> Upward:
    """Send what waits, whoever prepared it; however often, the other hub has it once."""
    waiting = _checked(bridge, key)
    entry, state, folder = waiting.contribution, bridge.above.state, _work(bridge)
    forge = forge_of(bridge.upstream)
    to, anew = pushing_to(forge, bridge.upstream), f"rm -r {shlex.quote(str(folder))}"
    signature = (folder / SIGNATURE_FILE).read_text()
    sent = submit(bridge.upstream, state, entry, signature, folder / DELTA_FILE, to, anew)
    before = bridge.feedback.base(merged_test(bridge.upstream, state))
    carry = folder / "carry.safetensors"
    if before != entry.id and carry.exists():  # else another machine has it
        bridge.feedback.sent(entry.id, entry.round, open_weights(carry), before)
    url, problem = propose(forge, entry)
    bridge.note_sent()
    shutil.rmtree(folder)
    return Upward(waiting.passed, entry, sent, url, problem)


def _checked(bridge: Bridge, key: str) -> Prepared:
    """What waits, in the working folder, and by this hub's anchor.

    Raises:
        UntrustedHub: It is signed by nobody, or by another key, or it is not whole.
    """
    waiting, folder = bridge.told.waiting, _work(bridge)
    assert waiting is not None
    entry = waiting.contribution
    try:
        if _at_hand(bridge) != waiting or not _has_delta(folder, entry):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            bridge.outbox.fetch(bridge.told, folder)
        check_signature(entry, (folder / SIGNATURE_FILE).read_bytes())
        is_own = (entry.key, entry.id) == (key, waiting.passed.id) and _has_delta(folder, entry)
    except CorruptRecord:  # no signature of it, or files that are not there
        is_own = False
    if not is_own:
        shutil.rmtree(folder)
        raise UntrustedHub(
            f"{bridge.outbox.ref} holds no contribution that this machine's anchor key has signed, "
            "whole.",
            hint=f"run it where that key is; or {bridge.outbox.removal}",
        )
    return waiting


def encode_within(
    delta: Weights, carry: Weights | None, rules: DeltaRules, shapes: Shapes
) -> tuple[bytes, dict[str, Array]]:
    """Encode a delta no longer than a hub accepts; what is held back for that is carried on.

    Args:
        delta: What to send.
        carry: What earlier ones could not say.
        rules: Codec and limits.
        shapes: Of the base.

    Returns:
        The delta file, and the new carry.
    """
    codec = get_codec(rules.codec, rules.options)
    entries, rest = encode_delta(delta, codec, carry)
    data = delta_bytes(entries, codec)
    norm = Delta.parse(data, shapes, codec, "the delta").norm() if entries else 0.0
    if norm <= rules.max_norm:
        return data, rest
    share = np.float32(SAFE * rules.max_norm / norm)
    sent = {name: codec.decode(entry, shapes[name]) for name, entry in entries.items()}
    entries, lost = encode_delta({name: value * share for name, value in sent.items()}, codec)
    for name, value in sent.items():
        rest[name] = rest.get(name, 0) + value * (1 - share) + lost.get(name, 0)
    return delta_bytes(entries, codec), rest
