"""``moshi-fl``: what a contributor types."""

from __future__ import annotations

from collections.abc import Sequence

from moshi_fl.cli import group, run

COMMANDS = {
    "contribute": (
        "moshi_sdk.commands.contribute:contribute",
        "Train on your data and send the weight delta to a hub.",
    ),
    "sync": ("moshi_sdk.commands.sync:sync", "Fetch and verify a hub's current model."),
    "status": ("moshi_sdk.commands.status:status", "Show a hub's rounds and your own work."),
    "generate": ("moshi_sdk.commands.generate:generate", "Continue a text with the model."),
    "speak": ("moshi_sdk.commands.speak:speak", "Answer a voice with the model, in sound."),
    "tokenize": (
        "moshi_sdk.commands.tokenize:tokenize",
        "Make a tokenizer, and token shards to train on.",
    ),
    "import-checkpoint": (
        "moshi_sdk.commands.import_checkpoint:import_checkpoint",
        "Turn Kyutai's released files into the beginning of a hub.",
    ),
    "audit": ("moshi_sdk.commands.audit:audit", "Recompute rounds from their contributions."),
    "simulate": (
        "moshi_sdk.commands.simulate:simulate",
        "Run many virtual contributors in one process.",
    ),
    "config": ("moshi_sdk.commands.config:config", "Show or change your settings."),
    "doctor": ("moshi_sdk.commands.doctor:doctor", "Check this machine and the way to the hub."),
}

root = group(
    "moshi-fl",
    COMMANDS,
    "Train one model together, with nothing but a Git repository.\n\n"
    "Your data never leaves this machine; a small weight delta does.\n\n"
    "\b\nTo begin:\n"
    "  moshi-fl contribute --hub URL --data ~/code --dry-run",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run ``moshi-fl``; returns the exit status."""
    return run(root, args)
