"""Simulations: virtual clients in this process, on real texts, with a tiny model."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from moshi_fl.aggregate import Update
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.errors import ConfigError, DataError, TrainingError
from moshi_fl.flower import Reply
from moshi_fl.hubfile import AggregationRules
from moshi_sdk.cli import main
from moshi_sdk.simulate import (
    Federation,
    Start,
    Turn,
    from_hub,
    simulate,
)
from moshi_sdk.virtual import server
from tests.support.simulations import QUICK, losses, tiny_start, write_code

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    return write_code(tmp_path_factory.mktemp("data") / "code")


@pytest.fixture(scope="module")
def start() -> Start:
    return tiny_start()


def same(left, right) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in left)


# The loop.


def test_the_held_out_loss_falls_in_every_round(code, start):
    result = simulate([code], replace(QUICK, rounds=3), start=start)
    assert [entry.round for entry in result.rounds] == [0, 1, 2, 3]
    assert losses(result) == sorted(losses(result), reverse=True)
    assert losses(result)[-1] < losses(result)[0] - 0.5
    assert result.rounds[0].client_loss is None
    assert all(entry.clients == (1, 2, 3) for entry in result.rounds[1:])


def test_equal_seeds_give_equal_simulations_and_others_do_not(code, start):
    first, again = (simulate([code], QUICK, start=start) for _ in range(2))
    other = simulate([code], replace(QUICK, seed=1), start=start)
    assert losses(first) == losses(again)
    assert same(first.weights, again.weights)
    assert losses(first) != losses(other)


def test_other_seeds_in_the_process_change_nothing(code, start):
    expected = losses(simulate([code], QUICK, start=start))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert losses(simulate([code], QUICK, start=start)) == expected


def test_a_fraction_of_the_clients_takes_part_and_they_change(code, start):
    options = replace(QUICK, clients=6, rounds=4, steps=1, fraction=0.5)
    result = simulate([code], options, start=start)
    parts = [entry.clients for entry in result.rounds[1:]]
    assert all(len(part) == 3 for part in parts)
    assert len(set(parts)) > 1
    assert parts == [e.clients for e in simulate([code], options, start=start).rounds[1:]]


def test_the_codec_decides_what_goes_up(code, start):
    bytes_up = {}
    for codec in ("f32", "int8", "topk"):
        result = simulate([code], replace(QUICK, codec=codec), start=start)
        assert losses(result)[-1] < losses(result)[0]
        bytes_up[codec] = result.rounds[-1].bytes_up
    assert bytes_up["f32"] > 2.5 * bytes_up["int8"] > 2.5 * 2 * bytes_up["topk"]


def test_each_client_keeps_its_own_error_feedback(code, start, monkeypatch):
    """What top-k leaves out in one round goes into that client's delta of the next."""
    from moshi_sdk import virtual

    seen = []

    def spy(delta, codec, carry):
        entries, rest = encode_delta(delta, codec, carry)
        seen.append((carry, rest))
        return entries, rest

    monkeypatch.setattr(virtual, "encode_delta", spy)
    options = replace(QUICK, clients=2, codec="topk", codec_options={"keep": 4})
    simulate([code], options, start=start)
    (none, first), (no, second), (carry, _), (other, _) = seen
    assert none is no is None
    assert carry
    assert same(carry, first)
    assert same(other, second)


def test_steps_are_told_with_round_client_and_place(code, start):
    turns: list[Turn] = []
    simulate([code], replace(QUICK, rounds=1, steps=2), start=start, on_step=turns.append)
    where = [(turn.round, turn.client, turn.place, turn.progress.step) for turn in turns]
    assert where == [(1, c, c - 1, s) for c in (1, 2, 3) for s in (1, 2)]
    assert {turn.clients for turn in turns} == {3}


def test_a_client_that_diverges_is_named(code, start):
    with pytest.raises(TrainingError, match=r"client 1: the .* is (nan|inf)"):
        simulate([code], replace(QUICK, steps=30, learning_rate=1e30), start=start)


def test_clients_with_too_little_data_are_told_about(tmp_path, start):
    for number in range(6):
        (tmp_path / f"{number}.py").write_text(f"a{number} = {number}\n" * (100 if number else 3))
    options = replace(QUICK, clients=5, rounds=1, seed=1)
    federation = Federation([tmp_path], options, start=start)
    problems = {client.number: client.problem for client in federation.clients if client.problem}
    assert len(problems) == 1
    assert "left out: Only 21 characters of text" in next(iter(problems.values()))
    rounds = list(federation.run())
    assert not set(problems) & set(rounds[1].clients)
    few = Federation([tmp_path], replace(options, batch_size=99), start=start)
    assert sum("windows; a batch has 99" in client.problem for client in few.clients) == 4


def test_data_that_serves_no_client_is_an_error(tmp_path, start):
    for number in range(4):
        (tmp_path / f"{number}.py").write_text(f"a = {number}\n" * (60 if number == 3 else 2))
    with pytest.raises(DataError, match=r"Only|no client"):
        Federation([tmp_path], replace(QUICK, clients=3), start=start)


