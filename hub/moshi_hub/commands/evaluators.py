"""``moshi-hub evaluators``: who evaluates for a hub."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import ensure_home
from moshi_fl.console import Console
from moshi_fl.errors import ConfigError, HubError
from moshi_fl.evidence import Evaluator, Evaluators
from moshi_hub.options import maintainer, replica_for


@click.group(invoke_without_command=True)
@hub_option
@output_options
def evaluators(console: Console, hub: str | None) -> None:
    r"""Show or change who evaluates contributions; the list lies on main.

    \b
    Examples:
      moshi-hub evaluators list
      moshi-hub evaluators add ~/keys/eve.pub --owner eve --vouch
      moshi-hub evaluators revoke 1f3a
    """
    if click.get_current_context().invoked_subcommand is None:
        _list(console, hub)


@evaluators.command("list")
@hub_option
@output_options
def list_(console: Console, hub: str | None) -> None:
    """Show the hub's anchor, and each evaluator with its reputation."""
    _list(console, hub)


def _list(console: Console, hub: str | None) -> None:
    from moshi_fl.signing import fingerprint
    from moshi_fl.trusted import read_evaluators
    from moshi_hub.evaluation import known_reputations
    from moshi_hub.trust import Reputation, status

    replica = replica_for(hub)
    state = replica.look()
    main = replica.fetch_main()
    listed = read_evaluators(replica.repo, main)
    if listed is None:
        console.note("No evaluators are listed: this machine's own processes evaluate.")
        console.table([], name="evaluators")
        return
    known = known_reputations(replica.repo, main, state.newest)
    rows = []
    for entry in listed.evaluators:
        reputation = known.get(entry.key, Reputation())
        rows.append(
            {
                "evaluator": entry.id[:12],
                "owner": entry.owner,
                "status": status(entry, reputation),
                "alpha": round(reputation.alpha, 3),
                "beta": round(reputation.beta, 3),
                "lower_bound": round(reputation.lower_bound, 3),
                "lies": reputation.lies,
                "key": fingerprint(entry.key),
            }
        )
    console.result(anchor=fingerprint(listed.anchors[-1]))
    console.table(rows, name="evaluators")


@evaluators.command()
@click.argument("key", metavar="KEY")
@hub_option
@click.option("--owner", help="Whose key it is; of each owner one evaluates a contribution.")
@click.option("--vouch", is_flag=True, help="Let it count at once, without probation.")
@output_options
def add(console: Console, hub: str | None, key: str, owner: str | None, vouch: bool) -> None:
    """Appoint an evaluator by its public key: a .pub file, or the text of one."""
    from moshi_fl.signing import fingerprint
    from moshi_hub.evaluation import change_evaluators

    replica, public = replica_for(hub), _public_key(key)
    number = replica.look().newest.round
    entry = Evaluator(key=public, owner=owner or fingerprint(public), vouched=vouch, since=number)

    def change(listed: Evaluators) -> Evaluators:
        if any(known.key == public and known.revoked for known in listed.evaluators):
            raise ConfigError("this key was revoked; it cannot be appointed again.")
        others = [known for known in listed.evaluators if known.key != public]
        both = tuple(sorted([*others, entry], key=lambda known: known.key))
        return msgspec.structs.replace(listed, evaluators=both)

    change_evaluators(replica, ensure_home(), maintainer(), change)
    console.done(f"Appointed {entry.owner}", evaluator=entry.id, key=fingerprint(public))


@evaluators.command()
@click.argument("evaluator", metavar="ID|KEY")
@hub_option
@output_options
def revoke(console: Console, hub: str | None, evaluator: str) -> None:
    """Take an evaluator's seat away, for good."""
    from moshi_hub.evaluation import change_evaluators

    def change(listed: Evaluators) -> Evaluators:
        found = [e for e in listed.evaluators if e.id.startswith(evaluator) or e.key == evaluator]
        if len(found) != 1:
            raise HubError(
                f"{len(found)} evaluators are named {evaluator}.",
                hint="moshi-hub evaluators list",
            )
        gone = msgspec.structs.replace(found[0], revoked=True)
        rest = tuple(gone if e is found[0] else e for e in listed.evaluators)
        return msgspec.structs.replace(listed, evaluators=rest)

    change_evaluators(replica_for(hub), ensure_home(), maintainer(), change)
    console.done("Revoked", evaluator=evaluator)


def _public_key(text: str) -> str:
    from moshi_fl.signing import fingerprint

    path = Path(text).expanduser()
    words = (path.read_text(encoding="utf-8") if path.is_file() else text).split()
    key = " ".join(words[:2])
    fingerprint(key)  # refuses what is no key
    return key
