"""Released names and shapes, and what the loader says about those that are not."""

from __future__ import annotations

import json

import pytest
import torch

from moshi_fl.errors import CorruptRecord
from moshi_fl.models.speech.checkpoints import load_checkpoint, released_state
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.mimi_config import MimiConfig
from tests.support.mimis import SHARED, small_mimi, small_spec, small_weights


def test_released_names_go_in_and_out() -> None:
    mimi, weights = small_mimi(), small_weights()
    state = released_state(mimi)
    assert {name: list(value.shape) for name, value in state.items()} == small_spec()["keys"]
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    load_checkpoint(mimi, mimi.state_dict())


def test_the_real_mimi_has_the_released_shapes() -> None:
    path = SHARED / "keys.json"
    if not path.exists():
        pytest.skip("the list of released names is not part of this repository")
    listed = json.loads(path.read_text())["mimi"]
    with torch.device("meta"):
        mimi = Mimi(MimiConfig.from_reference(listed["cfg"]))
    shapes = {name: list(value.shape) for name, value in released_state(mimi).items()}
    assert shapes == listed["keys"]
    assert mimi.config == MimiConfig()
    assert sum(p.numel() for p in mimi.parameters()) == 79_308_609


def test_old_names_of_codebooks_load() -> None:
    mimi, weights = small_mimi(), small_weights()
    old = {"_initialized": "inited", "cluster_usage": "cluster_size", "embedding_sum": "embed_avg"}
    for name in list(weights):
        stem, _, last = name.rpartition(".")
        if last in old:
            weights[f"{stem}.{old[last]}"] = weights.pop(name)
    load_checkpoint(mimi, weights)


def test_what_does_not_fit_is_listed_by_kind() -> None:
    mimi, weights = small_mimi(), small_weights()
    before = {name: value.clone() for name, value in mimi.state_dict().items()}
    gone = [name for name in weights if name.startswith("decoder.model")]
    changed = {name: value + 1 for name, value in weights.items() if name not in gone}
    changed["encoder.model.0.conv.conv.bias"] = torch.zeros(3)
    changed["speaker"] = torch.zeros(1)
    with pytest.raises(CorruptRecord) as caught:
        load_checkpoint(mimi, changed)
    message = str(caught.value)
    assert f"{len(gone)} missing: {', '.join(gone[:10])} and {len(gone) - 10} more; " in message
    assert "1 unknown: speaker; " in message
    assert "1 misshapen: encoder.model.0.conv.conv.bias [3] instead of [8]." in message
    assert all(torch.equal(value, before[name]) for name, value in mimi.state_dict().items())
    assert caught.value.hint