# Bad arguments.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 0}, "clients = 0"),
        ({"rounds": 0}, "rounds = 0"),
        ({"fraction": 0.0}, "fraction = 0.0"),
        ({"fraction": 1.5}, "fraction = 1.5"),
        ({"steps": 0}, "steps = 0"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"split": "dirichlet"}, "no split 'dirichlet'; known: iid, directory"),
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"codec": "topk", "codec_options": {"k": 3}}, "unknown option 'k'"),
        ({"strategy": "mean"}, "unknown strategy 'mean'"),
        ({"strategy": "flower:QFedAvg"}, "no strategy 'flower:QFedAvg'"),
        (
            {"strategy": "flower:FedAdam", "strategy_options": {"lr": 1}},
            "options of flower:FedAdam",
        ),
        ({"strategy": "flower:FedAdam", "strategy_options": {"fraction_train": 1}}, "--fraction"),
    ],
)
def test_bad_arguments_are_named(code, start, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Federation([code], replace(QUICK, **change), start=start)


# The chart.


def test_the_chart_is_xml_and_holds_the_data(code, start):
    result = simulate([code], QUICK, start=start)
    root = ET.fromstring(result.svg())
    assert root.tag == SVG + "svg"
    assert root.get("role") == "img"
    named = {element.get("id"): element.text for element in root if element.get("id")}
    assert set(root.get("aria-labelledby").split()) == set(named)
    lines = root.findall(SVG + "polyline")
    assert [len(line.get("points").split()) for line in lines] == [3, 2]
    tips = {tip.text for tip in root.iter(SVG + "title")}
    for entry in result.rounds:
        assert f"held-out part, round {entry.round}: {entry.held_out_loss:.4f}" in tips
        assert f"round {entry.round}: {entry.held_out_loss:.4f}" in named["chart-description"]
    assert f"clients' mean, round 2: {result.rounds[2].client_loss:.4f}" in tips
    assert "prefers-color-scheme: dark" in root.find(SVG + "style").text
    assert "http" not in result.svg().replace(SVG[1:-1], "")


# The command.


def run(capsys, *args: object) -> tuple[int, dict, str]:
    status = main(["simulate", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


SMALL = ("--clients", 3, "--rounds", 1, "--steps", 1, "--batch-size", 2)


def test_the_command_prints_a_table_and_writes_the_chart(code, tmp_path, capsys):
    svg = tmp_path / "loss.svg"
    status, out, err = run(capsys, "--data", code, *SMALL, "--plot", svg, "--split", "directory")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:4] == ["round", "held-out", "loss", "client"]
    assert [row[0] for row in rows[1:3]] == ["0", "1"]
    assert "1 round simulated" in err
    assert "held out" in err
    assert ET.parse(svg).getroot().tag == SVG + "svg"


def test_json_carries_rounds_clients_and_the_result(code, capsys):
    status, out, _ = run(capsys, "--data", code, *SMALL, "--codec", "topk", "--json")
    document = json.loads(out)
    assert status == 0
    assert [row["round"] for row in document["rounds"]] == [0, 1]
    assert document["rounds"][1]["trained"] == [1, 2, 3]
    assert document["rounds"][1]["bytes_up"] > 0
    assert document["loss_after"] == document["rounds"][1]["held_out_loss"]
    assert [client["client"] for client in document["clients"]] == [1, 2, 3]
    assert all(client["bytes"] > 0 and client["examples"] > 0 for client in document["clients"])


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ((), 1, "no data is given"),
        (("--data", "{code}", "--clients", "50"), 1, "20 usable files are too few"),
        (("--data", "{code}", "--clients", "0"), 2, "--clients"),
        (("--data", "{code}", "--fraction", "0"), 2, "--fraction"),
        (("--data", "{code}", "--plot", "{code}/none/x.svg"), 2, "does not exist"),
        (("--data", "{code}", "--plot", "{code}/x.png"), 2, "let the name end in .svg"),
        (("--data", "{code}", "--strategy-option", "trim"), 2, "not NAME=VALUE"),
        (("--data", "{code}", "--hub", "x", "--preset", "base"), 2, "--hub settles the model"),
        (("--data", "{code}", "--preset", "huge"), 1, "no preset 'huge'"),
        (("--data", "{code}", "--strategy", "flower:FedX"), 1, "no strategy 'flower:FedX'"),
    ],
)
def test_bad_commands_are_one_sentence(code, capsys, args, status, message):
    got, _, err = run(capsys, *(arg.format(code=code) for arg in args))
    assert got == status
    assert message in err
    assert "Traceback" not in err


def test_a_simulation_that_ends_early_still_tells_what_it_found(code, capsys):
    status, out, err = run(capsys, "--data", code, "--clients", 3, "--steps", 30, "--lr", 1e30)
    assert status == 1
    assert [line.split()[0] for line in out.splitlines()] == ["round", "0"]
    assert "Error: client 1: the " in err
    assert "Hint: lower the learning rate" in err


def test_it_starts_from_a_hub_and_sends_nothing(code, hub, tmp_path, capsys):
    begun = from_hub(hub.url, home=tmp_path / "home")
    files = {path: path.read_bytes() for path in hub.path.rglob("*") if path.is_file()}
    status, out, _ = run(capsys, "--data", code, *SMALL, "--hub", hub.url, "--json")
    assert status == 0
    federation = Federation([code], replace(QUICK, rounds=1), start=begun)
    assert same(federation.weights, begun.weights)
    assert json.loads(out)["loss_before"] == federation.evaluate(begun.weights)
    assert {path: path.read_bytes() for path in hub.path.rglob("*") if path.is_file()} == files


def test_simulated_robust_rounds_remember_how_long_deltas_were() -> None:
    codec, shapes = get_codec("f32", {}), {"w": (4,)}

    def reply(length: float) -> Reply:
        data = delta_bytes({"w": np.full(4, length / 2, np.float32)}, codec)
        return Reply(Update("a", 1, Delta.parse(data, shapes, codec, "delta")), 0.0)

    robust = server(AggregationRules(strategy="robust"), shapes)
    steps = [dict(robust.aggregate({1: reply(length)}))["w"] for length in (1.0, 8.0, 8.0)]
    lengths = [float(np.sqrt((step**2).sum())) for step in steps]
    # Clipped to twice what it was before; that then rises by a fifth.
    assert lengths == pytest.approx([1.0, 2.0, 2.4])
