"""The split quantiser: the reference's training step, and the same by hand."""

from __future__ import annotations

import pytest
import torch

from moshi_fl.models.speech.quantizer import (
    DECAY,
    Codebook,
    QuantizerConfig,
    ResidualQuantizer,
    SplitQuantizer,
    kmeans,
)
from tests.support.mimis import small_mimi, small_tensors


def test_a_training_step_is_the_references() -> None:
    mimi, theirs = small_mimi().train(), small_tensors()
    made = mimi.quantizer(theirs["latent"].transpose(1, 2), 8)
    assert torch.equal(made.codes, theirs["vq_codes"])
    torch.testing.assert_close(made.penalty, theirs["vq_penalty"][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made.latent.transpose(1, 2), theirs["vq_x"], atol=1e-5, rtol=0)
    state = mimi.quantizer.state_dict()
    learnt = {k.removeprefix("vqs."): v for k, v in theirs.items() if k.startswith("vqs.")}
    assert len(learnt) == 16
    for name, value in learnt.items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-6)


def codebook(centroids: list[list[float]], usage: list[float]) -> Codebook:
    book = Codebook(QuantizerConfig(dimension=len(centroids[0]), n_q=2, bins=len(centroids)))
    book.cluster_usage.copy_(torch.tensor(usage))
    book.embedding_sum.copy_(torch.tensor(centroids) * book.cluster_usage[:, None])
    book._initialized.fill_(1)
    return book


def test_a_moving_average_by_hand() -> None:
    book = codebook([[0.0, 0.0], [4.0, 0.0]], [1.0, 2.0])
    x = torch.tensor([[1.0, 0.0], [5.0, 1.0], [3.0, 3.0]])
    codes = book.nearest(x)
    assert codes.tolist() == [0, 1, 1]
    book.learn(x, codes)
    usage = [DECAY * 1 + 0.01 * 1, DECAY * 2 + 0.01 * 2]
    torch.testing.assert_close(book.cluster_usage, torch.tensor(usage))
    sums = [[0.01, 0.0], [DECAY * 8 + 0.01 * 8, 0.01 * 4]]
    torch.testing.assert_close(book.embedding_sum, torch.tensor(sums))
    torch.testing.assert_close(book.decode(torch.tensor([1])), torch.tensor([sums[1]]) / usage[1])


def test_the_first_of_equally_near_centroids_counts() -> None:
    book = codebook([[9.0], [1.0], [-1.0], [1.0]], [1.0] * 4)
    assert book.nearest(torch.tensor([[0.0], [2.0]])).tolist() == [1, 1]


def test_codes_without_usage_keep_a_centroid() -> None:
    book = codebook([[1.0], [2.0]], [1.0, 1.0])
    book.cluster_usage[1] = 0
    assert book.decode(torch.tensor([1])).item() == pytest.approx(2 / 1e-5)


def test_rare_codes_are_replaced_every_fifth_time() -> None:
    book = codebook([[0.0], [100.0]], [1.0, 0.01])
    x = torch.full((8, 1), 0.5)
    for call in range(5):
        assert book.decode(torch.tensor([1])).item() == pytest.approx(100.0, rel=1e-4), call
        book.learn(x, book.nearest(x))
    assert book.decode(torch.tensor([1])).item() == pytest.approx(0.5)
    assert book.cluster_usage[1] > 0.9 * book.cluster_usage[0] / 2


def test_one_level_a_call_is_initialised() -> None:
    torch.manual_seed(0)
    config = QuantizerConfig(dimension=4, n_q=4, bins=8)
    quantizer = ResidualQuantizer(config, 4, 3).train()
    x = torch.randn(2, 40, 4)
    for count in range(1, 4):
        quantizer(x, 3)
        assert [book.initialized for book in quantizer.codebooks] == [
            level < count for level in range(3)
        ]


def test_training_brings_centroids_to_the_vectors() -> None:
    torch.manual_seed(0)
    quantizer = SplitQuantizer(QuantizerConfig(dimension=4, n_q=3, bins=16), 4).train()
    x = torch.randn(4, 50, 4)
    penalties = [quantizer(x, 3).penalty.item() for _ in range(40)]
    assert penalties[-1] < 0.8 * penalties[0]


def test_kmeans_finds_the_heaps() -> None:
    torch.manual_seed(0)
    heaps = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (heaps[:, None] + 0.1 * torch.randn(3, 20, 2)).flatten(0, 1)
    centroids, usage = kmeans(x, 3)
    assert torch.cdist(heaps, centroids).amin(1).max() < 0.2
    assert usage.sum() == 60
    few, _ = kmeans(x[:2], 3)
    assert few.isfinite().all()


def test_gradients_go_straight_through() -> None:
    quantizer = small_mimi().quantizer.train()
    x = small_tensors()["latent"].transpose(1, 2).clone().requires_grad_()
    made = quantizer(x, 8)
    made.latent.sum().backward()
    parts = (quantizer.rvq_first, quantizer.rvq_rest)
    straight = sum(
        part.output_proj.weight[..., 0].sum(0) @ part.input_proj.weight[..., 0] for part in parts
    )
    torch.testing.assert_close(x.grad, straight.expand_as(x), atol=1e-4, rtol=1e-4)


def test_penalty_pulls_the_input_to_its_centroids() -> None:
    quantizer = small_mimi().quantizer.eval()
    x = small_tensors()["latent"].transpose(1, 2).clone().requires_grad_()
    made = quantizer(x, 8)
    made.penalty.backward()
    with torch.no_grad():
        after = quantizer(x - 10 * x.grad, 8).penalty
    assert after < made.penalty
