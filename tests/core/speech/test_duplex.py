"""Sessions: frames of sound in, frames of sound and text out, for streams that come and go."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.speech.duplex import DuplexSession, Reply
from moshi_fl.models.speech.eight_bits import EightBitLinear
from moshi_fl.models.speech.generate import LMGen
from moshi_fl.models.speech.latency import Latency
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.sampling import Sampling
from tests.support.mimis import small_mimi
from tests.support.speeches import Spelling, lm_of, tiny

FRAME = 1920
GREEDY = Sampling(use_sampling=False)
DELAYS = {"late": (0, 0, 2, 1), "as Moshi": (0, 0, 1, 0), "at once": (0, 0, 0, 0)}


def talker(**changes: Any) -> LMModel:
    """A model in miniature that speaks in the codes of the small codec."""
    return lm_of(tiny(card=64, **changes))


def voice(frames: int, batch: int = 1, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames * FRAME, generator=generator) / 10


SPELLING = Spelling()


def session(model: LMModel | None = None, **choices: Any) -> DuplexSession:
    return DuplexSession(
        small_mimi(), model or talker(), SPELLING, **{"sampling": GREEDY} | choices
    )


def converse(held: DuplexSession, sound: Tensor) -> list[Reply]:
    return [held.push(frame) for frame in sound.split(FRAME, dim=1)]


def sound_of(replies: list[Reply]) -> Tensor:
    return torch.cat([reply.sound for reply in replies], dim=1)


def same(found: list[Reply], wanted: list[Reply]) -> bool:
    texts = [reply.text for reply in found] == [reply.text for reply in wanted]
    return texts and torch.equal(sound_of(found), sound_of(wanted))


@pytest.mark.parametrize("delays", DELAYS.values(), ids=DELAYS)
def test_a_session_says_what_its_parts_say_one_after_the_other(delays: tuple[int, ...]) -> None:
    model, sound = talker(delays=delays), voice(14, batch=2)
    with session(model, batch=2) as held:
        replies = converse(held, sound)
    mimi, late = small_mimi(), max(delays)
    mimi.set_num_codebooks(1)
    heard = mimi.encode(sound[:, None])
    steps = LMGen(model, GREEDY)
    with steps.streaming(2):
        # The first step hears nothing, so that the first frame is given twice.
        said = [steps.step(heard[:, :, max(0, n - 1)][..., None]) for n in range(15)]
    tokens = torch.cat([frame for frame in said if frame is not None], dim=2)
    tokens = tokens if late else tokens[..., 1:]
    with torch.no_grad():
        wanted = mimi.decode(tokens[:, 1:])[:, 0]
    silent = held.delay * FRAME
    assert held.delay == max(0, late - 1)
    assert (sound_of(replies)[:, :silent] == 0).all()
    torch.testing.assert_close(sound_of(replies)[:, silent:], wanted, atol=3e-5, rtol=0)
    for stream in range(2):
        texts = [reply.text[stream] for reply in replies]
        assert texts[: held.delay] == [""] * held.delay
        wanted_texts = [SPELLING.pieces([token]) for token in tokens[stream, 0].tolist()]
        assert texts[held.delay :] == wanted_texts


def test_the_first_frame_is_heard() -> None:
    model, sound = talker(), voice(6)
    louder = torch.cat([3 * sound[:, :FRAME], sound[:, FRAME:]], dim=1)
    with session(model) as held:
        one = converse(held, sound)
    with session(model) as held:
        assert not same(converse(held, louder), one)


def test_a_stream_that_begins_anew_disturbs_no_other() -> None:
    model, sound = talker(), voice(24, batch=2)
    with session(model, batch=2) as held:
        alone = converse(held, sound)
    with session(model) as held:
        again = converse(held, sound[1:, 9 * FRAME :])
    with session(model, batch=2) as held:
        replies = converse(held, sound[:, : 9 * FRAME])
        held.reset(torch.tensor([False, True]))
        replies += converse(held, sound[:, 9 * FRAME :])
    close = {"atol": 3e-5, "rtol": 0}
    torch.testing.assert_close(sound_of(replies)[0], sound_of(alone)[0], **close)
    torch.testing.assert_close(sound_of(replies)[1, 9 * FRAME :], sound_of(again)[0], **close)
    assert [r.text[0] for r in replies] == [r.text[0] for r in alone]
    assert [r.text[1] for r in replies[9:]] == [r.text[0] for r in again]


def test_all_streams_begin_anew() -> None:
    sound = voice(8, batch=2)
    with session(batch=2) as held:
        first = converse(held, sound)
        held.reset()
        assert same(converse(held, sound), first)


@pytest.mark.parametrize("ttt", [{}, {"ttt_layers": 2}])
def test_a_saved_session_goes_on_as_if_nothing_had_happened(ttt: dict[str, Any]) -> None:
    sound, choices = voice(30, batch=2), {"sampling": Sampling(), "batch": 2}
    with session(talker(**ttt), seed=1, **choices) as first:
        converse(first, sound[:, : 13 * FRAME])
        saved = first.save()
        wanted = converse(first, sound[:, 13 * FRAME :])
        first.restore(saved)
        assert same(converse(first, sound[:, 13 * FRAME :]), wanted)
    with session(talker(**ttt), seed=2, **choices) as second:
        converse(second, sound[:, : 5 * FRAME])
        second.restore(saved)
        assert same(converse(second, sound[:, 13 * FRAME :]), wanted)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    sound = voice(12)
    with session() as held:
        wanted = converse(held, sound)
    with session(talker(num_layers=2)) as other:
        strange = other.save()
    with session() as held:
        replies = converse(held, sound[:, : 6 * FRAME])
        with pytest.raises(DataError, match="does not fit"):
            held.restore(strange)
        with pytest.raises(DataError, match="a saved session holds"):
            held.restore({"lm": strange["lm"]})
        assert same(replies + converse(held, sound[:, 6 * FRAME :]), wanted)


def test_a_seed_repeats_a_conversation_and_another_seed_does_not() -> None:
    model, sound = talker(), voice(20)
    said = []
    for seed in (1, 1, 2):
        with session(model, sampling=Sampling(), seed=seed) as held:
            said.append(converse(held, sound))
    assert same(said[0], said[1])
    assert not same(said[0], said[2])


def test_eight_bits_speak_with_the_models_voice() -> None:
    """Most frames are the same; the model itself stays as it is."""
    model, sound = talker(dim=64, depformer_dim=64), voice(12)
    with session(model) as held:
        plain = converse(held, sound)
    with session(model, int8=True) as held:
        assert any(isinstance(part, EightBitLinear) for part in held._lm.modules())
        eight = converse(held, sound)
    with session(model) as held:
        assert same(converse(held, sound), plain)
    agreeing = sum(a.text == b.text for a, b in zip(plain, eight, strict=True))
    assert agreeing >= 8


def test_models_in_bfloat16_take_and_give_float32() -> None:
    mimi, model = small_mimi().bfloat16(), talker().bfloat16()
    with DuplexSession(mimi, model, SPELLING, sampling=GREEDY) as held:
        found = sound_of(converse(held, voice(6).double()))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert found.std() > 0


WRONG: list[tuple[Tensor, str]] = [
    (torch.zeros(1, FRAME - 1), r"shape \[1, 1919\]; it takes one whole frame: \[1, 1920\]"),
    (torch.zeros(1, 2 * FRAME), "one whole frame"),
    (torch.zeros(2, FRAME), "one whole frame"),
    (torch.zeros(1, FRAME, dtype=torch.int16), "must be floating point from -1 to 1"),
    (torch.full((1, FRAME), torch.nan), "stream 0 with samples that are not finite"),
    (torch.full((1, FRAME), torch.inf), "stream 0 with samples that are not finite"),
]


def test_what_is_no_frame_is_refused_and_leaves_no_trace() -> None:
    sound = voice(8)
    with session() as held:
        wanted = converse(held, sound)
    with session() as held:
        replies = converse(held, sound[:, : 4 * FRAME])
        for wrong, message in WRONG:
            with pytest.raises(DataError, match=message):
                held.push(wrong)
        assert same(replies + converse(held, sound[:, 4 * FRAME :]), wanted)
        assert held.latency.frames == 8


def test_models_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="in 2 codebooks of 20 codes; Mimi has 8 of 64"):
        session(lm_of(tiny()))
    with pytest.raises(ConfigError, match="must say some and hear others"):
        session(talker(dep_q=3, delays=(0, 0, 0, 0)))


def test_a_closed_session_leaves_its_models_as_they_were() -> None:
    mimi, model = small_mimi(), talker()
    levels = mimi.num_codebooks
    with DuplexSession(mimi, model, SPELLING) as held:
        held.push(voice(1)[0])
        with pytest.raises(RuntimeError, match="streaming already"):
            DuplexSession(mimi, model, SPELLING).__enter__()
        held.push(voice(1)[0])
    assert not mimi.is_streaming
    assert not model.is_streaming
    assert mimi.num_codebooks == levels
    with pytest.raises(DataError, match="not open"):
        held.push(voice(1)[0])


def test_memory_does_not_grow_with_a_conversation() -> None:
    """Past the wrap of every ring, no tensor is left over by a frame."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    frame = voice(1)
    with session(talker(ttt_layers=1)) as held:
        for _ in range(40):
            held.push(frame)
        before, size = tensors(), weight_of(held.save())
        for _ in range(160):
            held.push(frame)
        assert tensors() == before
        assert weight_of(held.save()) == size


