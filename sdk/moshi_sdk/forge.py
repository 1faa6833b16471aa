"""Forges, as the contributor's side and the hub's side share them; see ``moshi_fl.forge``."""

from __future__ import annotations

from moshi_fl.forge import (
    BareGit,
    Forge,
    ForgeError,
    GitHub,
    Offer,
    Proposal,
    Repository,
    State,
    Status,
    find_token,
    open_forge,
    parse_address,
)

__all__ = [
    "BareGit",
    "Forge",
    "ForgeError",
    "GitHub",
    "Offer",
    "Proposal",
    "Repository",
    "State",
    "Status",
    "find_token",
    "open_forge",
    "parse_address",
]
