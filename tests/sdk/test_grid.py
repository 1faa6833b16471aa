"""A grid of virtual nodes for Flower's own ServerApps, and Flower's strategies over our deltas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as PrivateClipping
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx

from moshi_fl.aggregate import Update
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.errors import ConfigError
from moshi_fl.flower import FlowerRound, Reply, local_context, to_arrays, to_weights
from moshi_sdk.grid import PATIENCE, node_seed
from moshi_sdk.simulate import (
    Federation,
    Start,
    Turn,
    simulate,
)
from tests.support.simulations import QUICK, losses, tiny_start, write_code


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    return write_code(tmp_path_factory.mktemp("data") / "code")


@pytest.fixture(scope="module")
def start() -> Start:
    return tiny_start()


# Strategies.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("median", {}),
        ("trimmed-mean", {"trim": 0.34}),
        ("flower:FedMedian", {}),
        ("flower:Krum", {"num_malicious_nodes": 1}),
        ("flower:FedAdam", {"eta": 0.02}),
        ("flower:FedYogi", {"eta": 0.02}),
        ("flower:FedAdagrad", {"eta": 0.02}),
        ("flower:FedAvgM", {"server_momentum": 0.5}),
    ],
)
def test_every_strategy_learns(code, start, name, options):
    chosen = replace(QUICK, strategy=name, strategy_options=options)
    result = simulate([code], chosen, start=start)
    assert losses(result)[-1] < losses(result)[0] - 0.05


def test_any_flower_strategy_object_aggregates(code, start):
    private = PrivateClipping(FedAvg(), 1e-9, 1e3, num_sampled_clients=3)
    result = simulate([code], QUICK, start=start, strategy=private)
    expected = simulate([code], QUICK, start=start)
    assert np.allclose(losses(result), losses(expected), atol=1e-3)


def test_a_strategy_object_that_clips_keeps_the_model_in_place(code, start):
    still = PrivateClipping(FedAvg(), 1e-9, 1e-6, num_sampled_clients=3)
    result = simulate([code], QUICK, start=start, strategy=still)
    assert np.allclose(losses(result), losses(result)[0], atol=1e-4)


def delta_of(weights, codec=None):
    codec = codec or get_codec("f32", {})
    shapes = {name: array.shape for name, array in weights.items()}
    data = delta_bytes(encode_delta(weights, codec)[0], codec)
    return Delta.parse(data, shapes, codec, "delta")


def test_momentum_on_deltas_is_momentum_on_weights(code, start):
    """FedAvgM by hand, over three rounds: v = m v + delta, w = w + lr v."""
    grid = Federation([code], QUICK, start=start).grid()
    server = FlowerRound(
        FedAvgM(min_train_nodes=1, server_learning_rate=0.7, server_momentum=0.9), {"w": (3,)}
    )
    velocity = np.zeros(3)
    for number in range(3):
        delta = np.array([1.0, -2.0, 0.25 * number], np.float32)
        server.configure(grid)
        update = Update("1", 1, delta_of({"w": delta}))
        replies = {node: Reply(update, 0.0) for node in (1, 2, 3)}
        ((name, step),) = server.aggregate(replies)
        velocity = 0.9 * velocity + delta
        assert name == "w"
        assert np.allclose(step, 0.7 * velocity, rtol=1e-12)


def test_a_strategy_that_needs_the_client_to_help_is_refused(code, start):
    with pytest.raises(ConfigError, match="asks clients for 'proximal-mu'"):
        simulate([code], QUICK, start=start, strategy=FedProx(proximal_mu=0.1))


def test_a_strategy_may_settle_the_recipe(code, start):
    class Short(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            config["steps"] = 1
            return super().configure_train(server_round, arrays, config, grid)

    turns: list[Turn] = []
    simulate([code], QUICK, start=start, strategy=Short(), on_step=turns.append)
    assert {turn.progress.steps for turn in turns} == {1}


# A user's own ServerApp on the local grid.


def test_flowers_unmodified_fedavg_through_the_grid_equals_ours(code, start):
    options = replace(QUICK, rounds=1, codec="f32")
    federation = Federation([code], options, start=start)
    base, strategy = federation.weights, FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=federation.grid(), initial_arrays=to_arrays(base), num_rounds=1)
    theirs, ours = to_weights(result.arrays), simulate([code], options, start=start).weights
    for name, array in ours.items():
        # They add weighted float32 weights, we float64 deltas: a few units in the last place.
        limit = 4 * np.spacing(np.abs(base[name]).max() + 0.1)
        assert np.allclose(array, theirs[name], rtol=0, atol=limit), name
    assert max(float(np.abs(ours[name] - base[name]).max()) for name in ours) > 1e-2


def test_flowers_unmodified_fedavg_learns_what_ours_learns_over_rounds(code, start):
    options = replace(QUICK, rounds=3, codec="f32")
    federation = Federation([code], options, start=start)
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=federation.grid(), initial_arrays=to_arrays(federation.weights), num_rounds=3
    )
    ours = losses(simulate([code], options, start=start))
    # Not bit for bit: AdamW makes steps of full length of gradients that are rounding alone.
    assert federation.evaluate(to_weights(result.arrays)) == pytest.approx(ours[-1], abs=1e-2)
    assert ours[0] - ours[-1] > 1


def test_an_unmodified_server_app_trains_and_evaluates(code, start):
    federation = Federation([code], QUICK, start=start)
    app, found = ServerApp(), {}

    @app.main()
    def serve(grid: Grid, _context: Context) -> None:
        arrays = to_arrays(federation.weights)
        found["result"] = FedAdam(eta=0.02).start(grid=grid, initial_arrays=arrays, num_rounds=3)

    app(federation.grid(), local_context())
    measured = found["result"].evaluate_metrics_clientapp
    assert sorted(measured) == [1, 2, 3]
    assert measured[3]["loss"] < measured[1]["loss"]
    before = federation.evaluate(federation.weights)
    assert federation.evaluate(to_weights(found["result"].arrays)) < before


def test_the_grid_keeps_a_context_for_each_node(code, start):
    grid = Federation([code], QUICK, start=start).grid()
    seen = []

    def answer(message: Message, context: Context) -> Message:
        count = int(context.state.config_records.get("kept", ConfigRecord({"n": 0}))["n"]) + 1
        context.state["kept"] = ConfigRecord({"n": count})
        seen.append((context.node_id, context.node_config["partition-id"], count))
        return Message(RecordDict(), reply_to=message)

    grid._client = answer
    for _ in range(2):
        messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
        assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    assert seen == [(1, 0, 1), (2, 1, 1), (3, 2, 1), (1, 0, 2), (2, 1, 2), (3, 2, 2)]


def test_messages_are_answered_once_and_only_by_nodes_there_are(code, start):
    grid = Federation([code], QUICK, start=start).grid()
    message = grid.create_message(RecordDict(), "train", 9, "1")
    with pytest.raises(ConfigError, match=r"there is no node 9; nodes: 1, 2, 3\."):
        grid.push_messages([message])
    assert list(grid.pull_messages(["1", "nothing"])) == []


def test_a_strategy_that_waits_for_nodes_that_never_come_is_told(code, start):
    grid = Federation([code], QUICK, start=start).grid()
    for _ in range(PATIENCE):
        assert len(list(grid.get_node_ids())) == 3
    with pytest.raises(ConfigError, match="waits for more than the 3 nodes"):
        grid.get_node_ids()


def test_a_nodes_seed_is_its_own_in_each_turn():
    seeds = {node_seed(s, n, t) for s in range(3) for n in range(5) for t in range(5)}
    assert len(seeds) == 75
    assert all(0 <= seed < 1 << 32 for seed in seeds)