def weight_of(saved: Any) -> int:
    """Numbers in all tensors of a saved session."""
    if isinstance(saved, Tensor):
        return saved.numel()
    return sum(map(weight_of, saved.values())) if isinstance(saved, dict) else 0


def test_latency_knows_its_quantiles_to_a_hundredth() -> None:
    latency = Latency(frame=0.08)
    assert latency.quantile(0.5) == latency.real_time_factor == latency.worst == 0
    for n in range(1, 101):
        latency.add(n / 1000)
    assert latency.quantile(0.5) == pytest.approx(0.050, rel=0.01)
    assert latency.quantile(0.95) == pytest.approx(0.095, rel=0.01)
    assert latency.quantile(1.0) == latency.worst == 0.1
    assert latency.real_time_factor == pytest.approx(0.0505 / 0.08)
    for wild in (0.0, 1e9):
        latency.add(wild)
    assert latency.worst == 1e9
    assert latency.quantile(0.0) <= 1e-5


def test_a_session_measures_every_frame() -> None:
    with session() as held:
        converse(held, voice(5))
        latency = held.latency
    assert latency.frames == 5
    assert 0 < latency.quantile(0.5) <= latency.quantile(0.95) <= latency.worst
    assert latency.real_time_factor == pytest.approx(latency.total / 0.4)
