"""Lunaris MoC: a transformer whose experts talk to one another before they answer.

Pre-norm blocks with rotary positions and grouped queries. The feed-forward is a mixture: a router
sends each token to K of E experts, and their K answers, with a learned mediator, attend to each
other for R rounds. Formulas are those of MoC v4.6, names of its tensors as well, so that its
weights load. Where the reference is wrong, this is right: rotations stay rotations, cached decoding
equals uncached, and outside training no expert ever runs full, so that a sequence's logits depend
on its own past alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moshi_fl.errors import ConfigError
from moshi_fl.models.family import ParameterGroup
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.moc_layers import Attention, KeyValue, RMSNorm, Rotary, wide
from moshi_fl.models.moc_mixture import DenseFeedForward, Mixture, Report

IGNORED = -1  # a target that is not counted
ROUTER = ".feed_forward.gate."


class Loss(NamedTuple):
    """Scalars: what is minimised, cross-entropy in nats per token, and the router's terms."""

    total: Tensor
    main: Tensor
    aux: Tensor


class Output(NamedTuple):
    """What a forward pass gives.

    ``logits`` (B, T, V) with targets, (B, 1, V) of the last position without. ``present``: keys
    and values of each layer. ``experts``: of each mixture the chosen experts, (B, T, K), with
    targets.
    """

    logits: Tensor
    loss: Loss | None
    present: list[KeyValue]
    experts: list[Tensor] | None


class Block(nn.Module):
    """Attention and feed-forward, each on its normalised input, each added to it."""

    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.policy = config.grad_ckpt_policy
        self.attn_norm = RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model)
        kind = Mixture if config.n_experts else DenseFeedForward
        self.feed_forward = kind(config)

    def forward(
        self, x: Tensor, rotary: Rotary, past: KeyValue | None, counted: Tensor | None
    ) -> tuple[Tensor, KeyValue, Report | None]:
        """``x``: (B, T, C), the same back."""
        y, present = self.attention(self.attn_norm(x), rotary, past)
        x = x + y
        z = self.ffn_norm(x)
        if self.training and self.policy == "ffn":
            y, report = checkpoint(self.feed_forward, z, counted, use_reentrant=False)
        else:
            y, report = self.feed_forward(z, counted)
        return x + y, present, report


