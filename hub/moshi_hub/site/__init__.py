"""A hub as a static site: what became of each round, readable from disk, without a script.

``history`` gathers what the records on main say; ``pages`` turns it into files.
"""

from __future__ import annotations

from moshi_hub.site.history import History, gather
from moshi_hub.site.pages import render, write_site

__all__ = ["History", "gather", "render", "write_site"]
