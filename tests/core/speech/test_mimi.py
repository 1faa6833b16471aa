"""Mimi against the reference's numbers, and what it promises beyond them: exact streams."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.speech.mimi import PIECE, Mimi
from moshi_fl.models.speech.mimi_config import MimiConfig
from moshi_fl.models.speech.seanet import SeanetConfig
from moshi_fl.models.speech.transformer import set_attention_context
from tests.support.mimis import small_mimi, small_spec, small_tensors

FRAME = 1920
FRAMES = 24  # of the fixture: nearly five contexts of the transformers
CLOSE = {"atol": 3e-5, "rtol": 0}


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    return small_mimi()


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    return small_tensors()


def encode(mimi: Mimi, sound: Tensor, *sizes: int) -> Tensor:
    """Codes of sound in pieces of these many frames, again and again."""
    return torch.cat([mimi.encode(piece) for piece in pieces(sound, FRAME, sizes)], dim=-1)


def decode(mimi: Mimi, codes: Tensor, *sizes: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([mimi.decode(piece) for piece in pieces(codes, 1, sizes)], dim=-1)


def pieces(x: Tensor, unit: int, sizes: tuple[int, ...]) -> list[Tensor]:
    parts, start = [], 0
    for size in cycle(sizes):
        parts.append(x[..., start : start + size * unit])
        start += size * unit
        if start >= x.shape[-1]:
            return parts
    raise AssertionError


def test_latents_and_codes_are_the_references(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        latent = mimi.encode_to_latent(theirs["wav_in"], quantize=False)
        quantised = mimi.encode_to_latent(theirs["wav_in"])
    torch.testing.assert_close(latent, theirs["latent"], **CLOSE)
    assert torch.equal(mimi.encode(theirs["wav_in"]), theirs["codes"])
    torch.testing.assert_close(quantised, theirs["quantised"], **CLOSE)
    torch.testing.assert_close(mimi.decode_latent(theirs["codes"]), theirs["quantised"], **CLOSE)


def test_sound_is_the_references(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        sound = mimi.decode(theirs["codes"])
        same = mimi.decode_from_latent(theirs["quantised"])
    torch.testing.assert_close(sound, theirs["wav"], **CLOSE)
    torch.testing.assert_close(same, theirs["wav"], **CLOSE)


def test_streams_are_the_references_while_those_lose_no_key(
    mimi: Mimi, theirs: dict[str, Tensor]
) -> None:
    whole = 5  # frames of two positions each: one context
    with mimi.streaming(2):
        assert torch.equal(
            encode(mimi, theirs["wav_in"], 1)[..., :whole], theirs["stream_codes"][..., :whole]
        )
        sound = decode(mimi, theirs["codes"], 1)
    torch.testing.assert_close(
        sound[..., : whole * FRAME], theirs["stream_wav"][..., : whole * FRAME], **CLOSE
    )


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (5,), (7,), (24,), (1, 6, 2, 9)])
def test_streamed_is_offline(mimi: Mimi, theirs: dict[str, Tensor], sizes: tuple[int, ...]) -> None:
    with mimi.streaming(2):
        assert torch.equal(encode(mimi, theirs["wav_in"], *sizes), theirs["codes"])
        sound = decode(mimi, theirs["codes"], *sizes)
    torch.testing.assert_close(sound, theirs["wav"], **CLOSE)


def test_long_sound_is_worked_on_in_pieces(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    sound = theirs["wav_in"].repeat(1, 1, 1 + PIECE // FRAMES)[..., :-7]
    assert sound.shape[-1] > PIECE * FRAME
    codes = mimi.encode(sound)
    whole = mimi.quantizer.encode(
        mimi.encode_to_latent(sound, quantize=False).transpose(1, 2), mimi.num_codebooks
    )
    assert torch.equal(codes, whole)
    with torch.no_grad():
        pieced = mimi.decode(codes)
        latent = mimi.decode_latent(codes)
        torch.testing.assert_close(pieced, mimi.decode_from_latent(latent), **CLOSE)
    assert not mimi.is_streaming


def test_long_sound_is_worked_on_at_once_where_attention_sees_all_of_it() -> None:
    mimi = small_mimi()
    set_attention_context(mimi, None)
    sound = torch.randn(1, 1, 2 * PIECE * FRAME, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = mimi.encode_to_latent(sound, quantize=False)
        codes = mimi.encode(sound)
        assert torch.equal(codes, mimi.quantizer.encode(latent.transpose(1, 2), 8))
        heard = mimi.decode(codes)
        torch.testing.assert_close(heard, mimi.decode_from_latent(mimi.decode_latent(codes)))


def test_items_are_independent(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    for item in (0, 1):
        own = slice(item, item + 1)
        assert torch.equal(mimi.encode(theirs["wav_in"][own]), theirs["codes"][own])


def test_a_masked_item_stands_still(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    rubbish = torch.full((1, 1, FRAME), torch.nan)
    noise = torch.zeros(1, 8, 1, dtype=torch.long)
    codes: list[Tensor] = []
    sound: list[Tensor] = []
    taken = 0
    with torch.no_grad(), mimi.streaming(2):
        for call in range(FRAMES):
            runs = call % 3 != 0  # from the first call on
            mimi.set_exec_mask(torch.tensor([True, runs]))
            now = slice(taken * FRAME, (taken + 1) * FRAME)
            second = theirs["wav_in"][1:, :, now] if runs else rubbish
            first = theirs["wav_in"][:1, :, call * FRAME : (call + 1) * FRAME]
            codes.append(mimi.encode(torch.cat([first, second])))
            given = theirs["codes"][1:, :, taken : taken + 1] if runs else noise
            sound.append(mimi.decode(torch.cat([theirs["codes"][:1, :, call : call + 1], given])))
            taken += runs
    runs_at = [call for call in range(FRAMES) if call % 3]
    mine = torch.cat([codes[call][1] for call in runs_at], dim=-1)
    assert torch.equal(mine, theirs["codes"][1, :, :taken])
    assert torch.equal(torch.cat([c[0] for c in codes], dim=-1), theirs["codes"][0])
    heard = torch.cat([sound[call][1] for call in runs_at], dim=-1)
    torch.testing.assert_close(heard, theirs["wav"][1, :, : taken * FRAME], **CLOSE)


def test_a_reset_item_starts_anew(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    sound = theirs["wav_in"]
    with mimi.streaming(2):
        encode(mimi, sound[..., : 9 * FRAME], 3)
        decode(mimi, theirs["codes"][..., :9], 3)
        mimi.reset_streaming(torch.tensor([False, True]))
        mixed = torch.cat([sound[:1, :, 9 * FRAME :], sound[1:, :, : -9 * FRAME]])
        codes = encode(mimi, mixed, 1)
        assert torch.equal(codes[0], theirs["codes"][0, :, 9:])
        assert torch.equal(codes[1], theirs["codes"][1, :, :-9])
        heard = decode(mimi, codes, 2)
        torch.testing.assert_close(heard[0], theirs["wav"][0, :, 9 * FRAME :], **CLOSE)
        torch.testing.assert_close(heard[1], theirs["wav"][1, :, : -9 * FRAME], **CLOSE)
        mimi.reset_streaming()
        assert torch.equal(encode(mimi, sound, 5), theirs["codes"])


def test_a_stream_goes_on_from_a_snapshot(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    sound, codes = theirs["wav_in"], theirs["codes"]
    with mimi.streaming(2):
        encode(mimi, sound[..., : 9 * FRAME], 2)
        decode(mimi, codes[..., :9], 2)
        saved = mimi.get_streaming_state()
        encode(mimi, sound, 2)
    with mimi.streaming(2):
        mimi.set_streaming_state(saved)
        assert torch.equal(encode(mimi, sound[..., 9 * FRAME :], 2), codes[..., 9:])
        heard = decode(mimi, codes[..., 9:], 2)
    torch.testing.assert_close(heard, theirs["wav"][..., 9 * FRAME :], **CLOSE)


def test_inference_mode_is_fine_anywhere(theirs: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        made_inside = small_mimi()
    made_outside = small_mimi()
    made_outside.streaming_forever(2)
    with torch.inference_mode():
        assert torch.equal(made_inside.encode(theirs["wav_in"]), theirs["codes"])
        assert torch.equal(encode(made_outside, theirs["wav_in"], 3), theirs["codes"])
        made_outside.reset_streaming()
    assert torch.equal(encode(made_outside, theirs["wav_in"], 4), theirs["codes"])
    made_outside.stop_streaming()
    assert not made_outside.is_streaming


def test_any_number_of_codebooks(theirs: dict[str, Tensor]) -> None:
    mimi = small_mimi()
    with torch.no_grad():
        for count in (1, 2, 7):
            mimi.set_num_codebooks(count)
            codes = mimi.encode(theirs["wav_in"])
            assert torch.equal(codes, theirs["codes"][:, :count])
            assert mimi.decode(codes).shape == theirs["wav"].shape
    for wrong in (0, 9):
        with pytest.raises(ConfigError, match=f"{wrong} codebooks asked of Mimi; it has 8"):
            mimi.set_num_codebooks(wrong)


def test_the_last_frame_is_filled_up(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    sound = theirs["wav_in"][..., : 2 * FRAME + 1]
    padded = torch.nn.functional.pad(sound, (0, FRAME - 1))
    assert torch.equal(mimi.encode(sound), mimi.encode(padded))


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (torch.zeros(1, 2, FRAME), r"Mimi takes \[batch, 1, samples\]"),
        (torch.zeros(1, FRAME), r"sound of shape \[1, 1920\]"),
        (torch.zeros(1, 1, 0), "without samples"),
        (torch.zeros(0, 1, FRAME), "without samples"),
        (torch.zeros(1, 1, FRAME, dtype=torch.int16), "sound in torch.int16"),
        (torch.full((1, 1, FRAME), torch.inf), "not finite"),
    ],
)
def test_wrong_sound_is_refused(mimi: Mimi, sound: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mimi.encode(sound)
    with pytest.raises(DataError, match=message):
        mimi.encode_to_latent(sound)


def test_another_rate_is_refused(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    assert torch.equal(mimi.encode(theirs["wav_in"], 24000), theirs["codes"])
    with pytest.raises(DataError, match="sound at 16000 Hz; Mimi takes 24000 Hz"):
        mimi.encode(theirs["wav_in"], 16000)


@pytest.mark.parametrize("samples", [1, FRAME - 1, FRAME + 1, 0])
def test_a_stream_takes_whole_frames(mimi: Mimi, samples: int) -> None:
    with mimi.streaming(1):
        with pytest.raises(DataError, match="samples"):
            mimi.encode(torch.zeros(1, 1, samples))
        mimi.encode(torch.zeros(1, 1, FRAME))
        with pytest.raises(DataError, match="a stream of 1 items was fed 2"):
            mimi.encode(torch.zeros(2, 1, FRAME))
        with pytest.raises(DataError, match="a stream of 1 items was fed 2"):
            mimi.decode(torch.zeros(2, 8, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 8, 2), 64), "code 64 is out of range: Mimi has 0 to 63"),
        (torch.full((1, 8, 2), -1), "code -1 is out of range"),
        (torch.zeros(1, 9, 2, dtype=torch.long), "codes of 9 levels; Mimi has 8"),
        (torch.zeros(1, 8, 0, dtype=torch.long), r"codes of shape \[1, 8, 0\]"),
        (torch.zeros(8, 2, dtype=torch.long), r"codes of shape \[8, 2\]"),
        (torch.zeros(1, 8, 2), "in torch.float32"),
        (torch.zeros(1, 8, 2, dtype=torch.int16), r"in torch.int16; Mimi takes .* \(int64\)"),
    ],
)
def test_wrong_codes_are_refused(mimi: Mimi, codes: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mimi.decode(codes)
    with pytest.raises(DataError, match=message):
        mimi.decode_latent(codes)


def test_a_training_step_reaches_every_parameter(theirs: dict[str, Tensor]) -> None:
    mimi = small_mimi().train()
    made = mimi(theirs["wav_in"])
    assert torch.equal(made.codes, theirs["codes"])
    torch.testing.assert_close(made.sound, theirs["wav"], **CLOSE)
    (made.sound.square().mean() + made.penalty).backward()
    for name, parameter in mimi.named_parameters():
        if not name.startswith("quantizer"):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("frame_rate", "seanet"),
    [
        (25, {}),  # no resampling
        (12.5, {"channels": 2, "n_residual_layers": 2, "dilation_base": 3}),
        (6.25, {"compress": 1, "last_kernel_size": 5}),
    ],
)
def test_other_shapes_stream_too(frame_rate: float, seanet: dict[str, Any]) -> None:
    torch.manual_seed(0)
    table = small_spec()["cfg"]
    mimi = Mimi(
        MimiConfig.from_reference(
            table | {"frame_rate": frame_rate, "seanet": table["seanet"] | seanet}
        )
    ).eval()
    assert mimi.frame_size == 24000 / frame_rate
    sound = torch.randn(1, mimi.channels, 9 * mimi.frame_size)
    with torch.no_grad():
        latent = mimi.encode_to_latent(sound, quantize=False)
        heard = mimi.decode_from_latent(latent)
        assert heard.shape == sound.shape
        with mimi.streaming(1):
            for frame in range(9):
                now = slice(frame * mimi.frame_size, (frame + 1) * mimi.frame_size)
                part = mimi.encode_to_latent(sound[..., now], quantize=False)
                torch.testing.assert_close(part, latent[..., frame : frame + 1], **CLOSE)
                torch.testing.assert_close(mimi.decode_from_latent(part), heard[..., now], **CLOSE)


def test_properties_are_those_of_the_configuration(mimi: Mimi) -> None:
    assert (mimi.sample_rate, mimi.frame_rate, mimi.frame_size) == (24000, 12.5, FRAME)
    assert (mimi.channels, mimi.cardinality, mimi.total_codebooks) == (1, 64, 8)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("seanet", {"norm": "weight_norm"}, "norm = 'weight_norm' must be 'none'"),
        ("seanet", {"causal": False}, "causal = False"),
        ("seanet", {"ratios": [8, 7]}, "sample_rate = 24000 must be a multiple"),
        ("seanet", {"colour": 1}, "unknown key 'colour'"),
        ("quantizer", {"n_q": 1}, "n_q = 1 must be at least 2"),
        ("quantizer", {"input_dimension": 3}, "input_dimension = 3 must be 64"),
        ("transformer", {"causal": False}, "causal = False"),
        ("seanet", {"ratios": 8}, "ratios = 8 must be whole numbers"),
        ("transformer", {"layer_scale": "small"}, "layer_scale = 'small' must be a number"),
        ("transformer", {"max_period": 0}, "max_period = 0 must be a number from 1e-09"),
    ],
)
def test_a_configuration_that_this_is_not(
    section: str, change: dict[str, Any], message: str
) -> None:
    table = small_spec()["cfg"]
    with pytest.raises(ConfigError, match=message):
        MimiConfig.from_reference(table | {section: table[section] | change})
    with pytest.raises(ConfigError, match=f"'{section}' is missing"):
        MimiConfig.from_reference({k: v for k, v in table.items() if k != section})


def test_frames_need_not_be_so_many_a_second_to_the_last_digit() -> None:
    rate = 24000 / (3 * 7 * 13)  # 87.912...
    seanet = SeanetConfig(ratios=(7, 13))
    assert MimiConfig(24000, rate, seanet).frame_size == 3 * 7 * 13


@pytest.mark.parametrize("change", [{"sample_rate": "24000"}, {"frame_rate": 0}], ids=str)
def test_rates_that_are_none_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Mimi: {next(iter(change))} = "):
        MimiConfig.from_reference(small_spec()["cfg"] | change)
