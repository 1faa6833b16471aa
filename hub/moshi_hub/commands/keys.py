"""``moshi-hub keys``: whose signatures count on a hub, and the keys on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_fl.errors import ConfigError, HubError
from moshi_fl.text import Moment
from moshi_hub.options import maintainer, passphrase_from, passphrase_option, replica_for

if TYPE_CHECKING:
    from moshi_fl.replica import Replica
    from moshi_hub.keys import KeyStore, StoredKey
    from moshi_hub.rootchange import Change
    from moshi_hub.rotation import Bench, Changed, Waiting

ROLES = click.Choice(["root", "targets", "online"])


@click.group(invoke_without_command=True)
@click.pass_context
def keys(context: click.Context) -> None:
    r"""Show and change whose signatures count.

    Roles: root (says whose keys count), targets (sign rounds), online (say what is newest).

    \b
    Examples:
      moshi-hub keys list --hub ./hub.git
      moshi-hub keys refresh --hub ./hub.git
      moshi-hub keys rotate online
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _bench(hub: str | None, passphrase_env: str) -> Bench:
    from moshi_hub.rotation import open_bench

    return open_bench(
        replica_for(hub), passphrase=passphrase_from(passphrase_env), name=maintainer()
    )


@keys.command("list")
@hub_option
@passphrase_option
@output_options
def list_(console: Console, hub: str | None, passphrase_env: str) -> None:
    """Show each role's keys, how many must sign, until when, and which keys are here."""
    from moshi_fl.signed.files import SNAPSHOT, TARGETS, TIMESTAMP, root_name
    from moshi_fl.signed.refusals import expiry
    from moshi_hub.keys import is_private
    from moshi_hub.metadata import TUF_ROLES, keys_of
    from moshi_hub.rotation import waiting_change

    bench = _bench(hub, passphrase_env)
    desk, root = bench.desk, bench.desk.root
    rows = []
    for role, (name, *_) in TUF_ROLES.items():
        for key in keys_of(root, name):
            needed = root.get_delegated_role(name).threshold
            here = desk.keys.where(key)
            rows.append({"role": role, "key": key.keyid[:16], "needed": needed, "here": here})
    console.table(rows, name="keys")
    if not is_private(desk.keys.folder):
        console.warn(f"others can read your keys: chmod -R go= {desk.keys.folder}")
    names = {"root": root_name(root.version), "targets": TARGETS}
    names |= {"snapshot": SNAPSHOT, "timestamp": TIMESTAMP}
    ends = [
        {"file": name, "expires": Moment(f"{expiry(desk.metadata[name]):%Y-%m-%dT%H:%M:%SZ}")}
        for name in names.values()
    ]
    console.table(ends, name="expiry")
    if waiting := waiting_change(bench):
        _show_waiting(console, bench, waiting)


def _show_waiting(console: Console, bench: Bench, waiting: Waiting) -> None:
    from moshi_hub.rootchange import describe
    from moshi_hub.rotation import waiting_root

    try:
        root = waiting_root(bench, waiting)
    except HubError as error:
        console.warn(error.in_full)
        return
    console.note(f"A change to root version {root.version} waits for signatures:")
    console.table(describe(bench.desk.root, root), ["role", "change", "key"], name="waiting")
    console.hint("moshi-hub keys sign   (signs it; or, to take it back: moshi-hub keys drop)")


@keys.command()
@hub_option
@passphrase_option
@output_options
def fingerprint(console: Console, hub: str | None, passphrase_env: str) -> None:
    """Print the fingerprints of the hub's first and present root, for people to compare."""
    from moshi_fl.signed.files import fingerprint as of
    from moshi_fl.signed.files import root_name

    desk = _bench(hub, passphrase_env).desk
    first = desk.metadata.get(root_name(1))
    newest = desk.metadata[root_name(desk.root.version)]
    console.result(
        root=of(first) if first else None, version=desk.root.version, newest_root=of(newest)
    )


@keys.command()
@click.argument("role", type=ROLES)
@hub_option
@passphrase_option
@click.option("--plain", is_flag=True, help="Without a passphrase, even if there is one.")
@output_options
def new(console: Console, role: str, hub: str | None, passphrase_env: str, plain: bool) -> None:
    """Make a key on this machine; it counts once somebody has added its public half."""
    import os

    from moshi_hub.keys import public_pem

    store = _bench(hub, passphrase_env).desk.keys
    given = os.environ.get(passphrase_env, "").encode()
    signer = store.create(role, b"" if plain else given or store.passphrase_for_new())
    console.done(f"Made a key for {role}", key=signer.public_key.keyid)
    console.line(public_pem(signer.public_key).rstrip())
    console.hint(f"moshi-hub keys add {role} FILE   (with these lines; by who has the root key)")


