"""TTT in a transformer: the top layers' attention replaced, or TTT beside it.

The new tensors lie under ``self_attn.ttt``. ``hybrid_weights`` makes the weights of a model with
TTT from those of one without: TTT's projections start as copies of attention's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from moshi_fl.models.speech.attention import Step, StreamingAttention
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.transformer import StreamingTransformer
from moshi_fl.models.speech.ttt import Ttt


class TttMixer(nn.Module):
    """TTT where a layer has attention; it is told of positions and past by its own state."""

    def __init__(self, ttt: Ttt) -> None:
        super().__init__()
        self.ttt = ttt

    def forward(self, x: Tensor, step: Step, sets: list[int] | None = None) -> Tensor:
        """``x``: (B, T, C), the same back."""
        return cast("Tensor", self.ttt(x))


class ParallelMixer(StreamingAttention):
    """Attention, and gated TTT added to it: at a gate of zero, attention alone."""

    ttt: Ttt

    def forward(self, x: Tensor, step: Step, sets: list[int] | None = None) -> Tensor:
        """``x``: (B, T, C), the same back."""
        return super().forward(x, step, sets) + cast("Tensor", self.ttt(x))


def with_ttt(transformer: StreamingTransformer, config: LMConfig) -> StreamingTransformer:
    """The transformer, its top ``ttt_layers`` layers with TTT as ``ttt_mode`` says."""
    first = config.num_layers - config.ttt_layers
    for layer in list(transformer.layers)[first:]:
        if config.ttt_mode == "parallel":
            t = transformer.config
            mixer = ParallelMixer(t.d_model, t.num_heads, t.kv_repeat, t.capacity)
            mixer.ttt = Ttt(config.ttt)
            layer.self_attn = mixer
        else:
            layer.self_attn = TttMixer(Ttt(config.ttt))
    return transformer


def hybrid_weights(
    weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor], config: LMConfig
) -> dict[str, Tensor]:
    """Weights of the model of ``config`` from those of the same model without TTT.

    Args:
        weights: Of a model whose layers all have attention, projections as lists.
        fresh: Of a model of ``config``, as initialised; gives what the other has not.
        config: Says which layers have TTT, and how.
    """
    result = dict(weights)
    for layer in range(config.num_layers - config.ttt_layers, config.num_layers):
        base = f"transformer.layers.{layer}.self_attn."
        inputs, output = (weights[f"{base}{kind}_projs.0.weight"] for kind in ("in", "out"))
        result |= {name: fresh[name] for name in fresh if name.startswith(f"{base}ttt.")}
        for kind, rows in zip("qkv", _split(inputs, config), strict=True):
            result[f"{base}ttt.{kind}_proj.weight"] = rows
        result[f"{base}ttt.o_proj.weight"] = output.clone()
        if config.ttt_mode != "parallel":
            del result[f"{base}in_projs.0.weight"], result[f"{base}out_projs.0.weight"]
    return result


def _split(inputs: Tensor, config: LMConfig) -> list[Tensor]:
    """Rows for queries, keys and values, each (C, C); shared heads once for each that shares."""
    width, groups = config.dim, config.num_heads // config.kv_repeat
    kept = width // config.kv_repeat
    q, k, v = torch.split(inputs, [width, kept, kept])
    shared = (x.view(groups, -1, width).repeat_interleave(config.kv_repeat, 0) for x in (k, v))
    return [q.clone(), *(x.flatten(0, 1) for x in shared)]
