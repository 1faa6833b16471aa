"""The one streaming contract: modules that take a sequence in pieces and remember where they are.

Outside ``streaming`` a module is a function of its whole input. Inside, each call continues where
the last one ended, for every item of the batch on its own: an item can be reset or held still while
the others go on. States are allocated once, when streaming starts, and then written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moshi_fl.errors import DataError

Snapshot = dict[str, dict[str, Any]]
"""State of a module and its streaming descendants: path in the module, name in the state, value."""


class State:
    """What a module remembers between calls. Tensors have the batch as their first axis.

    Subclasses add tensors and plain values as attributes; these are what a snapshot holds.

    Attributes:
        active: Items that take part, (B,) bool; the state of the others must not change.
        all_active: Whether all of them do; known without a look at the device.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self.all_active = True

    @property
    def batch(self) -> int:
        """Number of items."""
        return len(self.active)

    def reset(self, mask: Tensor) -> None:
        """Put the items of ``mask`` (B,) back to the start; subclasses reset what they add."""
        self.activate(self.active | mask)

    def activate(self, mask: Tensor) -> None:
        """From here on only the items of ``mask`` (B,) take part."""
        self.active.copy_(mask)
        self.all_active = bool(self.active.all())

    def keep(self, tensor: Tensor, new: Tensor) -> None:
        """Overwrite ``tensor`` (B, ...) with ``new`` for the items that take part."""
        new = new.detach()
        if not self.all_active:
            new = torch.where(per_item(self.active, new), new, tensor)
        tensor.copy_(new)

    def put(self, tensor: Tensor, index: Tensor, new: Tensor) -> None:
        """Overwrite ``tensor`` (B, H, ...) at ``index`` along axis 2, for those that take part."""
        new = new.detach()
        if not self.all_active:
            new = torch.where(per_item(self.active, new), new, tensor.gather(2, index))
        tensor.scatter_(2, index, new)

    def clear(self, tensor: Tensor, mask: Tensor, value: float = 0) -> None:
        """Fill ``tensor`` (B, ...) with ``value`` for the items of ``mask`` (B,)."""
        tensor.masked_fill_(per_item(mask, tensor), value)

    def snapshot(self) -> dict[str, Any]:
        """Copies of all that the state holds, by name."""
        return {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Whether ``restore`` can go back to a snapshot.

        Raises:
            DataError: The snapshot is of another kind of state or of another size.
        """
        own = vars(self)
        if set(saved) != set(own):
            raise DataError(f"a saved stream holds {sorted(saved)} instead of {sorted(own)}.")
        for name, value in saved.items():
            if isinstance(value, Tensor) and value.shape != own[name].shape:
                raise DataError(
                    f"{name} of a saved stream has shape {list(value.shape)} "
                    f"instead of {list(own[name].shape)}.",
                    hint="restore it into a stream of the same batch size and configuration",
                )

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go back to what ``snapshot`` gave, in place."""
        for name, value in saved.items():
            if isinstance(value, Tensor):
                vars(self)[name].copy_(value)
            else:
                setattr(self, name, value)


def per_item(mask: Tensor, like: Tensor) -> Tensor:
    """``mask`` (B,) with as many axes as ``like`` (B, ...)."""
    return mask.view(-1, *[1] * (like.dim() - 1))


class StreamingModule(nn.Module):
    """A module with a state; those that have none of their own pass calls on to their descendants.

    Attributes:
        detached: Whether it stays out of its parents' streaming, together with all below it.
    """

    detached = False

    def __init__(self) -> None:
        super().__init__()
        self._state: State | None = None

    def initial_state(self, batch: int) -> State:
        """A fresh state for ``batch`` items; overridden by modules that remember something."""
        return State(batch, self._device())

    @property
    def is_streaming(self) -> bool:
        """Whether calls continue one another."""
        return self._state is not None

    @contextmanager
    def streaming(self, batch: int) -> Iterator[None]:
        """While inside, calls continue one another, for ``batch`` items at once.

        Raises:
            RuntimeError: The module, or one below it, is streaming already.
        """
        self.streaming_forever(batch)
        try:
            yield
        finally:
            self.stop_streaming()

    def streaming_forever(self, batch: int) -> None:
        """Like ``streaming``, until ``stop_streaming``."""
        if batch < 1:
            raise DataError(f"a stream of {batch} items cannot start; it takes one at least.")
        modules = [module for _, module in self._streams()]
        if any(module.is_streaming for module in modules):
            raise RuntimeError(f"{type(self).__name__} is streaming already.")
        with torch.inference_mode(mode=False), torch.no_grad():
            states = [module.initial_state(batch) for module in modules]
        for module, state in zip(modules, states, strict=True):  # all of them or none
            module._state = state  # noqa: SLF001

    def stop_streaming(self) -> None:
        """Forget all states; calls stand alone again."""
        for _, module in self._streams():
            module._state = None  # noqa: SLF001

    def reset_streaming(self, mask: Tensor | None = None) -> None:
        """Put the items of ``mask`` (B,) bool, or all, back to the start; they take part again."""

        def reset(state: State) -> None:
            state.reset(_checked(mask, state))

        self._each(reset)

    def set_exec_mask(self, mask: Tensor) -> None:
        """Only the items of ``mask`` (B,) bool take part in the calls that follow.

        What the others are given leaves no trace; what comes out for them has no meaning.
        """

        def activate(state: State) -> None:
            state.activate(_checked(mask, state))

        self._each(activate)

    def get_streaming_state(self) -> Snapshot:
        """A copy of the whole state, to go back to."""
        return {path: module.state().snapshot() for path, module in self._streams()}

    def set_streaming_state(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Go back to a saved state; the module must be streaming.

        Raises:
            DataError: The state is that of another module, or of another batch size; nothing
                has changed.
        """
        modules = dict(self._streams())
        if set(saved) != set(modules):
            strange = min(set(saved) ^ set(modules))
            raise DataError(f"a saved stream does not fit {type(self).__name__} at {strange!r}.")
        for path, module in modules.items():
            module.state().check(saved[path])
        with torch.no_grad():
            for path, module in modules.items():
                module.state().restore(saved[path])

    def state(self) -> State:
        """The state; subclasses narrow its type.

        Raises:
            RuntimeError: The module is not streaming.
        """
        if self._state is None:
            raise RuntimeError(f"{type(self).__name__} is not streaming: call streaming(B) first.")
        return self._state

    def check_batch(self, x: Tensor) -> None:
        """While streaming, ``x`` (B, ...) must have the stream's batch size.

        Raises:
            DataError: It has another.
        """
        if self._state is not None and len(x) != self._state.batch:
            raise DataError(f"a stream of {self._state.batch} items was fed {len(x)}.")

    def _streams(self) -> Iterator[tuple[str, StreamingModule]]:
        """This module and all streaming ones below it that are not detached, with their paths."""
        yield "", self
        yield from _below(self, "")

    def _each(self, act: Callable[[State], None]) -> None:
        states = [module.state() for _, module in self._streams()]
        with torch.no_grad():
            for state in states:
                act(state)

    def _device(self) -> torch.device:
        found = next(self.parameters(), None)
        return torch.device("cpu") if found is None else found.device


def _below(module: nn.Module, path: str) -> Iterator[tuple[str, StreamingModule]]:
    for name, child in module.named_children():
        streams = isinstance(child, StreamingModule)
        if streams and child.detached:
            continue
        if isinstance(child, StreamingModule):
            yield path + name, child
        yield from _below(child, f"{path}{name}.")


def _checked(mask: Tensor | None, state: State) -> Tensor:
    if mask is None:
        return torch.ones_like(state.active)
    if mask.shape != state.active.shape or mask.dtype != torch.bool:
        raise DataError(
            f"a mask of a stream of {state.batch} items is {mask.dtype} {list(mask.shape)}; "
            f"it must be bool [{state.batch}]."
        )
    return mask.to(state.active.device)
