"""``moshi-fl tokenize``, what the trainer and a hub make of it, and generation by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moshi_fl.cli import run
from moshi_fl.shards import TokenShards
from moshi_fl.subwords import Subwords
from moshi_fl.train.__main__ import main as train_command
from moshi_hub.cli import main as hub_main
from moshi_sdk.cli import main as fl_main
from tests.support.simulator import HubSimulator, write_corpus

SMALL = {
    "d_model": 32,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 8,
    "max_seq_len": 32,
    "n_experts": 4,
    "ffn_hidden_multiplier": 1.0,
}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = write_corpus(tmp_path / "code", files=12)
    (folder / "odd.py").write_text("# ends early? <|endoftext|> no\nx = 'naïve — ok'\n" * 20)
    return folder


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def tokenizer_for(code: Path, size: int = 300) -> Path:
    out = code.parent / "tokenizer.json"
    assert (
        fl_main(["tokenize", "train", str(code), "--vocab-size", str(size), "--out", str(out)]) == 0
    )
    return out


def test_shards_hold_the_texts_with_an_end_after_each(code: Path) -> None:
    tokenizer, out = tokenizer_for(code), code.parent / "data"
    words = ["tokenize", "shards", str(code), "--tokenizer", str(tokenizer), "--out", str(out)]
    assert fl_main([*words, "--shard-tokens", "500"]) == 0
    subwords = Subwords.from_bytes(tokenizer.read_bytes())
    shards = TokenShards.open(out, vocab_size=subwords.size)
    tokens = shards.read(0, len(shards))
    assert (tokens == subwords.end).sum() == 13
    assert subwords.decode(tokens) == "".join(p.read_text() for p in sorted(code.iterdir()))
    assert len(list(out.iterdir())) > 1


def test_held_out_files_go_to_their_own_folder(
    code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, held_out = code.parent / "data", code.parent / "held"
    words = ["tokenize", "shards", str(code), "--out", str(out), "--val-out", str(held_out)]
    assert fl_main([*words, "--json"]) == 0
    facts = document(capsys)
    assert facts["tokens"] == len(TokenShards.open(out))
    assert facts["held_out_tokens"] == len(TokenShards.open(held_out)) > 0


def test_nothing_is_overwritten(code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_for(code)
    before = tokenizer.read_bytes()
    assert fl_main(["tokenize", "train", str(code), "--out", str(tokenizer)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert tokenizer.read_bytes() == before


def test_held_out_shards_within_the_others_are_refused_before_anything_is_written(
    code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = code.parent / "data"
    words = ["tokenize", "shards", str(code), "--out", str(out), "--val-out", str(out / "val")]
    assert fl_main(words) == 1
    assert "must be apart" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_that_is_no_tokenizer_is_named(
    code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = code.parent / "bad.json"
    bad.write_text('{"model": {"type": "WordPiece"}}')
    words = ["tokenize", "shards", str(code), "--tokenizer", str(bad), "--out", str(code / "d")]
    assert fl_main(words) == 1
    assert str(bad) in capsys.readouterr().err
    assert not (code / "d").exists()


def test_the_trainer_learns_from_the_shards_and_what_it_left_generates(
    code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = code.parent / "data", code.parent
    assert fl_main(["tokenize", "shards", str(code), "--out", str(data)]) == 0
    config = folder / "config.yaml"
    settings = {"vocab_size": 260, "use_gradient_checkpointing": False, "rope_theta": "1e4"}
    config.write_text(json.dumps({"model": {**SMALL, **settings}, "data_dir": str(data)}))
    words = [str(config), "--set", "device=cpu", "--set", "compile_model=false"]
    words += ["--set", f"out_dir={folder / 'out'}", "--set", "warmup_steps=1"]
    words += ["--set", "learning_rate=3e-3", "--set", "log_interval=1", "--set", "batch_size=4"]
    assert run(train_command, [*words, "--set", "max_steps=12", "--json"]) == 0
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/main"] for line in lines if "loss/main" in line]
    assert losses[-1] < losses[0] - 0.5
    assert any("expert" in name for name in json.loads(lines[0]))
    words = ["generate", "def area(", "--weights", str(folder / "out" / "final")]
    capsys.readouterr()
    assert fl_main([*words, "--max-tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("def area(")
    assert fl_main([*words, "--tokenizer", str(tokenizer_for(code))]) == 1
    assert "vocab_size" in capsys.readouterr().err
    assert fl_main(["generate", "x", "--weights", str(folder)]) == 1
    assert "best or out_dir/final" in capsys.readouterr().err
    assert fl_main([*words, "--round", "1"]) == 2


def test_a_round_of_moc_with_a_tokenizer_of_its_own(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "home"))
    hub, tokenizer = str(tmp_path / "hub.git"), tokenizer_for(code)
    words = ["init", hub, "--family", "moc", "--tokenizer", str(tokenizer)]
    assert hub_main([*words, "--eval-data", str(code)]) == 0
    words = ["contribute", "--hub", hub, "--data", str(code), "--steps", "6", "--batch-size", "4"]
    assert fl_main([*words, "--device", "cpu", "--contributor", "ann"]) == 0
    capsys.readouterr()
    assert hub_main(["merge", "--hub", hub, "--publish", "--json"]) == 0
    merged = document(capsys)
    assert merged["held_out_after"] < merged["held_out_before"] - 0.05  # type: ignore[operator]
    assert fl_main(["audit", "--hub", hub]) == 0
    capsys.readouterr()
    long = "x = 1\n" * 200  # longer than the context
    for prompt in ("", "def area(", long):
        words = ["generate", prompt, "--hub", hub, "--max-tokens", "5", "--seed", "1", "--json"]
        assert fl_main([*words, "--min-p", "0.05", "--repetition-penalty", "1.2"]) == 0
        assert document(capsys)["text"] is not None
        assert fl_main([*words, "--int8"]) == 0
        capsys.readouterr()
    words = ["generate", "def area(", "--suffix", "return", "--hub", hub]
    assert fl_main(words) == 1
    assert "cannot write between two texts" in capsys.readouterr().err


def test_a_family_with_characters_takes_no_tokenizer(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "home"))
    hub = tmp_path / "hub.git"
    words = ["init", str(hub), "--family", "char", "--tokenizer", str(tokenizer_for(code))]
    assert hub_main(words) == 1
    assert "has a tokenizer of its own" in capsys.readouterr().err
    assert not hub.exists()


def test_writing_between_two_texts_needs_a_hub_that_trains_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "home"))
    HubSimulator(tmp_path / "plain")
    HubSimulator(tmp_path / "able", model={"fill_in_middle": 0.25})
    words = ["generate", "def area(", "--suffix", "return x", "--max-tokens", "3", "--hub"]
    assert fl_main([*words, str(tmp_path / "plain" / "hub.git")]) == 1
    assert "not trained to write between" in capsys.readouterr().err
    assert fl_main([*words, str(tmp_path / "able" / "hub.git")]) == 0
    assert capsys.readouterr().out.endswith("return x\n")
