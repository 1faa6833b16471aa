"""What lies beyond attention's sight: a stack with TTT on top knows of it, attention cannot."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_recall import (
    FAR,
    LENGTH,
    SAY,
    WINDOW,
    Listener,
    draw,
    hybrid,
    recalled,
    train,
    window,
)


def reach(model: Listener) -> int:
    """How far back a change of one token is seen at all."""
    tokens = draw(torch.Generator().manual_seed(3), batch=1).tokens
    other = tokens.clone()
    other[0, 20] = SAY
    with torch.no_grad():
        changed = (model(tokens) != model(other)).any(-1)[0]
    return int(changed.nonzero().max()) - 20


def test_attention_of_the_same_budget_cannot_see_what_the_far_questions_ask_for() -> None:
    assert reach(window()) <= 2 * (WINDOW - 1) < FAR
    assert reach(hybrid()) == LENGTH - 1 - 20
    assert window().state_floats() >= hybrid().state_floats()


@pytest.mark.slow
def test_a_hybrid_learns_to_say_a_word_that_attention_has_lost() -> None:
    torch.set_num_threads(1)
    model = hybrid()
    train(model, names=1, steps=150)
    near, far = recalled(model, names=1)
    assert near > 0.8
    assert far > 0.8
