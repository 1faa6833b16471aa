"""Code words, asked for when they are out of attention's sight: what TTT layers are for.

Early in a sequence of noise some names are told, each followed by one of 32 words; later the model
is given names and must say their words, once soon after and several times far away. The hybrid has
attention below and TTT on top; its rival is attention in all layers, with a window as wide as the
same number of floats of state allows. Through all its layers together that window reaches less far
back than the far questions lie, so that nothing but chance is left to it there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clock import threads
from benchmarks.common import Row, print_table
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.mixer import with_ttt
from moshi_fl.models.speech.transformer import StreamingTransformer

WORDS, NOISE, NAMES = 32, 32, 8
SAY, ASK = WORDS + NOISE, WORDS + NOISE + NAMES  # the first of the tokens that tell, and that ask
LENGTH, FAR = 128, 60  # positions, and how far back the far questions ask at least
QUESTIONS = 6  # far ones
CONTEXT, WINDOW = 16, 21  # of the hybrid's attention, and of its rival's
TOLD = (1, 4)  # names in a sequence
BATCH, STEPS, MARKS = 32, 800, (50, 100, 200, 400, 800)
CHANCE = 1 / WORDS


@dataclass(frozen=True)
class Sequences:
    """``tokens`` (B, T), and what is to be said where: ``answers`` (B, T), -1 where nothing is."""

    tokens: Tensor
    answers: Tensor
    far: Tensor  # (B, T) bool: the questions that are far away


def draw(generator: torch.Generator, names: int = 1, batch: int = BATCH) -> Sequences:
    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def shuffled(count: int, first: int) -> Tensor:
        return torch.rand(batch, count, generator=generator).argsort(1)[:, :first]

    tokens = random(WORDS, WORDS + NOISE, batch, LENGTH)
    name, word = shuffled(NAMES, names), random(0, WORDS, batch, names)
    told = random(0, 6, batch, 1) + 2 * torch.arange(names)
    end = told[:, -1:] + 1
    near = end + random(1, 8, batch, 1)
    far = end + FAR + shuffled(LENGTH - FAR - 6 - 2 * NAMES, QUESTIONS)
    where, which = torch.cat([near, far], dim=1), random(0, names, batch, 1 + QUESTIONS)
    tokens.scatter_(1, told, SAY + name).scatter_(1, told + 1, word)
    tokens.scatter_(1, where, ASK + name.gather(1, which))
    answers = torch.full_like(tokens, -1).scatter_(1, where, word.gather(1, which))
    return Sequences(
        tokens, answers, torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, far, True)
    )


def config(ttt_layers: int, context: int) -> LMConfig:
    return LMConfig(
        num_layers=2,
        depformer_num_heads=1,
        dim=64,
        num_heads=4,
        delays=(0, 0),
        n_q=1,
        dep_q=1,
        gating="silu",
        norm="rms_norm_f32",
        positional_embedding="rope",
        context=context,
        ttt_layers=ttt_layers,
    )


class Listener(nn.Module):
    """Tokens to logits of the code word, by the temporal transformer of a speech model."""

    def __init__(self, c: LMConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ASK + NAMES, c.dim)
        self.transformer = with_ttt(StreamingTransformer(c.temporal), c)
        self.head = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, WORDS))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.transformer(self.embedding(tokens)))  # (B, T, WORDS)

    def state_floats(self) -> int:
        """What a stream keeps: keys and values of the context, or weights that learn."""
        c, attention = self.transformer.config, 0
        with self.transformer.streaming(1):
            for path, state in self.transformer.get_streaming_state().items():
                if path.endswith(".ttt"):
                    attention += sum(v.numel() for v in state.values() if _floats(v))
                elif path.endswith("self_attn"):
                    attention += 2 * c.d_model * c.context  # without slots that only pieces need
        return attention


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@torch.no_grad()
def recalled(model: Listener, names: int) -> tuple[float, float]:
    """Share of the near and of the far questions that are answered rightly, on new sequences."""
    drawn = draw(torch.Generator().manual_seed(99), names, batch=256)
    right = model(drawn.tokens).argmax(-1) == drawn.answers
    near = (drawn.answers >= 0) & ~drawn.far
    return float(right[near].float().mean()), float(right[drawn.far].float().mean())


def train(model: Listener, names: int, steps: int = STEPS) -> dict[int, tuple[float, float]]:
    """The shares after some steps."""
    generator, curve = torch.Generator().manual_seed(1), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        drawn = draw(generator, names)
        asked = drawn.answers >= 0
        loss = F.cross_entropy(model(drawn.tokens)[asked], drawn.answers[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in MARKS or step == steps:
            curve[step] = recalled(model, names)
    return curve


def hybrid() -> Listener:
    torch.manual_seed(0)
    return Listener(config(1, CONTEXT))


def window() -> Listener:
    torch.manual_seed(0)
    return Listener(config(0, WINDOW))


def run() -> list[Row]:
    rows = []
    with threads(1):
        for names in TOLD:
            shown, last = [], []
            for model in (hybrid(), window()):
                curve = train(model, names)
                far = " / ".join(f"{right:.2f}" for _, right in curve.values())
                near = curve[STEPS][0]
                shown.append(f"{far}; near {near:.2f}; {model.state_floats():,} floats")
                last.append(curve[STEPS][1])
            marks = ", ".join(map(str, MARKS))
            what = f"{names} code word{'s'[: names - 1]}: far questions right after {marks} steps"
            note = f"chance is {CHANCE:.2f}; the window reaches {2 * (WINDOW - 1)} back, not {FAR}"
            ratio = last[0] / max(last[1], CHANCE)
            rows.append(Row(what, shown[0], f"{shown[1]} (window)", ratio, "reported", note=note))
    return rows


if __name__ == "__main__":
    print_table(run())
