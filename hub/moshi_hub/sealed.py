"""The held-out pool on the hub itself, encrypted, for a CI: its key comes from a secret.

A pool is often larger than a secret may be.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.history import Refs
from moshi_fl.replica import Replica
from moshi_fl.store import ANY, NOREPLY, Author, RefUpdate
from moshi_fl.weights import sha256_bytes, write_atomic
from moshi_hub.heldout import MAX_POOL_BYTES, pool_path, read_pool_file

SEALED_FILE = "held-out.pool.aes"


POOL_KEY = "MOSHI_HUB_POOL_KEY"


_KEY_BYTES, _NONCE_BYTES = 32, 12


_PACK_SLACK = 1 << 16


def seal_pool(replica: Replica, refs: Refs, hub: str, by: str) -> str:
    """Put the pool on the hub, encrypted (AES-256-GCM), in the place of the one before.

    Args:
        replica: The hub's copy on this machine, with the pool.
        refs: Names of the hub's refs.
        hub: Its id, to which the encryption is bound.
        by: Who does it.

    Returns:
        The key for the secrets of a CI: that in ``MOSHI_HUB_POOL_KEY``, or a new one.
    """
    data, repo = read_pool_file(replica), replica.repo
    key = _pool_key() or secrets.token_bytes(_KEY_BYTES)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = nonce + AESGCM(key).encrypt(nonce, data, hub.encode())
    repo.prepare()
    commit = repo.commit(
        repo.tree({SEALED_FILE: repo.put(sealed)}),
        message=f"{refs.sealed_pool}\n",
        author=Author(by or "moshi-fl", NOREPLY),
        when=0,
    )
    repo.push([RefUpdate(refs.sealed_pool, commit, ANY)])
    return base64.b64encode(key).decode()


def open_sealed_pool(replica: Replica) -> bool:
    """Bring the pool from the hub, where this machine has its key in a variable and not the pool.

    Returns:
        Whether the pool is here now.

    Raises:
        DataError: The hub has none, it is public since, or the key is that of another.
    """
    path = pool_path(replica)
    if path.exists() or not (key := _pool_key()):
        return path.exists()
    state = replica.look()
    ref, local = state.refs.sealed_pool, "refs/moshi-fl/sealed-pool"
    limit = MAX_POOL_BYTES + _PACK_SLACK
    present = replica.repo.remote_refs(ref)
    if ref not in present:
        raise DataError(
            f"{POOL_KEY} is set, and no sealed pool is on the hub.",
            hint="moshi-hub pool seal   (on the maintainer's machine)",
        )
    commit = replica.repo.fetch({ref: local}, max_bytes=limit, expect=present)[local]
    sealed = replica.repo.read(commit, SEALED_FILE, limit=limit)
    nonce, box = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        data = AESGCM(key).decrypt(nonce, box, state.config.hub.id.encode())
    except (InvalidTag, ValueError) as error:
        raise DataError(
            f"{POOL_KEY} is not the key of the pool that is sealed on the hub.",
            hint="moshi-hub pool seal   (seals it anew; its output is the secret)",
        ) from error
    _refuse_retired(replica, state.refs, data)
    write_atomic(path, data)
    return True


def _refuse_retired(replica: Replica, refs: Refs, pool: bytes) -> None:
    """Whoever can train on a pool passes any measurement on it."""
    name = sha256_bytes(pool)
    if replica.repo.remote_refs(refs.pool(name)):
        raise DataError(
            f"the pool that is sealed on the hub, {name[:12]}, was retired: it is public.",
            hint="moshi-hub pool new --eval-data PATH, then: moshi-hub pool seal",
        )


def _pool_key() -> bytes | None:
    """The key in the environment.

    Raises:
        ConfigError: What is there is no key.
    """
    text = os.environ.get(POOL_KEY, "").strip()
    if not text:
        return None
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"{POOL_KEY} holds no key of a pool.", hint="moshi-hub pool seal   (prints one)"
        )
    return key
