"""``moshi-hub``: what a hub's maintainer types."""

from __future__ import annotations

from collections.abc import Sequence

from moshi_fl.cli import group, run

COMMANDS = {
    "init": ("moshi_hub.commands.init:init", "Create a hub and publish round 0."),
    "verify": ("moshi_hub.commands.verify:verify", "Check contributions against the hub's rules."),
    "comment": ("moshi_hub.commands.comment:comment", "Say on a pull request what jobs found."),
    "merge": ("moshi_hub.commands.merge:merge", "Aggregate accepted contributions into a round."),
    "sign": ("moshi_hub.commands.sign:sign", "Recompute a proposed round, and sign it."),
    "evaluate": ("moshi_hub.commands.evaluate:evaluate", "Measure contributions: the hub's step."),
    "attest": ("moshi_hub.commands.attest:attest", "Measure contributions: an evaluator's step."),
    "evaluators": ("moshi_hub.commands.evaluators:evaluators", "Show or change who evaluates."),
    "pool": ("moshi_hub.commands.pool:pool", "Keep the sealed held-out data."),
    "publish": ("moshi_hub.commands.publish:publish", "Make a prepared round the current one."),
    "upward": ("moshi_hub.commands.upward:upward", "Contribute this hub's rounds to another hub."),
    "keys": ("moshi_hub.commands.keys:keys", "Show and change whose signatures count."),
    "report": ("moshi_hub.commands.report:report", "Write a static site about the hub's rounds."),
    "doctor": ("moshi_hub.commands.doctor:doctor", "Check a hub's repository and its settings."),
}

root = group(
    "moshi-hub",
    COMMANDS,
    "Run a hub: a Git repository in which a model is trained together.\n\n"
    "\b\nTo begin:\n"
    "  moshi-hub init ./hub.git --family char --preset tiny",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run ``moshi-hub``; returns the exit status."""
    return run(root, args)
