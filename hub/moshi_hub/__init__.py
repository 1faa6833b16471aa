"""The maintainer's side: create a hub, verify contributions, merge them into rounds."""
