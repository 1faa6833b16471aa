"""The real configuration on real speech, where its fixture is at hand: it may not be copied.

Weights come from a recipe beside the fixture. A code may differ from the reference's only from a
level on where the two nearest centroids are equally far to a part in 100,000.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_fl.models.speech.checkpoints import load_checkpoint
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.mimi_config import MimiConfig
from moshi_fl.weights import open_weights
from tests.support.mimis import SHARED

FRAME = 1920
CONTEXT = 125  # frames; beyond them the reference's own stream loses keys
CLOSE = {"atol": 5e-5, "rtol": 0}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED / "mimi_full.safetensors").exists(),
        reason="the fixture with real speech is not part of this repository",
    ),
]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    arrays = open_weights(SHARED / "mimi_full.safetensors")
    return {name: torch.tensor(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    spec = json.loads((SHARED / "mimi_full.json").read_text())
    keys = json.loads((SHARED / "keys.json").read_text())["mimi"]["keys"]
    weights = recipe().mimi_state(spec["seed"], keys)
    for name, (total, absolute) in spec["checksums"].items():
        exact = weights[name].astype(np.float64)
        assert exact.sum() == pytest.approx(total, abs=1e-6, rel=1e-9), name
        assert np.abs(exact).sum() == pytest.approx(absolute, rel=1e-9), name
    mimi = Mimi(MimiConfig.from_reference(spec["cfg"]))
    load_checkpoint(mimi, {name: torch.from_numpy(value) for name, value in weights.items()})
    return mimi.eval()


def recipe() -> Any:
    found = importlib.util.spec_from_file_location("recipe", SHARED / "recipe.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def speech(theirs: dict[str, Tensor]) -> Tensor:
    sound = (theirs["pcm"].float() / 32768)[None, None]
    return F.pad(sound, (0, -sound.shape[-1] % FRAME))


def agree(codes: Tensor, wanted: Tensor, margin: Tensor) -> bool:
    """Equal, except from a level on where the choice was a toss-up."""
    open_choice = (margin < 1e-5).cummax(dim=1).values
    return bool(((codes == wanted) | open_choice).all())


def test_latents_and_codes_are_the_references(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    sound = (theirs["pcm"].float() / 32768)[None, None]  # not a whole number of frames
    with torch.no_grad():
        latent = mimi.encode_to_latent(sound, quantize=False)
    torch.testing.assert_close(latent, theirs["latent"], atol=1e-4, rtol=0)
    for levels in (32, 8):
        mimi.set_num_codebooks(levels)
        codes = mimi.encode(sound)
        assert agree(codes, theirs[f"codes{levels}"], theirs[f"margin{levels}"])


def test_sound_is_the_references(mimi: Mimi, theirs: dict[str, Tensor]) -> None:
    codes = theirs["codes8"].long()
    torch.testing.assert_close(mimi.decode_latent(codes), theirs["quantised"], **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(mimi.decode(codes), theirs["wav"], **CLOSE)


@pytest.mark.parametrize("size", [1, 5, 7])
def test_streamed_is_offline_beyond_ten_seconds(
    mimi: Mimi, theirs: dict[str, Tensor], size: int
) -> None:
    mimi.set_num_codebooks(8)
    sound, codes = speech(theirs), theirs["codes8"].long()
    with torch.no_grad(), mimi.streaming(1):
        streamed = [mimi.encode(piece) for piece in sound.split(size * FRAME, dim=-1)]
        heard = torch.cat([mimi.decode(piece) for piece in codes.split(size, dim=-1)], dim=-1)
    assert agree(torch.cat(streamed, dim=-1), codes, theirs["margin8"])
    torch.testing.assert_close(heard, theirs["wav"], **CLOSE)
    if size == 1:
        assert agree(
            torch.cat(streamed[:CONTEXT], dim=-1),
            theirs["stream_codes8"][..., :CONTEXT],
            theirs["margin8"][..., :CONTEXT],
        )
        until = CONTEXT * FRAME
        torch.testing.assert_close(heard[..., :until], theirs["stream_wav"][..., :until], **CLOSE)
