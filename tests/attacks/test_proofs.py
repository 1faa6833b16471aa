"""The table of refusals names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

from benchmarks.attacks.proofs import PROOFS

ROOT = Path(__file__).parents[2]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}


def test_each_refusal_is_proved_by_a_test() -> None:
    for proof in PROOFS:
        file, _, name = proof.test.partition("::")
        assert name in functions(ROOT / file), proof


def test_nothing_is_claimed_twice() -> None:
    assert len({(proof.who, proof.what) for proof in PROOFS}) == len(PROOFS)
