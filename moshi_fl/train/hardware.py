"""What a device is good at: its fastest precision, and how fast it multiplies."""

from __future__ import annotations

import time

import torch

AMPERE = (8, 0)  # the first CUDA generation that multiplies bfloat16


def best_precision(device: str) -> str:
    """``bf16`` where the device multiplies it natively, otherwise ``fp32``.

    Elsewhere bfloat16 products are emulated, which on a CPU takes tens of times longer.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(kind) >= AMPERE else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    return "bf16" if kind.type == "cpu" and native else "fp32"


def measured_peak(device: str, precision: str, *, seconds: float = 0.1) -> float:
    """Floating-point operations per second of a large matrix product: what a step could reach."""
    kind = torch.device(device)
    size = 1024 if kind.type == "cpu" else 8192
    a = torch.ones(size, size, device=kind, dtype=torch.bfloat16 if precision == "bf16" else None)
    best, deadline = 0.0, time.monotonic() + seconds
    while not best or time.monotonic() < deadline:
        _wait_for(kind)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait_for(kind)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
