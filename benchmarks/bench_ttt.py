"""What TTT layers do that no rival is needed for: an hour's stream, and three ways to begin.

The first table streams an hour of frames through a layer whose projections are wider than at the
start of training, so that there is something to learn, and reads the norm of its fast weights. The
second trains one small model with attention on sequences that repeat themselves, replaces the upper
half of its attention in each of the three ways, and trains all for the same number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import Row, print_table
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.mixer import hybrid_weights
from moshi_fl.models.speech.ttt import Ttt
from moshi_fl.models.speech.ttt_config import TttConfig

AGES = (1, 10, 30, 60, 90)  # times 500 frames; 90 are an hour
FORGET = 0.01
FIRST, AFTER = 300, 150  # steps of training: with attention, and of each hybrid
MODES = ("replace", "gated", "parallel")
SMALL = LMConfig(
    num_layers=4,
    depformer_num_heads=2,
    dim=64,
    num_heads=4,
    n_q=2,
    dep_q=1,
    delays=(0, 0, 0),
    card=32,
    text_card=32,
    gating="silu",
    norm="rms_norm_f32",
    positional_embedding="rope",
    hidden_scale=4.125,
    context=16,
    depformer_dim=32,
    depformer_num_layers=1,
    depformer_pos_emb="none",
    depformer_multi_linear=True,
    depformer_weights_per_step=True,
)


@torch.no_grad()
def hour(kind: str, forget: float) -> list[float]:
    """Norms of the fast weights at ``AGES``."""
    torch.manual_seed(0)
    layer, norms = Ttt(TttConfig(64, 4, kind=kind, forget=forget)), []
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.weight.normal_(std=0.125)
    with layer.streaming(1):
        for age in range(1, AGES[-1] + 1):
            y = layer(torch.randn(1, 500, 64))
            assert y.isfinite().all()
            if age in AGES:
                norms.append(float(layer.state().W1.norm()))
    return norms


def codes_of(config: LMConfig, generator: torch.Generator) -> Tensor:
    """Random text that comes again 20 frames later, out of attention's sight, (8, 3, 60)."""
    text = torch.randint(4, config.text_card, (8, 1, 20), generator=generator).repeat(1, 1, 3)
    audio = (text + 5) % config.card
    user = torch.randint(config.card, (8, 1, 60), generator=generator)
    return torch.cat([text, audio, user], dim=1)


def train(model: LMModel, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        codes = codes_of(model.config, generator)
        optimizer.zero_grad()
        losses(model(codes), codes, model.config).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def validation(model: LMModel) -> float:
    """Nats of text on the last two thirds, which repeat what was out of attention's sight."""
    generator = torch.Generator().manual_seed(99)
    total = 0.0
    for _ in range(4):
        codes = codes_of(model.config, generator)
        out = model(codes)
        out = out._replace(text_mask=out.text_mask & (torch.arange(60) >= 20))
        total += float(losses(out, codes, model.config).text)
    return total / 4


def hybrids() -> list[tuple[str, float, float]]:
    """Of each way: the loss before any step, and after; attention's own first."""
    torch.manual_seed(0)
    base = LMModel(SMALL)
    train(base, FIRST, seed=1)
    weights, before = dict(base.state_dict()), validation(base)
    weights = {name: value.clone() for name, value in weights.items()}
    train(base, AFTER, seed=2)
    found = [("attention alone", before, validation(base))]
    for mode in MODES:
        settings = vars(SMALL) | {"ttt_layers": 2, "ttt_mode": mode}
        torch.manual_seed(1)
        hybrid = LMModel(LMConfig(**settings))
        hybrid.load_state_dict(hybrid_weights(weights, hybrid.state_dict(), hybrid.config))
        start = validation(hybrid)
        train(hybrid, AFTER, seed=2)
        found.append((mode, start, validation(hybrid)))
    return found


def run() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for kind in ("linear", "mlp"):
        plain, kept = hour(kind, 0.0), hour(kind, FORGET)
        shown = [" / ".join(f"{norm:.2f}" for norm in norms) for norms in (kept, plain)]
        what = f"TTT-{kind}: |W1| after 40 s, 7, 20, 40 and 60 min; forget = {FORGET}"
        rows.append(Row(what, shown[0], f"{shown[1]} (plain)", plain[-1] / kept[-1], "bounded"))
    (_, start, end), *ways = hybrids()
    for mode, before, after in ways:
        what = f"hybrid, {mode}: nats of text at once, and after {AFTER} steps"
        ours, theirs = f"{before:.3f}, {after:.3f}", f"{start:.3f}, {end:.3f} (attention alone)"
        rows.append(Row(what, ours, theirs, end / after, "reported"))
    torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    print_table(run())
