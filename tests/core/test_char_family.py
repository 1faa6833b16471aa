"""The char family as the federated core uses it: data, batches, pools, evaluation, generation."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_fl import records
from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models import get_family, known_families
from moshi_fl.models.char_corpus import CharCorpus, Pool, read_pool
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.common import load_weights
from moshi_fl.models.family import Sampling
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.train import Recipe, train

MODEL = {"n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 64, "context": 32}
CPU = torch.device("cpu")


def task_of(vocabulary: CharVocabulary | None = None, **settings: object) -> CharTask:
    tokenizer = (vocabulary or CharVocabulary()).to_bytes()
    task = get_family("char").load({**MODEL, **settings}, tokenizer)
    assert isinstance(task, CharTask)
    return task


def module_of(task: CharTask, seed: int = 0) -> torch.nn.Module:
    module = task.build()
    load_weights(module, task.initial_weights(seed))
    return module


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for i in range(30):
        (folder / f"f{i}.py").write_text(f"def naïve{i}(x):\n    return x + {i}  # ß\n" * 10)
    return folder


@pytest.fixture(scope="module")
def corpus(code: Path) -> CharCorpus:
    return task_of().read([code], seed=0)


@pytest.mark.parametrize(
    ("wrong", "help_"),
    [("chat", "did you mean 'char'"), ("llama", "known: char, moc, speech")],
)
def test_an_unknown_family_is_answered_with_the_nearest_or_all(wrong: str, help_: str) -> None:
    with pytest.raises(ConfigError, match=f"no model family '{wrong}'; {help_}"):
        get_family(wrong)
    assert set(known_families()) >= {"char", "moc", "speech"}


@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_presets_load_and_have_the_promised_size(preset: str) -> None:
    family = get_family("char")
    settings = family.presets[preset]
    task = family.load(settings.model, settings.tokenizer)
    parameters = sum(p.numel() for p in task.build().parameters())
    low, high = {"tiny": (0.2e6, 0.6e6), "base": (8.4e6, 8.6e6)}[preset]
    assert low <= parameters <= high
    Recipe(**settings.training)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown key 'n_layers'"):
        task_of(n_layers=2)


def test_initial_weights_come_from_the_seed_alone() -> None:
    task = task_of()
    first, again, other = (task.initial_weights(seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["embedding.weight"], other["embedding.weight"])


def test_the_summary_tells_what_was_taken_and_proposes_characters(corpus: CharCorpus) -> None:
    assert corpus.summary.files == 30
    assert corpus.summary.proposed_characters == "ßï"
    assert corpus.summary.tokens == len(corpus.tokens)


def test_a_batch_depends_on_its_number_not_on_those_before_it(corpus: CharCorpus) -> None:
    task = task_of(fill_in_middle=0.5)
    batches = task.batches(corpus, 4, seed=3)
    first = [next(batches) for _ in range(6)]
    later = task.batches(corpus, 4, seed=3, start=4)
    assert torch.equal(next(later), first[4])
    assert torch.equal(next(later), first[5])
    assert not torch.equal(first[0], next(task.batches(corpus, 4, seed=4)))
    assert first[0].shape == (4, 33)


def test_windows_cross_file_borders_and_reach_both_ends(corpus: CharCorpus) -> None:
    batches = task_of().batches(corpus, 500, seed=0)
    seen = torch.cat([next(batches) for _ in range(20)])
    end = CharVocabulary.end
    assert (seen[:, 0] == end).any()
    assert (seen[:, -1] == end).any()
    assert (seen[:, 5:-5] == end).any()
    assert not ((seen > end) & (seen < CharVocabulary.byte_row)).any()


def test_a_corpus_shorter_than_a_window_still_trains(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("y = 2\n")
    task = task_of(fill_in_middle=0.5)
    corpus = task.read([tmp_path], seed=0)
    assert next(task.batches(corpus, 2, seed=0)).shape == (2, 8)
    assert corpus.num_examples == 1
    train(module_of(task), task, corpus, Recipe(steps=2, batch_size=2))


def test_a_pool_is_deterministic_text_of_the_side_that_was_asked_for(corpus: CharCorpus) -> None:
    task = task_of()
    pool = task.pool(corpus, 10, seed=1, held_out=True)
    assert pool == task.pool(corpus, 10, seed=1, held_out=True)
    assert pool != task.pool(corpus, 10, seed=2, held_out=True)
    for held_out in (True, False):
        texts = read_pool(task.pool(corpus, 10, seed=1, held_out=held_out))
        assert len(texts) == 10
        side = corpus.split.held_out if held_out else corpus.split.training
        assert all(any(text in whole for whole in side) for text in texts)
        assert all(8 <= len(text.encode()) <= 32 for text in texts)


def test_the_loss_of_a_text_depends_on_no_other_text(corpus: CharCorpus) -> None:
    task = task_of()
    module = module_of(task)
    pool = task.pool(corpus, 12, seed=1, held_out=True)
    losses = task.evaluate(module, pool, CPU)
    assert (losses.dtype, losses.shape) == (np.float64, (12,))
    assert np.isfinite(losses).all()
    texts = read_pool(pool)[::-1][:5]
    part = records.dump(Pool(texts=texts))
    assert np.array_equal(task.evaluate(module, part, CPU), losses[::-1][:5])


def test_a_damaged_pool_is_refused(corpus: CharCorpus) -> None:
    task = task_of()
    pool = task.pool(corpus, 2, seed=0, held_out=True)
    for damaged in (pool[:-1], b"", b"{}", pool.replace(b"char-pool", b"char-spoo")):
        with pytest.raises(CorruptRecord, match="evaluation pool"):
            task.evaluate(module_of(task), damaged, CPU)


def test_weights_grow_with_the_vocabulary_and_old_text_keeps_its_logits() -> None:
    old, new = task_of(), task_of(CharVocabulary().grown("ßï"))
    weights = dict(old.initial_weights(0))
    for name in new.vocabulary_tensors:
        rows = np.zeros((2, *weights[name].shape[1:]), np.float32)
        weights[name] = np.concatenate([weights[name], rows])
    grown = new.build()
    load_weights(grown, weights)
    tokens = torch.tensor([old.vocabulary.encode("def f(x):").tolist()])
    before, after = module_of(old)(tokens), grown(tokens)
    assert torch.allclose(before, after[..., : old.vocabulary.size], atol=1e-6)


def test_cached_generation_is_greedy_decoding_without_a_cache(corpus: CharCorpus) -> None:
    task = task_of()
    module = module_of(task)
    train(module, task, corpus, Recipe(steps=30, learning_rate=1e-2))
    prompt = "def naïve1("
    made = "".join(task.generate(module, prompt, Sampling(max_tokens=18, temperature=0)))
    tokens = task.vocabulary.encode(prompt).tolist()
    start = len(tokens)
    for _ in range(18):
        logits = module(torch.tensor([tokens]))[0, -1].detach()
        logits[1:4] = -torch.inf
        tokens.append(int(logits.argmax()))
    assert made == task.vocabulary.decode(tokens[start:])
    assert len(made) == 18


@pytest.mark.parametrize("int8", [False, True])
def test_text_goes_on_when_the_context_is_full(int8: bool) -> None:
    task = task_of()
    module = module_of(task)
    module.fc_out.bias.data[CharVocabulary.end] = -1e4
    pieces = task.generate(module, "x" * 50, Sampling(max_tokens=100, seed=0, int8=int8))
    assert len("".join(pieces)) >= 90


FIRST_STEP = """
import sys
from pathlib import Path
from moshi_fl.models import get_family
from moshi_fl.train import Recipe, train
family = get_family("char")
task = family.load({"n_layer": 1, "d_model": 32}, family.presets["tiny"].tokenizer)
train(task.build(), task, task.read([Path(sys.argv[1])], seed=0), Recipe(steps=1, batch_size=1))
print([name for name in ("torch._dynamo", "flwr", "sympy", "git") if name in sys.modules])
"""


def test_a_training_step_starts_without_the_compiler_or_flower(code: Path) -> None:
    command = [sys.executable, "-c", FIRST_STEP, str(code)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"