@keys.command("export-public")
@click.argument("role", type=ROLES)
@click.argument("key", required=False)
@hub_option
@passphrase_option
@output_options
def export_public(
    console: Console, role: str, key: str | None, hub: str | None, passphrase_env: str
) -> None:
    """Print the public half of a key on this machine; KEY is the beginning of its id."""
    from moshi_hub.keys import public_pem

    store = _bench(hub, passphrase_env).desk.keys
    console.line(public_pem(store.load(_stored(store, role, key)).public_key).rstrip())


@keys.command()
@click.argument("key", required=False)
@click.option(
    "--role",
    type=click.Choice(["online", "targets", "anchor"]),
    default="online",
    show_default=True,
    help="Which key; the anchor's is the one that this machine evaluates with.",
)
@hub_option
@passphrase_option
@output_options
def export(
    console: Console, key: str | None, role: str, hub: str | None, passphrase_env: str
) -> None:
    """Print a private key without a passphrase, for a CI's secret."""
    from moshi_hub.keys import VARIABLES, private_pem
    from moshi_hub.local import ANCHOR, ANCHOR_KEY

    if role == ANCHOR and key:
        raise click.UsageError("KEY and --role anchor exclude each other: a hub has one anchor.")
    bench = _bench(hub, passphrase_env)
    if role == ANCHOR:
        console.line(_anchor(bench.replica).read_text(encoding="utf-8").rstrip())
        console.note(f"Give it to the CI as {ANCHOR_KEY}. Whoever has it can judge for the hub.")
        return
    store = bench.desk.keys
    console.line(private_pem(store.load(_stored(store, role, key))).rstrip())
    can = {"online": "say what is newest", "targets": "make rounds of this hub"}[role]
    console.note(f"Give it to the CI as {VARIABLES[role]}. Whoever has it can {can}.")


def _anchor(replica: Replica) -> Path:
    """File of the anchor's key on this machine; made here as long as the hub names no anchor."""
    from moshi_fl.signing import IDENTITY_FILE
    from moshi_fl.trusted import read_evaluators
    from moshi_hub.local import ANCHOR, key_folder, local_signer

    hub = replica.look().config.hub.id
    listed = read_evaluators(replica.repo, replica.fetch_main())
    folder = key_folder(replica.home, hub, ANCHOR)
    if not listed:
        return local_signer(replica.home, hub, ANCHOR).key_path
    if (folder / IDENTITY_FILE).exists():
        signer = local_signer(replica.home, hub, ANCHOR)
        if signer.public_key in listed.anchors:
            return signer.key_path
    raise ConfigError(
        f"the key of this hub's anchor is not in {folder}.",
        hint="Export it where the hub's rounds are measured; if nobody has it any more, "
        "measure and publish a round here, which makes this machine's key the anchor's.",
    )


def _stored(store: KeyStore, role: str, start: str | None) -> StoredKey:
    found = [
        key for key in store.stored() if key.role == role and key.start.startswith(start or "")
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} {role} keys of this hub are on this machine"
            f"{f' that begin with {start}' if start else ''}.",
            hint=f"moshi-hub keys list   (name one, or make one: moshi-hub keys new {role})",
        )
    return found[0]