class Moc(nn.Module):
    """Next-token logits and losses for up to ``max_seq_len`` tokens."""

    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.config = config
        embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding,
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model),
            }
        )
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = embedding.weight
        self.rotary = Rotary(config)
        self.last_loss: Loss | None = None  # of the last pass with targets, detached
        self.register_load_state_dict_pre_hook(_without_dead_tensors)  # type: ignore[no-untyped-call]
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """N(0, 0.02); what ends a residual branch is scaled down by the branches' number."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        scale = (2 * self.config.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", ".w2.weight")):
                parameter.mul_(scale)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
    ) -> Output:
        """Read tokens ``idx`` (B, T) after what ``past_key_values`` holds.

        Args:
            idx: Token ids.
            targets: What follows each token, (B, T); -1 is not counted.
            past_key_values: ``present`` of an earlier call, for the tokens before these.

        Raises:
            ValueError: No tokens, or more than ``max_seq_len`` with the past.
        """
        start = past_key_values[0][0].shape[2] if past_key_values else 0
        self._require_room(start, idx.shape[1])
        counted = None if targets is None or self.config.route_ignored else targets != IGNORED
        x = self.transformer["wte"](idx)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        present, reports = [], []
        pasts: Sequence[KeyValue | None] = past_key_values or [None] * self.config.n_layers
        for block, past in zip(self.blocks, pasts, strict=True):
            x, kv, report = self._run(block, x, past, counted)
            present.append(kv)
            reports += [report] if report is not None else []
        if targets is None:
            x = x[:, -1:]
        logits = self.lm_head(self.transformer["ln_f"](x))  # (B, T or 1, V)
        if targets is None:
            return Output(logits, None, present, None)
        experts = [report.chosen.view(*idx.shape, -1) for report in reports]
        return Output(logits, self._loss(logits, targets, reports), present, experts)

    @property
    def blocks(self) -> Iterator[Block]:
        """The layers, first to last."""
        yield from self.transformer["h"]  # type: ignore[misc]

    def _run(self, block: Block, x: Tensor, past: KeyValue | None, counted: Tensor | None) -> Any:
        if self.training and self.config.grad_ckpt_policy == "block":
            return checkpoint(block, x, self.rotary, past, counted, use_reentrant=False)
        return block(x, self.rotary, past, counted)

    def _require_room(self, start: int, length: int) -> None:
        if length < 1:
            raise ValueError("there are no tokens to read; give at least one")
        if start + length > self.config.max_seq_len:
            raise ValueError(
                f"{start + length} tokens do not fit into max_seq_len = {self.config.max_seq_len}"
            )

    def _loss(self, logits: Tensor, targets: Tensor, reports: list[Report]) -> Loss:
        flat = logits.flatten(0, 1).to(wide(logits.dtype))  # (B T, V)
        wanted = targets.flatten()
        count = (wanted != IGNORED).sum().clamp_min(1)
        main = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum") / count
        aux = sum((report.aux for report in reports), main.new_zeros(())) / max(1, len(reports))
        loss = Loss(main + aux, main, aux)
        self.last_loss = Loss(*(part.detach() for part in loss))
        return loss

    @property
    def computed_tensors(self) -> frozenset[str]:
        """Names that the reference's files have and that hold nothing of their own."""
        return frozenset(_dead_tensors(self.config))

    def parameter_group(self, name: str) -> ParameterGroup:
        """Routers at half the rate, undecayed, exact; no decay of gains and biases."""
        if ROUTER in name:
            return ParameterGroup(learning_rate_scale=0.5, decays=False, stays_float32=True)
        return ParameterGroup(decays=self.get_parameter(name).dim() >= 2)

    @contextmanager
    def separated(self) -> Iterator[None]:
        """Without experts no window sees another; checkpointing would call layers twice.

        Raises:
            ConfigError: There are experts.
        """
        if self.config.n_experts:
            raise ConfigError(
                f"a moc model with experts (n_experts = {self.config.n_experts}) mixes the windows "
                "of a batch: they compete for room at an expert and share the balance loss, so "
                "the influence of one cannot be bounded.",
                hint="Without --dp, or to a hub of the family char, or moc with n_experts = 0.",
            )
        policies = {block: block.policy for block in self.blocks}
        config, self.config = self.config, replace(self.config, grad_ckpt_policy="none")
        try:
            for block in policies:
                block.policy = "none"
            yield
        finally:
            self.config = config
            for block, policy in policies.items():
                block.policy = policy

    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        idle = self.config.n_experts - self.config.top_k if self.config.n_experts else 0
        expert = 3 * self.config.ffn_hidden * self.config.d_model
        return sum(p.numel() for p in self.parameters()) - self.config.n_layers * idle * expert

    def flops_per_token(self) -> int:
        """Multiplications and additions of a training step, by the rule of Kaplan et al. (2020).

        Six for each weight that a token meets, as often as it meets it (an expert ``S`` times, the
        conversation ``R`` times for each of its states), and attention over the whole context.
        """
        c = self.config
        width, mixing = c.d_model, c.d_model * c.n_experts
        attention = width * (2 * width + 2 * c.n_kv_heads * c.head_dim)
        feed_forward = 3 * width * c.ffn_hidden * c.n_reasoning_steps
        if c.n_experts:
            feed_forward = feed_forward * c.top_k + mixing + width**2 * (c.collab != "none")
        if c.n_experts and c.collab == "moc":
            states = c.top_k + c.moc_use_mediator
            feed_forward += 6 * width**2 * states * c.moc_collab_steps
        weights = c.n_layers * (attention + feed_forward) + width * c.vocab_size
        return 6 * weights + 6 * c.n_layers * c.max_seq_len * width

    def statistics(self) -> Mapping[str, float]:
        """Of the last pass with targets: load, drops and gates of the mixtures."""
        mixtures = [block.feed_forward for block in self.blocks]
        found = [m.last for m in mixtures if isinstance(m, Mixture) and m.last is not None]
        figures: dict[str, float] = {}
        if self.last_loss:
            figures |= {f"loss_{k}": float(v) for k, v in self.last_loss._asdict().items()}
        if not found:
            return figures
        uses = torch.stack([last.use for last in found]).tolist()
        figures |= {
            "drop_fraction": float(torch.stack([last.dropped for last in found]).mean()),
            "gate_mean": float(torch.stack([last.gate for last in found]).mean()),
        }
        for layer, shares in enumerate(uses):
            for expert, share in enumerate(shares):
                figures[f"expert_use/{layer}/{expert}"] = share
        return figures


def _dead_tensors(config: MocConfig) -> Iterator[str]:
    yield "lm_head.weight"
    if not config.n_experts:
        return
    dead = ["msg_proj.weight", "q_proj.weight", "k_proj.weight"]
    if config.collab != "moc" or not config.moc_collab_steps:
        dead += [
            *("collab_attn.in_proj_weight", "collab_attn.in_proj_bias"),
            *("collab_attn.out_proj.weight", "collab_attn.out_proj.bias"),
            *("collab_norm1.weight", "collab_norm2.weight"),
            *("collab_ffn.0.weight", "collab_ffn.2.weight"),
        ]
    if config.collab != "moc":
        dead += ["fuse_gate.weight", "fuse_gate.bias"]
    if config.collab != "moc" or not config.moc_use_mediator:
        dead.append("mediator")
    if config.collab == "none":
        dead.append("o_proj.weight")
    for layer in range(config.n_layers):
        yield from (f"transformer.h.{layer}.feed_forward.{name}" for name in dead)


def _without_dead_tensors(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: object
) -> None:
    """Drop what the reference saved and never used, and tie the head if it is given once."""
    assert isinstance(module, Moc)
    for name in _dead_tensors(module.config):
        state.pop(prefix + name, None)
    if prefix + "transformer.wte.weight" in state:
        state[prefix + "lm_head.weight"] = state[prefix + "transformer.wte.weight"]
