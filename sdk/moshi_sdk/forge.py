"""Forges, as the contributor's side and the hub's side share them; see ``moshi_fl.forge``."""

from moshi_fl.forge import *  # noqa: F403 - the same names, kept in one list
from moshi_fl.forge import __all__ as __all__  # noqa: PLC0414 - said again on purpose