@keys.command()
@click.argument("role", type=ROLES)
@click.argument("public", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@hub_option
@passphrase_option
@output_options
def add(console: Console, role: str, public: Path, hub: str | None, passphrase_env: str) -> None:
    """Let the key in a file PUBLIC sign for a role."""
    from moshi_hub import rootchange
    from moshi_hub.keys import read_public

    key = read_public(public)
    _change(console, _bench(hub, passphrase_env), rootchange.add(key, role), key=key.keyid)


@keys.command()
@click.argument("role", type=ROLES)
@click.argument("count", type=click.IntRange(1))
@hub_option
@passphrase_option
@output_options
def threshold(
    console: Console, role: str, count: int, hub: str | None, passphrase_env: str
) -> None:
    """Demand COUNT signatures of a role."""
    from moshi_hub import rootchange

    _change(console, _bench(hub, passphrase_env), rootchange.threshold(role, count))


@keys.command()
@click.argument("role", type=ROLES)
@click.argument("key", required=False)
@hub_option
@passphrase_option
@output_options
def rotate(
    console: Console, role: str, key: str | None, hub: str | None, passphrase_env: str
) -> None:
    """Make a new key here and put it in the place of KEY, or of the role's only key."""
    from moshi_hub import rootchange
    from moshi_hub.metadata import TUF_ROLES, keys_of

    bench = _bench(hub, passphrase_env)
    present = [found.keyid for found in keys_of(bench.desk.root, TUF_ROLES[role][0])]
    old = [keyid for keyid in present if keyid.startswith(key or "")]
    if len(old) != 1:
        raise HubError(
            f"{len(old)} keys of role {role} {f'begin with {key}' if key else 'could be meant'}.",
            hint="moshi-hub keys list   (name one by the beginning of its id)",
        )
    signer = bench.desk.keys.create(role, bench.desk.keys.passphrase_for_new())
    change = rootchange.replace(old[0], signer.public_key, role)
    _change(console, bench, change, key=signer.public_key.keyid, instead_of=old[0])


@keys.command()
@click.argument("key")
@hub_option
@passphrase_option
@output_options
def revoke(console: Console, key: str, hub: str | None, passphrase_env: str) -> None:
    """Let the key whose id begins with KEY sign for nothing any more."""
    from moshi_hub import rootchange

    bench = _bench(hub, passphrase_env)
    found = rootchange.find_key(bench.desk.root, key)
    _change(console, bench, rootchange.revoke(found.keyid), key=found.keyid)


@keys.command()
@hub_option
@passphrase_option
@output_options
def renew(console: Console, hub: str | None, passphrase_env: str) -> None:
    """Sign root and targets again, unchanged, before they expire."""
    from moshi_hub import rootchange

    _change(console, _bench(hub, passphrase_env), rootchange.keep)


@keys.command()
@hub_option
@passphrase_option
@output_options
def sign(console: Console, hub: str | None, passphrase_env: str) -> None:
    """Add your signatures to a change of keys that waits for them."""
    from moshi_hub.rootchange import describe
    from moshi_hub.rotation import sign_change, waiting_change, waiting_root

    bench = _bench(hub, passphrase_env)
    if waiting := waiting_change(bench):
        rows = describe(bench.desk.root, waiting_root(bench, waiting))
        console.table(rows, ["role", "change", "key"], name="changes")
    _report(console, sign_change(bench))


@keys.command()
@hub_option
@passphrase_option
@output_options
def drop(console: Console, hub: str | None, passphrase_env: str) -> None:
    """Take back a change of keys that waits for signatures."""
    from moshi_hub.rotation import drop_change

    dropped = drop_change(_bench(hub, passphrase_env))
    console.done("Dropped the change" if dropped else "No change waits", dropped=dropped)


@keys.command()
@click.option("--snapshot", is_flag=True, help="Sign the snapshot again, too, though it holds.")
@hub_option
@passphrase_option
@output_options
def refresh(console: Console, snapshot: bool, hub: str | None, passphrase_env: str) -> None:
    r"""Sign a new timestamp with the online key: the present round is still the newest.

    For a cron job. Clients take nothing from a hub whose timestamp has expired.

    \b
    Examples:
      MOSHI_HUB_ONLINE_KEY="$(cat online.pem)" moshi-hub keys refresh --hub ./hub.git
    """
    from moshi_fl.signed.files import TIMESTAMP
    from moshi_fl.signed.refusals import expiry
    from moshi_hub import rotation

    bench = _bench(hub, passphrase_env)
    rotation.refresh(bench, with_snapshot=snapshot)
    end = expiry(bench.replica.trust.load()[TIMESTAMP])
    console.done("Refreshed", expires=Moment(f"{end:%Y-%m-%dT%H:%M:%SZ}"))


def _change(console: Console, bench: Bench, change: Change, **facts: object) -> None:
    from moshi_hub.rotation import change_root

    _report(console, change_root(bench, change), **facts)


def _report(console: Console, changed: Changed, **facts: object) -> None:
    if changed.lacks:
        console.done("Proposed", version=changed.version, published=False, **facts)
        console.note(f"It still lacks {', '.join(changed.lacks)}.")
        console.hint("moshi-hub keys sign   (on the machine of another maintainer)")
        return
    console.done(
        f"The hub has root version {changed.version}",
        version=changed.version,
        published=True,
        signed_again=list(changed.again),
        **facts,
    )
