"""byzfl's aggregators, as an oracle. Its package does not import beside a CPU build of torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


def byzfl(module: str) -> Any:
    """``aggregators`` or ``preaggregators`` of byzfl, loaded without the rest of the package."""
    pytest.importorskip("scipy")
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None:
            pytest.skip("byzfl is not installed")
        for name, below in (("byzfl", ""), ("byzfl.utils", "utils")):
            package = ModuleType(name)
            package.__path__ = [
                f"{place}/{below}" for place in spec.submodule_search_locations or ()
            ]
            sys.modules[name] = package
    return importlib.import_module(f"byzfl.aggregators.{module}")
