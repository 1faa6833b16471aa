"""Git as the coordinator: the only part of the project that uses GitPython.

``HubRepo`` is a bare local object store that talks to one hub; ``create_hub`` makes the other side.
Everything that comes from a hub is hostile until the records say otherwise.
"""

from moshi_fl.store.failures import NO_HUB_THERE
from moshi_fl.store.hub import create_hub, hub_settings, tidy_hub
from moshi_fl.store.objects import NOREPLY, Author, ObjectStore
from moshi_fl.store.repo import ANY, HubRepo, PushRejected, RefMissing, RefUpdate
from moshi_fl.store.settings import HUB_SETTINGS
from moshi_fl.store.trees import TreeEntry
from moshi_fl.store.urls import is_local, local_path, normalise_url, redact

__all__ = [
    "ANY",
    "HUB_SETTINGS",
    "NOREPLY",
    "NO_HUB_THERE",
    "Author",
    "HubRepo",
    "ObjectStore",
    "PushRejected",
    "RefMissing",
    "RefUpdate",
    "TreeEntry",
    "create_hub",
    "hub_settings",
    "is_local",
    "local_path",
    "normalise_url",
    "redact",
    "tidy_hub",
]
