"""Signed rounds: what a hub's ``latest`` carries besides its files, and how a client verifies it.

``files`` knows names, limits and fingerprints and is light; ``client`` runs TUF's client workflow
(python-tuf) on bytes that are already here; ``refusals`` says in words what it found. Nothing here
fetches: everything lies in one commit.
"""
