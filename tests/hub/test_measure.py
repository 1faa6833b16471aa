"""Losses that machines agree on: every family, any number of threads, whole pools and parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.evidence import LARGEST_LOSS
from moshi_fl.hubfile import parse_hubfile
from moshi_fl.models import get_family, get_preset
from moshi_fl.models.common import able_to_read
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.weights import save_weights
from moshi_hub.create import Plan, render_hubfile
from moshi_hub.heldout import chart_of, figures_of, store_pool
from moshi_hub.measure import BaseModel, Desk, Meter, measure, referee, tokenizer_before_growth
from tests.support.espeak import write_dialogues
from tests.support.simulator import MODEL, HubSimulator, write_corpus

MOC = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32}
SPEECH = {"dim": 32, "depformer_dim": 16, "ttt_layers": 1, "segment_frames": 12}
SMALL = {"char": MODEL, "moc": MOC, "speech": SPEECH}


def desk(folder: Path, family: str) -> Desk:
    preset = get_preset(family, "tiny")
    preset = replace(preset, model={**preset.model, **SMALL[family]})
    config = parse_hubfile(
        render_hubfile(Plan(url="x", family=family, preset="tiny", name="x"), preset)
    )
    task = get_family(family).load(config.model_table, preset.tokenizer)
    if family == "speech":
        write_dialogues(folder / "held", client=0, count=3, length=4)
    else:
        write_corpus(folder / "held")
    weights = task.initial_weights(1)
    corpus = able_to_read(task, lambda: weights).read([folder / "held"], seed=0)
    (folder / "pool").write_bytes(task.pool(corpus, 10, seed=0, held_out=False))
    save_weights(folder / "base", weights)
    bases = {0: BaseModel(folder / "base", preset.tokenizer)}
    return Desk(config, folder / "pool", bases, {}, folder)


@pytest.fixture(params=["char", "moc", "speech"])
def any_desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return desk(tmp_path, request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_parts_of_a_pool_have_the_losses_of_the_whole(any_desk: Desk) -> None:
    meter = Meter(any_desk, "float64")
    whole = meter.base_losses(0, None)
    assert meter.size() == len(whole) == 10
    assert meter.base_losses(0, [7, 2, 2]) == [whole[7], whole[2], whole[2]]


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing(any_desk: Desk) -> None:
    found = set()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.add(tuple(Meter(any_desk, "float64").base_losses(0, None)))
    assert len(found) == 1
    assert torch.get_num_threads() == 2


def test_float32_is_within_its_tolerance_of_float64(any_desk: Desk) -> None:
    exact = np.array(Meter(any_desk, "float64").base_losses(0, None))
    near = np.array(Meter(any_desk, "float32").base_losses(0, None))
    assert np.abs(exact - near).max() <= 100


def test_all_of_a_module_is_float64(any_desk: Desk) -> None:
    meter = Meter(any_desk, "float64")
    module = meter._module(0, any_desk.base(0))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}


def test_a_pool_that_is_not_here_is_asked_for(any_desk: Desk) -> None:
    missing = replace(any_desk, pool=any_desk.pool.with_name("none"))
    with pytest.raises(Exception, match="held-out pool is not on this machine"):
        Meter(missing, "float64").size()


def test_the_tokenizer_of_an_earlier_round_lacks_what_was_appended() -> None:
    old = CharVocabulary()
    new = old.grown("éß")
    assert tokenizer_before_growth(new.to_bytes(), 2) == old.to_bytes()
    assert tokenizer_before_growth(new.to_bytes(), 0) == new.to_bytes()


def test_a_submission_is_its_base_plus_its_own_delta(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path, delta={"codec": "f32"})
    snapshot = hub.replica.pull()
    delta = {n: np.full(a.shape, 1e-3, np.float32) for n, a in snapshot.load().items()}
    entry = hub.contribute(delta=delta)
    found = hub.look()
    (tmp_path / "x").mkdir()
    plain = desk(tmp_path / "x", "char")
    mine = Desk(
        found.rules.config,
        plain.pool,
        {0: BaseModel(snapshot.path, snapshot.state.tokenizer)},
        {entry.id: entry},
        hub.folder / "look" / "0" / "deltas",
    )
    meter = Meter(mine, "float64")
    bases, results = measure(meter, [entry.id, "f" * 32], [0, 3], [5])
    assert (len(bases), len(results)) == (1, 1)
    after = mine.after(entry, 1.0)
    assert all(
        np.array_equal(after[n], (a.astype(np.float64) + delta[n]).astype(np.float32))
        for n, a in snapshot.load().items()
    )
    ruling = referee(meter)(entry.id, 3)
    assert ruling
    assert ruling.before == meter.base_losses(0, [3])[0] != ruling.after
    assert referee(meter)("f" * 32, 3) is None


def test_weights_that_would_be_infinite_have_the_largest_loss(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path, delta={"codec": "f32", "max_norm": 1e30})
    snapshot = hub.replica.pull()
    shapes = {name: array.shape for name, array in snapshot.load().items()}
    entry = hub.contribute(delta={n: np.full(s, 1e26, np.float32) for n, s in shapes.items()})
    found = hub.look()
    huge = tmp_path / "huge"
    largest = np.finfo(np.float32).max
    save_weights(huge, {n: np.full(s, largest, np.float32) for n, s in shapes.items()})
    (tmp_path / "x").mkdir()
    mine = Desk(
        found.rules.config,
        desk(tmp_path / "x", "char").pool,
        {0: BaseModel(huge, snapshot.state.tokenizer)},
        {entry.id: entry},
        hub.folder / "look" / "0" / "deltas",
    )
    meter = Meter(mine, "float64")
    assert meter.base_losses(0, [0])[0] <= LARGEST_LOSS
    assert all(0 <= loss <= LARGEST_LOSS for loss in meter.after_losses(entry, [0, 1]))


def test_a_round_is_measured_on_the_pool(hub: HubSimulator, tmp_path: Path) -> None:
    state = hub.replica.look()
    with pytest.raises(DataError, match="no held-out pool"):
        figures_of(hub.replica, hub.replica.pull())
    held = [write_corpus(tmp_path / "held", files=4)]
    store_pool(hub.replica, state.config, state.tokenizer, held)
    found = figures_of(hub.replica, hub.replica.pull(0))
    assert list(found) == ["loss"]
    assert 1 < found["loss"] < 20
    with pytest.raises(ConfigError, match="nothing to draw"):
        chart_of(hub.replica, [hub.replica.pull(0)])
