"""Chatting with a model while it trains: every answer comes from one version of the weights."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moshi_fl.errors import CorruptRecord
from moshi_fl.models import get_family
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.family import Sampling
from moshi_fl.models.holder import ModelHolder
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.weights import Weights

MODEL = {"n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 64, "context": 32, "dropout": 0.5}
PUBLICATIONS = 30


@pytest.fixture(scope="module")
def task() -> CharTask:
    task = get_family("char").load(MODEL, CharVocabulary().to_bytes())
    assert isinstance(task, CharTask)
    return task


def filled(task: CharTask, value: float) -> Weights:
    return {name: np.full_like(w, value) for name, w in task.initial_weights(0).items()}


def values(module: torch.nn.Module) -> set[float]:
    return {value for p in module.parameters() for value in p.unique().tolist()}


def test_eight_readers_and_a_writer_see_whole_versions_and_nobody_starves(task: CharTask) -> None:
    holder = ModelHolder(task.build, filled(task, 0))
    done = threading.Event()

    def reader() -> list[float]:
        seen = []
        while not done.is_set() or not seen:
            with holder.read() as module:
                first = values(module)
                assert not any(part.training for part in module.modules())
                module(torch.zeros(1, 8, dtype=torch.long))  # time for the writer to interfere
                assert values(module) == first
                assert len(first) == 1
                seen += first
        return seen

    with ThreadPoolExecutor(9) as pool:
        readers = [pool.submit(reader) for _ in range(8)]
        try:
            for version in range(1, PUBLICATIONS + 1):
                holder.publish(filled(task, version))
        finally:
            done.set()
        histories = [future.result(timeout=60) for future in readers]
    assert holder.version == PUBLICATIONS
    assert all(history == sorted(history) for history in histories)  # never back to an old one
    assert len({value for history in histories for value in history}) > 5


def test_an_answer_is_not_disturbed_by_training_that_publishes_meanwhile(task: CharTask) -> None:
    holder = ModelHolder(task.build, task.initial_weights(0))
    sampling = Sampling(max_tokens=40, seed=1)
    trained = task.build().train()  # as training leaves it: dropout on, weights about to change
    with holder.read() as module:
        wanted = "".join(task.generate(module, "def f", sampling))
        answer = task.generate(module, "def f", sampling)
        half = [next(answer) for _ in range(10)]
        for parameter in trained.parameters():
            parameter.data.fill_(9.0)
        holder.publish({n: p.detach().numpy() for n, p in trained.named_parameters()})
        assert "".join([*half, *answer]) == wanted
    assert trained.training  # and the chat has not switched training's dropout off
    with holder.read() as module:
        assert values(module) == {9.0}


def test_a_reader_that_takes_its_time_holds_up_no_other_reader(task: CharTask) -> None:
    holder = ModelHolder(task.build, filled(task, 0))
    with holder.read() as slow:
        holder.publish(filled(task, 1))
        second = threading.Thread(target=holder.publish, args=(filled(task, 2),))
        second.start()  # has to wait for the slow one
        for _ in range(20):
            with holder.read() as module:
                assert values(module) == {1.0}
        assert values(slow) == {0.0}
    second.join(timeout=60)
    with holder.read() as module:
        assert values(module) == {2.0}


def test_memory_is_two_copies_however_often_weights_are_published(task: CharTask) -> None:
    holder = ModelHolder(task.build, filled(task, 0))
    storages = set()
    for version in range(6):
        holder.publish(filled(task, version))
        with holder.read() as module:
            storages |= {p.data_ptr() for p in module.parameters()}
    assert len(storages) == 2 * len(task.initial_weights(0))


def test_weights_that_do_not_fit_leave_readers_what_they_had(task: CharTask) -> None:
    holder = ModelHolder(task.build, filled(task, 3))
    with pytest.raises(CorruptRecord, match=r"fc_out\.bias is missing"):
        holder.publish({k: v for k, v in filled(task, 4).items() if k != "fc_out.bias"})
    with holder.read() as module:
        assert values(module) == {3.0}
    holder.publish(filled(task, 5))
    assert holder.version == 1
