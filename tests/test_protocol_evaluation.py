"""PROTOCOL.md's chapter on evaluation, implemented a second time from its text alone."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.consensus import gain
from moshi_fl.draw import assign
from moshi_fl.evidence import Seat, Submission
from moshi_fl.merkle import leaf, merkle_root
from moshi_fl.records import dump
from tests.support.keys import signer_of

EVALUATOR, ID = "b" * 32, "a" * 32


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def book_score(seed: bytes, *words: object) -> bytes:
    return hmac.new(seed, "|".join(str(word) for word in words).encode(), hashlib.sha256).digest()


def test_the_worked_evaluation_is_right() -> None:
    text = (Path(__file__).parents[1] / "hub" / "PROTOCOL.md").read_text(encoding="utf-8")
    example = text.partition("### Worked example")[2].partition("###")[0]
    key = re.findall(r"`(ssh-ed25519 \S+)`", example)[0]
    assert f"`{sha(key.encode()).hex()[:32]}`" in example
    one, two = b"\1" * 32, b"\2" * 32
    commitment = sha(b"moshi-fl-nonce-v1\n", key.encode(), b"\n", one)
    assert f"`{commitment.hex()}`" in example
    mixed = bytes(a ^ b for a, b in zip(one, two, strict=True))
    seed = sha(b"moshi-fl-seed-v1\n", bytes(32), mixed)
    assert f"`{seed.hex()}`" in example
    assert f"`{book_score(seed, 'assign', ID, EVALUATOR).hex()}`" in example
    shared = sorted(sorted(range(8), key=lambda i: book_score(seed, "shared", i))[:4])
    assert shared == [1, 2, 5, 6]
    rest = [i for i in range(8) if i not in shared]
    own = sorted(sorted(rest, key=lambda i: book_score(seed, "private", EVALUATOR, i))[:2])
    assert own == [3, 4]
    before, after = (2000000, 2100000, 1900000, 2050000), (1950000, 2048000, 1851000, 1999000)
    assert book_verdict(before, after) == ("credit", 50500, 645)
    assert "S = 202 000 and V = 20 000 000" in " ".join(example.split())


def book_verdict(before: Sequence[int], after: Sequence[int]) -> tuple[str, int, int]:
    g = [b - a for b, a in zip(before, after, strict=True)]
    m, total = len(g), sum(g)
    spread = m * sum(x * x for x in g) - total**2
    left, right = 10**6 * total**2 * (m - 1), 1645**2 * spread
    if total > 0:
        said = "credit" if left > right else "neutral"
    else:
        said = "neutral" if left < right else "reject"
    return said, math.floor(total / m), math.isqrt(spread // ((m - 1) * m**2))


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), min_size=2, max_size=30))
def test_a_verdict_follows_by_the_book(losses: list[tuple[int, int]]) -> None:
    before, after = (np.array(column, np.int64) for column in zip(*losses, strict=True))
    found = gain(before, after)
    assert (found.outcome, found.mean, found.standard_error) == book_verdict(
        before.tolist(), after.tolist()
    )


def test_evaluators_are_drawn_by_the_book() -> None:
    people = [(f"p{n}", f"o{n % 4}", n != 5) for n in range(7)]
    keys = {name: signer_of(name).public_key for name, _, _ in people}
    seats = [Seat(key=keys[name], owner=owner, counts=counts) for name, owner, counts in people]
    own = keys["p1"]
    owners = {keys[name]: owner for name, owner, _ in people}
    seed = sha(b"anything")
    entry = Submission(id=ID, record="c" * 64, key=own)
    wanted = []
    for name, owner, _ in sorted(
        (p for p in people if p[2]),
        key=lambda p: book_score(seed, "assign", ID, sha(keys[p[0]].encode()).hex()[:32]),
    ):
        taken = {o for _, o in wanted} | {"o1"}  # o1 is the owner of the submission's key
        if owner not in taken:
            wanted.append((sha(keys[name].encode()).hex()[:32], owner))
    ids = [who for who, _ in wanted]
    first = assign(seed.hex(), entry, seats, owners, quorum=2, stage=1)
    more = assign(seed.hex(), entry, seats, owners, quorum=2, stage=2)
    assert list(first.evaluators) == ids[:2]
    assert list(more.evaluators) == ids[2:6]
    assert len(first.probation) == 0  # p5 has owner o1


def test_the_merkle_root_is_that_of_the_book() -> None:
    entries = [
        Submission(id=f"{n:032x}", record=f"{n:064x}", key=signer_of("p1").public_key)
        for n in range(5)
    ]
    a, b, c, d, e = (sha(b"\0", dump(entry)) for entry in entries)

    def node(x: bytes, y: bytes) -> bytes:
        return sha(b"\1", x, y)

    wanted = node(node(node(a, b), node(c, d)), e)
    assert merkle_root([leaf(entry) for entry in entries]) == wanted
