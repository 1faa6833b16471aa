"""Changes of a root of trust, by themselves: who signs for which role, and how many."""

from __future__ import annotations

from collections.abc import Callable

from securesystemslib.signer import Key
from tuf.api.metadata import Root

from moshi_fl.errors import HubError
from moshi_fl.signed.files import MAX_ROOTS
from moshi_hub.metadata import TUF_ROLES

Change = Callable[[Root], None]


def add(key: Key, role: str) -> Change:
    """Let a key sign for a role of ours."""

    def change(root: Root) -> None:
        for name in TUF_ROLES[role]:
            root.add_key(key, name)

    return change


def revoke(start: str) -> Change:
    """Take a key out of every role; thresholds that can no longer be met are an error."""

    def change(root: Root) -> None:
        keyid = find_key(root, start).keyid
        for names in TUF_ROLES.values():
            for name in names:
                if keyid in root.get_delegated_role(name).keyids:
                    root.revoke_key(keyid, name)

    return change


def threshold(role: str, count: int) -> Change:
    """Demand so many signatures."""

    def change(root: Root) -> None:
        for name in TUF_ROLES[role]:
            root.get_delegated_role(name).threshold = count

    return change


def find_key(root: Root, start: str) -> Key:
    """The key whose id begins so.

    Raises:
        HubError: None does, or several do.
    """
    found = [key for keyid, key in root.keys.items() if keyid.startswith(start)]
    if len(found) != 1:
        raise HubError(
            f"{len(found)} keys of this hub begin with {start}.", hint="moshi-hub keys list"
        )
    return found[0]


def replace(start: str, key: Key, role: str) -> Change:
    """Put a key in the place of another, in one role."""

    def change(root: Root) -> None:
        add(key, role)(root)
        old = find_key(root, start).keyid
        for name in TUF_ROLES[role]:
            if old in root.get_delegated_role(name).keyids:
                root.revoke_key(old, name)

    return change


def keep(root: Root) -> None:
    """Change nothing: the next root is the same, with a later end."""


def describe(old: Root, new: Root) -> list[dict[str, object]]:
    """What a change of roots changes, role by role."""
    rows: list[dict[str, object]] = []
    for role, (name, *_) in TUF_ROLES.items():
        before, after = old.get_delegated_role(name), new.get_delegated_role(name)
        added = [key for key in after.keyids if key not in before.keyids]
        removed = [key for key in before.keyids if key not in after.keyids]
        rows += [{"role": role, "change": "add", "key": key} for key in added]
        rows += [{"role": role, "change": "remove", "key": key} for key in removed]
        if before.threshold != after.threshold:
            said = f"threshold {before.threshold} to {after.threshold}"
            rows.append({"role": role, "change": said, "key": None})
    return rows


def check_roles(root: Root) -> None:
    """Insist that each role has as many keys as it needs signatures.

    Raises:
        HubError: One has not; or there are too many roots.
    """
    if root.version > MAX_ROOTS:
        raise HubError(f"a hub can have {MAX_ROOTS} roots, no more.", hint="moshi-hub init")
    for role, (name, *_) in TUF_ROLES.items():
        found = root.get_delegated_role(name)
        if not 1 <= found.threshold <= len(found.keyids):
            raise HubError(
                f"role {role} would have {len(found.keyids)} key(s) and need {found.threshold} "
                "signature(s).",
                hint=f"moshi-hub keys add {role} PUBLICKEYFILE   (or rotate, or another threshold)",
            )
