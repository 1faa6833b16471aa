"""What the model says before and after a round: the same prompts, the same seed.

For a person's eye only. Nothing is decided by it and no record holds it: another machine's last
bits may lead to another word.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moshi_fl.errors import MoshiError
from moshi_fl.hubfile import HubConfig
from moshi_fl.models import task_of
from moshi_fl.text import clean
from moshi_fl.weights import Weights

if TYPE_CHECKING:
    from torch import nn

    from moshi_fl.models.family import Sampling, Task

PROMPTS = ("def ", "import ", "The ")
MAX_TOKENS = 48
MAX_SHOWN = 400  # characters of a sample
TEMPERATURE = 0.7
SEED = 0
PATIENCE = 60.0  # seconds for all samples of a round, after which nothing more is written

Model = tuple[Weights, bytes]
"""Weights and the tokenizer that goes with them."""


@dataclass(frozen=True)
class Sample:
    """What two models make of one prompt."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Samples:
    """All samples of a round.

    Attributes:
        entries: One for each prompt.
        note: Why there are none, or fewer than there should be.
    """

    entries: tuple[Sample, ...] = ()
    note: str = ""


NOTHING = Samples()
Sampler = Callable[[HubConfig, Model, Model], Samples]
"""Gives the samples, for a hub's settings and its model before and after."""


def sampler(
    prompts: Sequence[str] = (),
    *,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
) -> Sampler:
    """What takes samples on this machine.

    Args:
        prompts: What the model continues; a few of ours when empty.
        patience: Seconds for all of them; what has not been said by then is left out. Building
            the models counts, but is not cut short.
        clock: Tells the time.
    """
    chosen = tuple(prompts)

    def take(config: HubConfig, before: Model, after: Model) -> Samples:
        start, said = clock(), "before the round"
        asked = chosen if prompts else _own_prompts(config, after)
        half, end = start + patience / 2, start + patience
        try:
            old = list(_answers(config, before, asked, lambda: clock() > half))
            said = "after it"
            new = list(_answers(config, after, asked, lambda: clock() > end))
        except MoshiError as error:  # it writes no text, or its numbers are not finite
            return Samples(note=f"None could be taken, {said}: {error}")
        count = min(len(old), len(new))
        triples = zip(asked[:count], old[:count], new[:count], strict=True)
        note = "" if count == len(asked) else f"The rest did not come within {patience:.0f} s."
        return Samples(tuple(Sample(*triple) for triple in triples), note)

    return take


def _own_prompts(config: HubConfig, model: Model) -> tuple[str, ...]:
    """What a model of this family is asked; one that speaks says something by itself."""
    from moshi_fl.models.family import Speaks

    task = task_of(config, model[1])
    return ("",) if isinstance(task, Speaks) else PROMPTS


def _answers(
    config: HubConfig, model: Model, prompts: Sequence[str], late: Callable[[], bool]
) -> Iterator[str]:
    """The answer to each prompt, until it is late."""
    from moshi_fl.models.common import model_of
    from moshi_fl.models.family import Sampling
    from moshi_hub.measure import few_threads

    weights, tokenizer = model
    task = task_of(config, tokenizer)
    module = model_of(task, weights)
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=SEED)
    with few_threads(module):
        for prompt in prompts:
            if late():
                return
            yield _answer(task, module, prompt, sampling, late)


def _answer(
    task: Task, module: nn.Module, prompt: str, sampling: Sampling, late: Callable[[], bool]
) -> str:
    text = ""
    for piece in task.generate(module, prompt, sampling):
        text += piece
        if late() or len(text) > MAX_SHOWN:
            return f"{text[:MAX_SHOWN]}…"
    return text


def shown(samples: Samples, rows: int) -> str:
    """The samples in Markdown, one below the other; empty when nothing was tried."""
    parts = []
    for sample in samples.entries[:rows]:
        for which, text in (("before", sample.before), ("after", sample.after)):
            parts += [f"{which}:\n", fenced(sample.prompt + text)]
    if not parts and not samples.note:
        return ""
    how = f"Temperature {TEMPERATURE}, seed {SEED}; another machine may say it otherwise."
    head = f"## Samples\n\n{how}\n"
    note = f"{fenced(samples.note)}" if samples.note else ""
    return "\n".join(filter(None, [head, *parts, note])) + "\n"


def fenced(text: str) -> str:
    """Anybody's text as a block of code, which it cannot leave."""
    harmless = clean(text, keep="\n\t")
    longest = max((len(run) for run in re.findall(r"`+", harmless)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{harmless}\n{fence}\n"
