"""Sampling, stop strings and the char family's generation as a user sees it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import ConfigError
from moshi_fl.generate import Sampler, until_stop
from moshi_fl.models import get_family
from moshi_fl.models.char_decode import CharDecoder
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.common import load_weights
from moshi_fl.models.family import Sampling
from moshi_fl.tokenizer import CharVocabulary

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -torch.inf])
MODEL = {"n_layer": 1, "n_head": 2, "d_model": 16, "d_ff": 32, "context": 16}


@pytest.fixture(scope="module")
def task() -> CharTask:
    task = get_family("char").load(MODEL, CharVocabulary().to_bytes())
    assert isinstance(task, CharTask)
    return task


@pytest.fixture
def module(task: CharTask) -> torch.nn.Module:
    module = task.build()
    load_weights(module, task.initial_weights(0))
    with torch.no_grad():
        module.fc_out.bias[CharVocabulary.end] = -1e9  # untrained, it would stop at random
    return module


def draws(count: int = 300, **settings: object) -> set[int]:
    sampler = Sampler(seed=0, **{"temperature": 1.0, **settings})  # type: ignore[arg-type]
    return {sampler.pick(LOGITS) for _ in range(count)}


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert draws(temperature=0) == {1}
    assert draws(temperature=1e-30) == {1}


def test_impossible_tokens_are_never_drawn_and_all_others_are() -> None:
    assert draws() == {0, 1, 2, 3}


def test_top_k_and_top_p_leave_the_likely_tokens_in_play() -> None:
    assert draws(top_k=2) == {1, 3}
    assert draws(top_k=100) == {0, 1, 2, 3}
    assert draws(top_p=1e-9) == {1}
    assert draws(top_p=0.7) == {1, 3}  # 0.64 for the first alone
    assert draws(top_p=1.0) == {0, 1, 2, 3}


def test_equal_seeds_draw_equally_and_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (Sampler(temperature=1.0, seed=9) for _ in range(2))
    uniform = torch.zeros(1000)
    assert [first.pick(uniform) for _ in range(5)] == [second.pick(uniform) for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0)],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        Sampler(**{"temperature": 1.0, key: value})  # type: ignore[arg-type]


@given(st.lists(st.text("ab\n", max_size=3)), st.lists(st.text("ab\n", max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    pieces: list[str], stop: list[str]
) -> None:
    text = "".join(pieces)
    # The earliest place where some stop string has just become complete decides.
    ends = [text.find(s) + len(s) for s in stop if s and s in text]
    seen = text[: min(ends)] if ends else text
    wanted = min((seen[: seen.find(s)] for s in stop if s and s in seen), key=len, default=seen)
    assert "".join(until_stop(list(text), stop)) == wanted
    streamed = "".join(until_stop(pieces, stop))
    assert not any(s and s in streamed for s in stop)
    assert text.startswith(streamed)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    stream = until_stop(iter(["abc", "d", "e", "\n", "\nf"]), ["\n\n"])
    assert list(stream) == ["abc", "d", "e"]
    assert list(until_stop(["x\n", "y"], ["\n\n"])) == ["x", "\ny"]


def test_an_empty_prompt_starts_a_new_file(task: CharTask, module: torch.nn.Module) -> None:
    made = "".join(task.generate(module, "", Sampling(max_tokens=5, temperature=0)))
    logits = CharDecoder(module).restart([CharVocabulary.end]).clone()
    logits[: CharVocabulary.byte_row] = -torch.inf
    first = task.vocabulary.decode([int(logits.argmax())])
    assert made.startswith(first)
    assert made


def test_generation_goes_on_past_the_context(task: CharTask, module: torch.nn.Module) -> None:
    sampling = Sampling(max_tokens=100, seed=4)
    made = "".join(task.generate(module, "x = ", sampling))
    assert made == "".join(task.generate(module, "x = ", sampling))
    assert len(made) > 2 * MODEL["context"]


def test_of_an_overlong_prompt_the_end_counts(task: CharTask, module: torch.nn.Module) -> None:
    sampling = Sampling(max_tokens=8, temperature=0)
    tail = "return a"  # half a context
    long = "".join(task.generate(module, "anything at all, as long as one likes" + tail, sampling))
    assert long == "".join(task.generate(module, tail, sampling))


def test_a_full_context_is_read_anew_from_its_last_half(
    task: CharTask, module: torch.nn.Module
) -> None:
    prompt = "0123456789abcdef"  # exactly one context
    made = "".join(task.generate(module, prompt, Sampling(max_tokens=2, temperature=0)))
    decoder = CharDecoder(module)
    tokens = task.vocabulary.encode(prompt).tolist()
    for _ in range(2):
        logits = decoder.restart(tokens[-16:] if len(tokens) == 16 else tokens[-8:])
        logits = logits.clone()
        logits[1:4] = -torch.inf
        tokens.append(int(logits.argmax()))
    assert made == task.vocabulary.decode(tokens[16:])


def test_with_a_suffix_the_model_is_asked_for_the_middle_and_stops_at_the_context(
    task: CharTask, module: torch.nn.Module
) -> None:
    asked = task._between("before", "after")
    marks = CharVocabulary
    assert (asked[0], asked[-1]) == (marks.prefix, marks.middle)
    assert task.vocabulary.decode(asked) == "forea"  # end of the prefix, start of the suffix
    made = "".join(task.generate(module, "a", Sampling(max_tokens=99, seed=1), suffix="b"))
    assert 0 < len(made) <= MODEL["context"]


def test_marks_are_never_generated(task: CharTask, module: torch.nn.Module) -> None:
    with torch.no_grad():
        module.fc_out.bias[1:4] = 1e9
    assert "".join(task.generate(module, "a", Sampling(max_tokens=20, temperature=0)))


def test_a_bad_setting_is_refused_before_anything_is_generated(
    task: CharTask, module: torch.nn.Module
) -> None:
    with pytest.raises(ConfigError, match="top_p"):
        task.generate(module, "a", Sampling(top_p=2.0))
