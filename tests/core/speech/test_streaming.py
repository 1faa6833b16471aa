"""The streaming contract, on a module that only counts and sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moshi_fl.errors import DataError
from moshi_fl.models.speech.streaming import State, StreamingModule


class Total(State):
    def __init__(self, batch: int) -> None:
        super().__init__(batch, torch.device("cpu"))
        self.sum = torch.zeros(batch, 3)
        self.calls = 0

    def reset(self, mask: Tensor) -> None:
        super().reset(mask)
        self.clear(self.sum, mask)


class Summer(StreamingModule):
    def initial_state(self, batch: int) -> Total:
        return Total(batch)

    def forward(self, x: Tensor) -> Tensor:
        self.check_batch(x)
        if not self.is_streaming:
            return x
        state = self.state()
        assert isinstance(state, Total)
        state.calls += 1
        state.keep(state.sum, state.sum + x)
        return state.sum.clone()


class Tree(StreamingModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), Summer())
        self.apart = Summer()
        self.apart.detached = True
        self.apart.below = Summer()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


ONES = torch.ones(2, 3)


def test_states_live_inside_the_context() -> None:
    tree = Tree()
    with tree.streaming(2):
        assert tree.is_streaming
        assert tree.inner[1].is_streaming
        assert not tree.apart.is_streaming
        assert not tree.apart.below.is_streaming
        tree(ONES)
        assert tree(ONES).sum() == 12
        with pytest.raises(RuntimeError, match="streaming already"):
            tree.streaming_forever(2)
        with tree.apart.streaming(5):
            assert tree.apart.below.is_streaming
    assert not tree.inner[1].is_streaming
    assert torch.equal(tree(ONES), ONES)


def test_states_end_with_an_error() -> None:
    tree = Tree()
    with pytest.raises(ZeroDivisionError), tree.streaming(2):
        raise ZeroDivisionError
    assert not tree.is_streaming


def test_items_are_masked_and_reset_on_their_own() -> None:
    tree = Tree()
    with tree.streaming(2):
        tree(ONES)
        tree.set_exec_mask(torch.tensor([True, False]))
        assert tree(ONES)[:, 0].tolist() == [2, 1]
        assert tree(ONES)[:, 0].tolist() == [3, 1]
        tree.reset_streaming(torch.tensor([False, True]))
        assert tree(ONES)[:, 0].tolist() == [4, 1]
        tree.set_exec_mask(torch.tensor([False, False]))
        tree.reset_streaming()
        assert tree(ONES)[:, 0].tolist() == [1, 1]


def test_a_snapshot_is_the_whole_state_and_a_copy() -> None:
    tree = Tree()
    with tree.streaming(2):
        tree(ONES)
        tree.set_exec_mask(torch.tensor([True, False]))
        saved = tree.get_streaming_state()
        assert set(saved) == {"", "inner.1"}
        tree(ONES)
        tree.set_exec_mask(torch.tensor([True, True]))
        tree.set_streaming_state(saved)
        assert tree.inner[1].state().calls == 1
        assert tree(ONES)[:, 0].tolist() == [2, 1]


def test_misuse_is_named() -> None:
    tree = Tree()
    with pytest.raises(RuntimeError, match="Tree is not streaming"):
        tree.reset_streaming()
    with pytest.raises(DataError, match="0 items"):
        tree.streaming_forever(0)
    with tree.streaming(3):
        saved = tree.get_streaming_state()
    with tree.streaming(2):
        with pytest.raises(DataError, match="a stream of 2 items was fed 3"):
            tree(torch.ones(3, 3))
        with pytest.raises(DataError, match=r"it must be bool \[2\]"):
            tree.set_exec_mask(torch.ones(2))
        with pytest.raises(DataError, match=r"has shape \[3\] instead of \[2\]"):
            tree.set_streaming_state(saved)
        with pytest.raises(DataError, match=r"does not fit Tree at 'inner\.1'"):
            tree.set_streaming_state({"": saved[""]})
        strange = {"": tree.get_streaming_state()[""]}
        strange["inner.1"] = strange[""]
        with pytest.raises(DataError, match="a saved stream holds"):
            tree.set_streaming_state(strange)
