"""A hub takes the newest round of the hub that it began with, as its own next round.

The weights become the other hub's, bit for bit: whoever follows this hub needs nothing of the
other one, and whoever audits it compares two digests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from moshi_fl.errors import HubError
from moshi_fl.hubfile import HubConfig
from moshi_fl.records import Growth
from moshi_fl.restore import grown
from moshi_fl.rules import shapes_of
from moshi_fl.snapshot import encode_step
from moshi_fl.upstream import Origin
from moshi_fl.weights import Weights, count_parameters, not_finite, sha256_bytes
from moshi_hub.bridge import Bridge
from moshi_hub.keys import Passphrase
from moshi_hub.merge import Options, Outcome, desk_for, findings_on, push_round
from moshi_hub.opened import OpenRound, look
from moshi_hub.pending import refuse_again
from moshi_hub.propose import (
    Evaluator,
    Proposal,
    draft,
    evaluation_of,
    keyframe_files,
    needs_keyframe,
)
from moshi_hub.samples import Sampler


def take(
    bridge: Bridge,
    options: Options,
    *,
    evaluator: Callable[[HubConfig], Evaluator | None],
    passphrase: Passphrase,
    sampler: Sampler | None = None,
) -> Outcome | None:
    """Make the other hub's newest round this hub's next; None where there is none to take.

    Contributions that are open stay open: they count as made on an older round.

    Args:
        bridge: The two hubs.
        options: The maintainer's decisions.
        evaluator: As for ``merge``.
        passphrase: As for ``merge``.
        sampler: As for ``merge``.

    Raises:
        HubError: This hub has moved on meanwhile, or the keys here do not suffice.
        NothingToMerge: It is proposed already, or a round is merged and not published: its
            signatures would be lost.
    """
    origin = bridge.to_take()
    if origin is None:
        return None
    replica, growth = bridge.replica, bridge.growth()
    with replica.workspace() as folder:
        found = look(replica, folder)
        if found.snapshot.round != bridge.below.round:  # what is newer is not sent yet
            raise HubError(
                f"round {found.snapshot.round} was published meanwhile.",
                hint="the same command again   (sends it first)",
            )
        if not options.publish:
            refuse_again(replica, found, (), origin)
        else:
            desk_for(replica, found.snapshot.state, found.rules.config, passphrase).require_keys()
        proposal = _proposal(bridge, found, origin, growth, folder, evaluator(found.rules.config))
        findings = findings_on(replica, found, proposal, found.accepted, sampler)
        return push_round(replica, found, findings, options, passphrase)


def _proposal(
    bridge: Bridge,
    found: OpenRound,
    origin: Origin,
    growth: Growth | None,
    folder: Path,
    evaluate: Evaluator | None,
) -> Proposal:
    state, config = found.snapshot.state, found.rules.config
    base, weights, tokenizer = (
        found.snapshot.load(),
        bridge.above.load(),
        bridge.above.state.tokenizer,
    )
    record = draft(state, found.rules, (), origin.strategy)
    record = msgspec.structs.replace(record, growth=growth)
    longer = grown(base, record)
    if problem := _misfit(longer, weights):
        raise HubError(
            f"round {origin.round} of {bridge.upstream.repo.shown_url} is not taken: {problem}.",
            hint="tell that hub's maintainers; nothing was changed here",
        )
    assert record.update is not None
    record = msgspec.structs.replace(
        record,
        weights=origin.weights,
        parameters=count_parameters(weights),
        tokenizer=sha256_bytes(tokenizer),
        update=msgspec.structs.replace(record.update, kind="step"),
        evaluation=evaluation_of(evaluate, (base, state.tokenizer), (weights, tokenizer)),
    )
    out = folder / "step"
    out.mkdir()
    files = tuple(out / file.name for file in encode_step(longer, weights, out))
    keyframe: tuple[Path, ...] = ()
    size = sum(path.stat().st_size for path in files)
    if needs_keyframe(config.storage, state.manifest.rounds, size):
        keyframe = keyframe_files(weights, folder / "keyframe")
    return Proposal(record, config, tokenizer, weights, {}, folder / "deltas", files, keyframe)


def _misfit(base: Weights, weights: Weights) -> str:
    """Why no step leads from this hub's weights to these; empty when one does."""
    own, theirs = shapes_of(base), shapes_of(weights)
    for name in sorted(own.keys() | theirs.keys()):
        wanted, found = own.get(name), theirs.get(name)
        if wanted != found:
            return f"its model is another: {name!r} is {found} instead of {wanted}"
    bad = not_finite(weights)
    return f"{bad!r} holds a value that is not finite" if bad else ""
