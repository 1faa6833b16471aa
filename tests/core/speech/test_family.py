"""The speech family as the federated core sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta, max_delta_bytes
from moshi_fl.errors import ConfigError, CorruptRecord, DataError
from moshi_fl.models import get_family, get_preset
from moshi_fl.models.common import (
    extract_weights,
    load_weights,
    require_part,
    train_only,
    trained_part,
    weight_tensors,
)
from moshi_fl.models.family import DataSummary, Sampling, Speaks, TakesTokenizer
from moshi_fl.models.speech.audio import read_audio
from moshi_fl.models.speech.corpus import Encoded, SpeechCorpus, make_corpus, pool_file, read_pool
from moshi_fl.models.speech.family import SpeechTask
from moshi_fl.models.speech.family_config import SpeechConfig, codec_table
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.model import ADAPTERS, SpeechModel, make_codec
from moshi_fl.models.speech.start import lay_codebooks
from moshi_fl.models.speech.tiny import TINY_MIMI, tiny_codec
from moshi_fl.train import Recipe, train
from moshi_fl.weights import serialize, weights_digest
from tests.support.espeak import write_dialogues
from tests.support.mimis import small_mimi
from tests.support.speeches import FIXTURES, codes_of

SMALL = {
    "dim": 32,
    "num_layers": 2,
    "depformer_dim": 16,
    "segment_frames": 20,
    "ttt_layers": 1,
    "ttt_mini_batch": 4,
}


def task_of(**changes: Any) -> SpeechTask:
    preset = get_preset("speech", "tiny")
    task = get_family("speech").load({**preset.model, **SMALL, **changes}, preset.tokenizer)
    assert isinstance(task, SpeechTask)
    return task


@pytest.fixture(scope="module")
def task() -> SpeechTask:
    return task_of()


@pytest.fixture(scope="module")
def module(task: SpeechTask) -> SpeechModel:
    torch.manual_seed(0)
    return task.build().eval()


def corpus_of(task: SpeechTask, dialogues: int = 4, length: int = 70) -> SpeechCorpus:
    """Random tokens in the shape of dialogues, with a rhythm that can be learnt."""
    made = []
    for number in range(dialogues):
        codes = codes_of(task.config.lm, 1, length, seed=number)[0].numpy().astype(np.int16)
        codes[:, ::2] = number % 3 + 4
        made.append(Encoded(codes, 1.0))
    summary = DataSummary(files=dialogues, bytes=1, tokens=1)
    return make_corpus(made, task.config.segment_frames, summary, seed=0)


# Settings.


@pytest.mark.parametrize("name", ["tiny", "small", "moshi-7b"])
def test_a_preset_is_what_its_table_says(name: str) -> None:
    preset = get_preset("speech", name)
    task = get_family("speech").load(preset.model, preset.tokenizer)
    assert isinstance(task, SpeechTask)
    again = SpeechConfig.from_table(json.loads(json.dumps(task.config.to_table())))
    assert again == task.config


def test_the_7b_is_kyutais_with_adapters() -> None:
    preset = get_preset("speech", "moshi-7b")
    config = SpeechConfig.from_table(preset.model)
    listed = json.loads((FIXTURES / "keys.json").read_text())["lm_7b"]
    assert config.lm == LMConfig.from_kyutai(listed["cfg"])
    with torch.device("meta"):
        module = SpeechModel(config)
    plain = {n: p for n, p in module.lm.named_parameters() if not n.endswith(ADAPTERS)}
    assert sum(p.numel() for p in plain.values()) == 7_687_729_152
    assert preset.training["trains"] == "lora"


def test_the_small_preset_has_real_proportions() -> None:
    config = SpeechConfig.from_table(get_preset("speech", "small").model)
    with torch.device("meta"):
        module = SpeechModel(config)
    assert sum(p.numel() for p in module.lm.parameters()) == 118_051_840
    assert sum(p.numel() for p in module.mimi.parameters()) == 79_308_609


def test_so_large_a_model_is_not_made_from_random_numbers() -> None:
    preset = get_preset("speech", "moshi-7b")
    task = get_family("speech").load(preset.model, preset.tokenizer)
    with pytest.raises(ConfigError, match=r"8\.0 billion parameters") as caught:
        task.initial_weights(0)
    assert "import-checkpoint" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dimm": 3}, "unknown key 'dimm'; did you mean 'dim'? hub/README.md, under [model]"),
        ({"xyzzy": 3}, "unknown key 'xyzzy'; hub/README.md, under [model], lists all 52."),
        ({"lora_rank": -1}, "lora_rank = -1 must be 0 or more"),
        ({"lora_rank": True}, "lora_rank = True must be 0 or more"),
        ({"lora_embeddings": 1}, "lora_embeddings must be true or false"),
        ({"segment_frames": 0}, "segment_frames = 0 must be a whole number above zero"),
        ({"first_codebook_weight": -1}, "first_codebook_weight = -1 must be a number of 0"),
        ({"n_q": 5, "delays": [0] * 6}, "n_q = 5 must be twice dep_q"),
        ({"card": 65}, "must be the codec's"),
        ({"text_card": 40_000}, "text_card = 40000 must be at most 32767"),
        ({"text_card": 100}, "the tokenizer has"),
        ({"mimi": 3}, "mimi must be a table"),
        ({"mimi": {"seanet": 3}}, "seanet must be a table"),
        ({"mimi": {"quantizer": {"binz": 3}}}, "unknown key 'binz'"),
        ({"ttt_layers": 9}, "ttt_layers = 9 must be at most"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_of(**changes)
    assert said in str(caught.value)


def test_a_tokenizer_that_is_none_is_refused() -> None:
    with pytest.raises(CorruptRecord, match="not a SentencePiece model"):
        get_family("speech").load(get_preset("speech", "tiny").model, b"{}")


def test_another_tokenizer_gets_the_room_it_needs() -> None:
    family, preset = get_family("speech"), get_preset("speech", "tiny")
    assert isinstance(family, TakesTokenizer)
    smaller = replace(preset, model={**preset.model, "text_card": 100})
    assert family.with_tokenizer(smaller, preset.tokenizer).model["text_card"] == 512
    assert family.with_tokenizer(preset, preset.tokenizer).model["text_card"] == 512
    with pytest.raises(CorruptRecord, match="not a SentencePiece model"):
        family.with_tokenizer(preset, b"{}")


# Weights.


def test_codebooks_are_among_the_weights(task: SpeechTask, module: SpeechModel) -> None:
    weights = extract_weights(module)
    books = [name for name in weights if name.endswith("embedding_sum")]
    assert len(books) == task.config.mimi.quantizer.n_q
    assert set(weights) == set(module.state_dict())
    other = task.build()
    load_weights(other, weights)
    assert weights_digest(extract_weights(other)) == weights_digest(weights)


@pytest.mark.parametrize("family", ["char", "moc"])
def test_other_families_weights_are_their_parameters(family: str) -> None:
    preset = get_preset(family, "tiny")
    module = get_family(family).load(preset.model, preset.tokenizer).build()
    assert set(weight_tensors(module)) == {name for name, _ in module.named_parameters()}


def test_equal_seeds_give_equal_weights(task: SpeechTask) -> None:
    first, again, other = (task.initial_weights(seed) for seed in (1, 1, 2))
    assert weights_digest(first) == weights_digest(again) != weights_digest(other)
    usage = [first[name] for name in first if name.endswith("_initialized")]
    assert all(flag == 1 for flag in usage)


def test_the_tiny_preset_has_a_trained_codec(task: SpeechTask) -> None:
    weights = task.initial_weights(0)
    trained = tiny_codec().state_dict()
    assert all(np.array_equal(weights[f"mimi.{name}"], trained[name]) for name in trained)


def test_a_new_codec_tells_sounds_apart(tmp_path: Path) -> None:
    config = task_of(card=64, mimi=codec_table(small_mimi().config)).config
    assert config.mimi != TINY_MIMI
    torch.manual_seed(0)
    codec = make_codec(config)
    (path,) = write_dialogues(tmp_path, client=1, count=1, length=2)
    sound = torch.from_numpy(read_audio(path))[:, None]
    assert len(codec.encode(sound).unique()) == 1
    lay_codebooks(codec)
    codes = codec.encode(sound)
    assert all(len(row.unique()) > 8 for row in codes.unbind(1))


# What trains.


def test_parts_are_those_that_the_model_has(task: SpeechTask) -> None:
    assert task.parts == ("all", "lora", "ttt")
    assert task_of(lora_rank=0, ttt_layers=0).parts == ("all",)
    with pytest.raises(ConfigError, match=r"no part 'lora'.*parts: all") as caught:
        require_part(task_of(lora_rank=0, ttt_layers=0), "lora")
    assert caught.value.hint == "--trains all"


def test_a_delta_shows_which_part_was_trained() -> None:
    """Also where it leaves some tensors of the part out, because nothing of them changed."""
    table = {**get_preset("speech", "tiny").model, "ttt_layers": 1}
    tokenizer = get_preset("speech", "tiny").tokenizer
    find = trained_part(get_family("speech").load(table, tokenizer))
    adapters = [f"lm.linears.{number}{kind}" for number in range(4) for kind in ADAPTERS]
    layer = "lm.transformer.layers.1.self_attn.ttt.W1"
    assert str(find(adapters)) == "lora: 8 of 135 tensors"
    assert (find([layer]).name, find([layer, *adapters]).name) == ("ttt", "all")
    whole = trained_part(get_family("char").load({}, get_preset("char", "tiny").tokenizer))
    assert whole(["fc_out.bias"]).name == "all"


def test_other_families_train_whole() -> None:
    preset = get_preset("char", "tiny")
    task = get_family("char").load(preset.model, preset.tokenizer)
    require_part(task, "all")
    with pytest.raises(ConfigError, match="trained whole"):
        train_only(task, task.build(), "lora")


@pytest.mark.parametrize(
    ("part", "embeddings", "wanted"),
    [
        ("all", False, lambda name: name.startswith("lm.")),
        ("lora", False, lambda name: name.endswith(ADAPTERS)),
        ("lora", True, lambda name: name.endswith(ADAPTERS) or "emb" in name),
        ("ttt", False, lambda name: name.startswith("lm.") and ".ttt." in name),
    ],
)
def test_one_part_learns_and_nothing_else(part: str, embeddings: bool, wanted: Any) -> None:
    task = task_of(lora_embeddings=embeddings)
    module = task.build()
    before = extract_weights(module)
    recipe = Recipe(steps=2, batch_size=2, learning_rate=1e-2, trains=part)
    train(module, task, corpus_of(task), recipe)
    changed = {n for n, a in extract_weights(module).items() if not np.array_equal(a, before[n])}
    learnt = {name for name in before if wanted(name) and not name.startswith("mimi.")}
    assert changed == learnt


@pytest.mark.parametrize("part", ["all", "lora", "ttt"])
def test_training_in_bfloat16_leaves_float32_weights_behind(part: str) -> None:
    task = task_of()
    module = task.build()
    before = extract_weights(module)
    recipe = Recipe(steps=12, batch_size=4, learning_rate=1e-2, precision="bf16", trains=part)
    losses = []
    train(module, task, corpus_of(task), recipe, on_step=lambda step: losses.append(step.loss))
    after = extract_weights(module)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02
    kept = [name for name in before if name.startswith("mimi.")]
    assert all(np.array_equal(before[name], after[name]) for name in kept)


# Data.


def test_held_out_windows_are_of_other_dialogues(task: SpeechTask) -> None:
    corpus = corpus_of(task, dialogues=5)
    seen = {window[:, 1::2].tobytes() for window in corpus.training}
    assert len(corpus.held_out) == 4
    assert corpus.num_examples == 16
    assert not any(window[:, 1::2].tobytes() in seen for window in corpus.held_out)


def test_of_a_lone_dialogue_the_end_is_held_out(task: SpeechTask) -> None:
    corpus = corpus_of(task, dialogues=1, length=100)
    assert corpus.num_examples == 5
    assert (corpus.held_out[0] != -1).all(axis=0).sum() == 10
    with pytest.raises(DataError, match="too short"):
        corpus_of(task, dialogues=1, length=20)


def test_dialogues_with_equal_tokens_count_once(task: SpeechTask) -> None:
    codes = codes_of(task.config.lm, 1, 60)[0].numpy().astype(np.int16)
    made = [Encoded(codes, 1.0), Encoded(codes.copy(), 1.0)]
    corpus = make_corpus(made, 20, DataSummary(files=2, bytes=1, tokens=1), seed=0)
    assert (corpus.num_examples, len(corpus.held_out)) == (3, 1)


def test_a_batch_needs_no_batch_before_it(task: SpeechTask) -> None:
    corpus = corpus_of(task)
    batches = task.batches(corpus, 3, seed=7)
    third = [next(batches) for _ in range(3)][2]
    assert torch.equal(third, next(task.batches(corpus, 3, seed=7, start=2)))
    assert third.shape == (3, task.config.lm.n_q + 1, 20)
    assert next(task.batches(corpus, 99, seed=7)).shape[0] == 99


def test_dialogues_of_more_weight_are_drawn_more_often(task: SpeechTask) -> None:
    made = [
        Encoded(np.full((task.config.lm.n_q + 1, 20), number, np.int16), weight)
        for number, weight in enumerate((1.0, 1.0, 8.0), start=4)
    ]
    corpus = make_corpus(made, 20, DataSummary(files=3, bytes=1, tokens=1), seed=0)
    if corpus.held_out[0, 0, 0] == 6:
        corpus = make_corpus(made, 20, DataSummary(files=3, bytes=1, tokens=1), seed=1)
    drawn = [int(next(task.batches(corpus, 1, seed=s))[0, 0, 0]) for s in range(100)]
    assert 80 < drawn.count(6) < 100


def test_spoken_dialogues_are_read_with_the_hubs_codec(
    task: SpeechTask, tmp_path: Path, moshi_home: Path
) -> None:
    write_dialogues(tmp_path / "data", client=0, count=2, length=2)
    with pytest.raises(ConfigError, match="codec"):
        task.read([tmp_path / "data"], seed=0)
    reader = task.reading_with(task.initial_weights(0))
    corpus = reader.read([tmp_path / "data"], seed=0)
    assert corpus.summary.files == 2
    assert len(list((moshi_home / "speech-codes").iterdir())) == 2
    again = reader.read([tmp_path / "data"], seed=0)
    assert again.fingerprint == corpus.fingerprint
    text = corpus.training[:, 0]
    said = task.text.decode(text.ravel().tolist())
    assert len(said.split()) >= 3
    assert [file.name for file in task.files(tmp_path / "data")] == [
        "dialogue-0.wav",
        "dialogue-1.wav",
    ]


# Pools.


def test_reading_tells_how_far_it_is_and_nothing_when_all_is_known(tmp_path: Path) -> None:
    write_dialogues(tmp_path / "data", client=1, count=2, length=2)
    told: list[tuple[float, float]] = []
    preset = get_preset("speech", "tiny")
    task = get_family("speech").load(preset.model, preset.tokenizer)
    assert isinstance(task, SpeechTask)
    reading = task.reading_with(task.initial_weights(0)).telling(lambda *far: told.append(far))
    reading.read([tmp_path / "data"], seed=0)
    (total,) = {total for _, total in told}
    done = [seconds for seconds, _ in told]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] == total
    told.clear()
    reading.read([tmp_path / "data"], seed=0)
    assert told == []


def test_a_pool_is_the_same_again_and_measured_window_by_window(
    task: SpeechTask, module: SpeechModel
) -> None:
    corpus, device = corpus_of(task), torch.device("cpu")
    pool = task.pool(corpus, 6, seed=3, held_out=False)
    assert pool == task.pool(corpus, 6, seed=3, held_out=False)
    assert task.pool_size(pool) == 6
    double = task.build().double()
    double.load_state_dict(module.state_dict())
    losses = task.evaluate(double, pool, device)
    assert losses.shape == (6,)
    picked = task.pick(pool, [4, 0])
    assert np.array_equal(task.evaluate(double, picked, device), losses[[4, 0]])
    single = task.evaluate(module, pool, device)
    assert np.allclose(single, losses, atol=1e-4)
    assert not np.array_equal(single, losses)


def test_the_loss_of_a_pool_is_that_of_training(task: SpeechTask, module: SpeechModel) -> None:
    corpus = corpus_of(task)
    window = corpus.training[:1]
    loss, tokens = task.loss(module, torch.from_numpy(window.astype(np.int64)))
    found = task.evaluate(module, pool_file(window), torch.device("cpu"))
    assert float(loss.detach()) == pytest.approx(float(found[0]), rel=1e-5)
    assert tokens == (1 + task.config.lm.dep_q) * 20


def test_figures_tell_text_and_codebooks_apart(task: SpeechTask, module: SpeechModel) -> None:
    pool = task.pool(corpus_of(task), 2, seed=0, held_out=True)
    found = task.figures(module, pool, torch.device("cpu"))
    codebooks = [f"codebook {n + 1}" for n in range(task.config.lm.dep_q)]
    assert list(found) == ["text perplexity", "word perplexity", *codebooks]
    assert 1 < found["text perplexity"] < 1e6
    # With untrained weights a code is about as likely as any other.
    assert found["codebook 1"] == pytest.approx(np.log(task.config.lm.card), rel=0.5)


def bad_pools(task: SpeechTask) -> Iterator[tuple[str, bytes, str]]:
    good = corpus_of(task).training[:2].copy()
    yield "cut off", pool_file(good)[:-2], "bytes of data"
    yield "none", b"", "too short"
    yield "of text", b'{"format": 1}' * 3, "header"
    yield "other name", b"".join(serialize({"code": good})), "no codes"
    yield "other dtype", pool_file(good.astype(np.int32)), "no codes"
    yield "no metadata", b"".join(serialize({"codes": good})), "not as a pool"
    two = {"codes": good, "more": good}
    yield "more tensors", b"".join(serialize(two, {"format": "moshi-fl-speech-pool-1"})), "not as"
    yield "other rows", pool_file(good[:, :-1]), "windows of"
    yield "too long", pool_file(np.concatenate([good, good], axis=2)), "windows of"
    yield "no frames", pool_file(good[:, :, :0]), "windows of"
    wrong = good.copy()
    wrong[1, 2, 5] = task.config.lm.card
    yield "code too high", pool_file(wrong), "of stream 2 in window 1 is out of range"
    wrong = good.copy()
    wrong[0, 0, 0] = -2
    yield "code too low", pool_file(wrong), "token -2 of stream 0"
    wrong = good.copy()
    wrong[1, 1] = -1
    yield "nothing there", pool_file(wrong), "window 1 has nothing to predict"


def test_a_strangers_pool_is_checked(task: SpeechTask, module: SpeechModel) -> None:
    for what, data, said in bad_pools(task):
        with pytest.raises(CorruptRecord) as caught:
            read_pool(data, task.config.lm, task.config.segment_frames)
        assert said in str(caught.value), what
        with pytest.raises(CorruptRecord):
            task.evaluate(module, data, torch.device("cpu"))


# Speaking.


def test_it_says_the_same_again_to_somebody_who_is_silent(task: SpeechTask) -> None:
    weights = task.initial_weights(0)

    def said(**how: Any) -> str:
        module = task.build()
        load_weights(module, weights)
        return "".join(task.generate(module, "", Sampling(max_tokens=40, seed=3, **how)))

    assert said() == said()
    assert said()
    assert said(temperature=0) == said(temperature=0)
    with pytest.raises(ConfigError, match="does not continue a text"):
        task.generate(task.build(), "Hello", Sampling())
    with pytest.raises(ConfigError, match="--min-p has no meaning"):
        task.generate(task.build(), "", Sampling(min_p=0.1))


def test_its_parts_are_ready_for_a_conversation(task: SpeechTask) -> None:
    module = task.build()
    codes = codes_of(task.config.lm)
    for name, parameter in module.named_parameters():
        if name.endswith(ADAPTERS[1]):
            torch.nn.init.normal_(parameter)
    before = module.eval()(codes)
    assert isinstance(task, Speaks)
    parts = task.speech(module)
    assert parts.mimi.num_codebooks == task.config.lm.dep_q
    assert not any("lora" in name for name, _ in parts.lm.named_parameters())
    assert torch.allclose(parts.lm(codes).text_logits, before.text_logits, atol=1e-4)
    assert parts.text.pieces(task.text.encode("good day")) == " good day"


# What a round of the real model costs.


def test_a_lora_round_of_the_7b_is_a_few_megabytes() -> None:
    preset = get_preset("speech", "moshi-7b")
    codec = get_codec(str(preset.delta["codec"]), preset.delta.get("options", {}))
    with torch.device("meta"):
        module = SpeechModel(SpeechConfig.from_table(preset.model))
    module.only("lora")
    trained = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
    assert all(name.endswith(ADAPTERS) for name in trained)
    assert sum(int(np.prod(shape)) for shape in trained.values()) == 193_937_408
    assert max_delta_bytes(trained, codec) < 5_000_000


@pytest.mark.slow
def test_a_real_lora_delta_of_the_7b_shape_is_as_small() -> None:
    preset = get_preset("speech", "moshi-7b")
    codec = get_codec(str(preset.delta["codec"]), preset.delta.get("options", {}))
    config = replace(SpeechConfig.from_table(preset.model), lora_rank=8)
    with torch.device("meta"):
        module = SpeechModel(config)
    shapes = {name: tuple(t.shape) for name, t in weight_tensors(module).items()}
    random = np.random.default_rng(0)
    delta = {
        name: random.standard_normal(shape, np.float32) * 1e-4
        for name, shape in shapes.items()
        if name.endswith(ADAPTERS)
    }
    entries, _ = encode_delta(delta, codec)
    data = delta_bytes(entries, codec)
    assert len(data) < 1_000_000
    assert Delta.parse(data, shapes, codec, "delta").names == tuple(sorted(delta))
