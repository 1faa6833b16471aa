"""Sampling, stop strings and the char family's generation as a user sees it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import ConfigError, MoshiError
from moshi_fl.generate import PENALISED, Sampler, until_stop
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


def test_min_p_leaves_the_tokens_that_are_nearly_as_likely_as_the_likeliest() -> None:
    assert draws(min_p=0.0) == {0, 1, 2, 3}
    assert draws(min_p=0.3) == {1, 3}  # e**-1 of the likeliest, but not e**-2
    assert draws(min_p=1.0) == {1}
    assert draws(min_p=0.3, temperature=0.5) == {1}  # temperature comes first


def in_play(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float):
    """What the definitions leave, in their order; ties with the last one stay."""
    best = max(logits)
    play = {i: math.exp((value - best) / temperature) for i, value in enumerate(logits)}
    least = sorted(play.values(), reverse=True)[:top_k][-1]
    play = {i: p for i, p in play.items() if p >= least and p > 0}
    nucleus: dict[int, float] = {}
    for i in sorted(play, key=lambda i: -play[i]):
        if sum(nucleus.values()) >= top_p * sum(play.values()):
            break
        nucleus[i] = play[i]
    return {i for i, p in nucleus.items() if p >= min_p}


@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(1, 14),
    top_p=st.sampled_from([0.01, 0.35, 0.77, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.2, 0.9]),
    seed=st.integers(0, 1 << 80),
)
def test_all_settings_together_draw_from_what_their_definitions_leave(
    values, temperature, top_k, top_p, min_p, seed
) -> None:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampler = Sampler(**settings, seed=seed)
    logits = torch.tensor(values, dtype=torch.float32)
    drawn = {sampler.pick(logits) for _ in range(30)}
    assert drawn <= in_play(values, **settings)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    sampler = Sampler(temperature=2.0, seed=3)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[sampler.pick(LOGITS)] += 1
    assert torch.allclose(counts / 4000, (LOGITS / 2).softmax(0), atol=0.03)  # 4 sigma


def test_the_penalty_weakens_what_was_said_lately_also_at_temperature_zero() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    greedy = Sampler(temperature=0, repetition_penalty=2.0)
    assert greedy.pick(logits) == 0
    assert greedy.pick(logits, [0, 0, 0]) == 1  # 2 / 2 < 1.5, once however often it was said
    assert greedy.pick(logits, [0, 1]) == 0
    below = torch.tensor([-1.0, -1.5])
    assert greedy.pick(below, [0]) == 1  # a negative one is multiplied
    assert greedy.pick(logits, [0, *[3] * PENALISED]) == 0  # long forgotten
    assert logits.tolist() == [2.0, 1.5, -1.0, -1.5]  # the caller's logits stay as they are


def test_a_penalty_of_one_and_an_empty_history_change_nothing() -> None:
    plain, same = (Sampler(temperature=1.0, repetition_penalty=p, seed=5) for p in (1.0, 1.3))
    assert [plain.pick(LOGITS, [1]) for _ in range(20)] == [same.pick(LOGITS) for _ in range(20)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "logits", [[float("nan"), 1.0], [1.0, float("inf")], [float("-inf")] * 2, [float("nan")] * 2]
)
def test_logits_that_are_not_finite_are_an_error_with_a_way_out(
    logits: list[float], temperature: float
) -> None:
    sampler = Sampler(temperature=temperature, top_p=0.9, repetition_penalty=1.1)
    with pytest.raises(MoshiError, match="not finite") as caught:
        sampler.pick(torch.tensor(logits), [0])
    assert "--round" in caught.value.hint


def test_extreme_settings_and_logits_still_draw() -> None:
    huge = torch.tensor([3e38, -3e38, 0.0, -torch.inf])
    for temperature in (5e-324, 1e-20, 1e300):
        for setting in ({}, {"top_k": 10**9}, {"top_p": 5e-324}, {"min_p": 5e-324}):
            sampler = Sampler(temperature=temperature, seed=0, **setting)  # type: ignore[arg-type]
            assert sampler.pick(huge) in {0, 1, 2}
    uniform = torch.zeros(3000, dtype=torch.bfloat16)
    assert 0 <= Sampler(temperature=1.0, top_p=1e-9, seed=0).pick(uniform) < 3000
    assert Sampler(temperature=1.0, seed=1 << 200).pick(torch.zeros(1)) == 0


def test_equal_seeds_draw_equally_and_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (Sampler(temperature=1.0, seed=9) for _ in range(2))
    uniform = torch.zeros(1000)
    assert [first.pick(uniform) for _ in range(5)] == [second.pick(uniform) for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")),
    ],
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
