"""A forge shows a hub's branches as pull requests; a bare Git repository has branches only.

``Forge`` is what the commands ask for; ``GitHub`` and ``BareGit`` answer. Nothing here moves
weights: Git does.
"""

from __future__ import annotations

from moshi_fl.forge.address import Repository, find_token, parse_address
from moshi_fl.forge.api import ForgeError
from moshi_fl.forge.bare import BareGit
from moshi_fl.forge.base import Forge, Offer, Proposal, State, Status
from moshi_fl.forge.github import GitHub, open_forge

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
