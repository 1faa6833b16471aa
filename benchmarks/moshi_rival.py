"""Kyutai's own code: PyPI ``moshi`` 0.2.13, which ``install_rivals.sh`` puts in the cache.

It is installed without its dependencies, which pin other versions of what moshi-fl uses.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from benchmarks.rivals import CACHE
from moshi_fl.models.speech.checkpoints import released_state
from moshi_fl.models.speech.mimi import Mimi

MISSING = "moshi 0.2.13 is not installed; benchmarks/install_rivals.sh does it"


def part(name: str) -> Any:
    """A module of the rival's package.

    Raises:
        ImportError: It is not installed.
    """
    folder = str(CACHE / "moshi")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"moshi.{name}")


def mimi(ours: Mimi, table: dict[str, Any]) -> Any:
    """The rival's Mimi with the weights of ours.

    Args:
        ours: Where the weights come from.
        table: The configuration under the names of the reference.
    """
    modules, transformers = part("modules"), part("modules.transformer")

    def transformer() -> Any:
        return transformers.ProjectedTransformer(device="cpu", **table["transformer"])

    made = part("models.compression").MimiModel(
        modules.SEANetEncoder(**table["seanet"]),
        modules.SEANetDecoder(**table["seanet"]),
        part("quantization").SplitResidualVectorQuantizer(**table["quantizer"]),
        channels=1,
        sample_rate=table["sample_rate"],
        frame_rate=table["frame_rate"],
        encoder_frame_rate=table["sample_rate"] / ours.config.seanet.hop,
        causal=True,
        resample_method="conv",
        encoder_transformer=transformer(),
        decoder_transformer=transformer(),
    )
    made.load_state_dict(released_state(ours))
    made.set_num_codebooks(ours.num_codebooks)
    return made.eval()
