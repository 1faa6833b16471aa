"""Train the codec of small speech models on spoken dialogues, and measure it before and after.

    python -m benchmarks.tiny_codec moshi_fl/models/speech/tiny_codec.safetensors

Seven minutes of one CPU. The loss is ours, as Mimi's is not public: spectral distance at six
scales, the mean difference of samples, and the quantiser's penalty. First the quantiser stays out,
until there are latents worth naming; then in every third step (Défossez et al. 2024 do it in half),
and the others use all and half of the codebooks in turn, so that half will do. Weights are written
as float16, codebooks as centroids.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clock import now, threads
from moshi_fl.models.speech.audio import read_audio
from moshi_fl.models.speech.conv import CausalConv, CausalTransposedConv
from moshi_fl.models.speech.dialogues import Dialogue, open_dialogue
from moshi_fl.models.speech.evaluation import fidelity
from moshi_fl.models.speech.metrics import spectral_distance
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.tiny import TINY_MIMI
from moshi_fl.weights import save_weights
from tests.support.espeak import write_dialogues

TRAINED_ON, HELD_OUT = range(12), range(12, 15)  # clients; each has voices and a pitch of its own
CROP = 10  # frames
BATCH = 4
SCALES = ((64, 512), (128, 1024), (256, 2048))  # that a step looks at, in turn
PEAK_RATE, WARM = 3e-3, 100  # learning rate, steps
SAMPLES, PENALTY = 2.0, 0.25  # weights of the loss
BARE = 0.3  # share of the time in which the quantiser stays out


def spoken(folder: Path, clients: range) -> list[Dialogue]:
    """Three dialogues of each client."""
    return [
        open_dialogue(path)
        for client in clients
        for path in write_dialogues(folder / str(client), client=client, count=3)
    ]


def crops(sound: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (B, 1, size), at many levels."""
    chosen = random.Random(seed)
    while True:
        starts = [chosen.randrange(len(sound) - size) for _ in range(BATCH)]
        rows = [sound[s : s + size] * 10 ** chosen.uniform(-0.6, 0.1) for s in starts]
        yield torch.stack(rows)[:, None].clamp(-1, 1)


def train(mimi: Mimi, sound: Tensor, seconds: float) -> int:
    """Train for so much CPU time; the learning rate follows it down. How many steps."""
    mimi.train()
    optimizer = torch.optim.AdamW(mimi.parameters(), lr=PEAK_RATE, betas=(0.8, 0.99))
    batches = crops(sound, CROP * mimi.frame_size, seed=0)
    start, steps = now(), 0
    while (used := (now() - start) / seconds) < 1:
        rate = PEAK_RATE * min(1, (steps + 1) / WARM) * (1 + math.cos(math.pi * used)) / 2
        optimizer.param_groups[0]["lr"] = rate
        batch = next(batches)
        levels = 0 if used < BARE else (0, 2, 4)[steps % 3]
        sound, penalty = there_and_back(mimi, batch, levels)
        distance = spectral_distance(sound, batch, scales=SCALES[steps // 3 % 3])
        loss = distance + SAMPLES * F.l1_loss(sound, batch) + PENALTY * penalty
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mimi.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 250 == 0:
            print(f"{used:4.0%} {steps:5d} {levels} {float(distance.detach()):.3f}", flush=True)
    return steps


def there_and_back(mimi: Mimi, sound: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Sound through the codec, with so many levels or with none of them; and the penalty."""
    if levels:
        mimi.set_num_codebooks(levels)
        result = mimi(sound)
        return result.sound, result.penalty
    latent = mimi.encode_to_latent(sound, quantize=False)
    parts = (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest)
    seen = torch.stack([part.output_proj(part.input_proj(latent)) for part in parts]).sum(0)
    return mimi.decode_from_latent(seen), torch.zeros(())


@torch.no_grad()
def balance(mimi: Mimi, sound: Tensor) -> None:
    """Scale each layer so that its output varies as it should (Mishkin and Matas 2016).

    PyTorch's own start makes each layer's output smaller than its input: behind thirty of them
    nothing is left of the sound, and a decoder that never hears it learns to do without.
    """
    for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        torch.nn.init.orthogonal_(part.input_proj.weight)
        part.output_proj.weight.copy_(part.input_proj.weight.transpose(0, 1))
    for module in mimi.modules():
        if isinstance(module, (CausalConv, CausalTransposedConv)):
            name = "conv" if isinstance(module, CausalConv) else "convtr"
            conv = module.get_submodule(f"{name}.{name}")
            if conv.bias is not None:
                conv.bias.zero_()
            handle = module.register_forward_hook(
                lambda _, __, made, conv=conv: made.mul_(_scaled(conv, made))
            )
            there_and_back(mimi, sound, 0)
            handle.remove()
    conv.weight.mul_(sound.std())  # the last one makes the sound


def _scaled(conv: torch.nn.Module, made: Tensor) -> Tensor:
    scale = 1 / made.std().clamp_min(1e-8)
    conv.weight.mul_(scale)
    return scale


def half(mimi: Mimi) -> dict[str, np.ndarray]:
    """The weights in float16; what is left of a codebook are its centroids."""
    state = mimi.state_dict()
    for name in [name for name in state if name.endswith("cluster_usage")]:
        sums = name.replace("cluster_usage", "embedding_sum")
        state[sums] = state[sums] / state[name].clamp_min(1e-5)[:, None]
        state[name] = torch.ones_like(state[name])
    return {name: tensor.half().numpy() for name, tensor in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, default=420.0, help="CPU time to train")
    given = parser.parse_args()
    torch.manual_seed(0)
    with threads(1), tempfile.TemporaryDirectory() as folder:
        mimi, held_out = Mimi(TINY_MIMI), spoken(Path(folder), HELD_OUT)
        print("before", fidelity(mimi.eval(), held_out))
        channels = [read_audio(d.path).ravel() for d in spoken(Path(folder), TRAINED_ON)]
        sound = torch.from_numpy(np.concatenate(channels))
        balance(mimi, next(crops(sound, CROP * mimi.frame_size, seed=1)))
        print("steps", train(mimi, sound, given.seconds))
        save_weights(given.path, half(mimi))
        for codebooks in (2, 4):
            mimi.set_num_codebooks(codebooks)
            print("after", codebooks, fidelity(mimi.eval(), held_out))


if __name__ == "__main__":
    main()
