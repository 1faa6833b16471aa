"""The contributor's side: sync with a hub, train on private data, contribute a delta."""
