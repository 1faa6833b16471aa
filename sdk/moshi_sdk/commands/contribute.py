"""``moshi-fl contribute``: train on local data and send the delta."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from moshi_fl.cli import Real, hub_option, output_options
from moshi_fl.config import ensure_home
from moshi_fl.console import Console
from moshi_fl.errors import ConfigError
from moshi_fl.policy import Policy
from moshi_fl.progress import Progress
from moshi_fl.signing import fingerprint
from moshi_fl.text import Size
from moshi_sdk.options import (
    attestations_option,
    hub_flag,
    pick_device,
    root_option,
    settings_for,
    use_threads,
)

if TYPE_CHECKING:
    from moshi_fl.models.family import DataSummary

LABELS = {
    "sync": "Model",
    "data": "Data",
    "measure": "Result",
    "encode": "Delta",
    "privacy": "Privacy",
    "public": "Note",
    "again": "Note",
}
DP = {"dp_clip": "max_gradient_norm", "dp_noise": "noise_multiplier", "dp_delta": "delta"}
MOST = 10**7  # steps, minutes, epochs and windows of a step: more is a slip of the finger


@click.command()
@hub_option
@click.option(
    "--data",
    multiple=True,
    type=click.Path(),
    help="File or folder to train on; may be given several times. It never leaves this machine.",
)
@click.option("--steps", type=click.IntRange(1, MOST), help="Train so many steps.")
@click.option("--minutes", type=Real(0, MOST, min_open=True), help="Train so many minutes.")
@click.option("--epochs", type=Real(0, MOST, min_open=True), help="See the data so often.")
@click.option("--lr", "learning_rate", type=Real(0, min_open=True), help="Peak learning rate.")
@click.option("--batch-size", type=click.IntRange(1, MOST), help="Windows per step.")
@click.option("--device", help="auto, cpu, mps, cuda or cuda:N.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "auto"]), help="Arithmetic of training."
)
@click.option(
    "--trains", metavar="PART", help="What of the model: all, or a part such as lora or ttt."
)
@click.option("--seed", type=click.IntRange(0), help="Seed of batches and dropout.")
@click.option("--contributor", help="Your name in the record; public.")
@click.option(
    "--key",
    "signing_key",
    type=click.Path(exists=True, dir_okay=False),
    help="Sign with this SSH key; the .pub of one that ssh-agent holds will do.",
)
@click.option("--max-bytes", type=click.IntRange(1), help="Take at most so much data.")
@click.option("--dp", is_flag=True, help="Train with differential privacy.")
@click.option("--dp-clip", type=Real(0, min_open=True), help="Largest gradient of a window (1).")
@click.option("--dp-noise", type=Real(0.3), help="Noise, in units of --dp-clip (1).")
@click.option(
    "--dp-delta",
    type=Real(0, 1, min_open=True, max_open=True),
    help="Chance with which the promise may fail (1e-5).",
)
@click.option(
    "--dp-budget",
    type=Real(0, min_open=True),
    help="Most epsilon for all contributions to this hub (8).",
)
@click.option("--dry-run", is_flag=True, help="Train and show what would be sent; send nothing.")
@click.option(
    "--replace",
    is_flag=True,
    help="Withdraw what your key has open on the same round, and send this.",
)
@click.option("--resume", is_flag=True, help="Continue the last unfinished contribution.")
@click.option("--discard", is_flag=True, help="Drop the last unfinished contribution.")
@root_option
@attestations_option
@output_options
def contribute(console: Console, resume: bool, discard: bool, dry_run: bool, **flags: Any) -> None:
    r"""Train the hub's model on your data and send the weight delta.

    The source tree is read with respect for .gitignore; binaries, vendored and oversized files and
    whatever looks like a secret stay out. Only the delta and a small public record with its
    signature leave this machine. Interrupted work continues with --resume; doing the same twice
    sends it once. A hub takes one contribution per key and round: another one is refused before it
    trains, unless it is to --replace the first.

    \b
    Examples:
      moshi-fl contribute --hub ./hub.git --data ~/code --dry-run
      moshi-fl contribute --hub https://git.example.org/hub.git --data ~/code --minutes 10
      moshi-fl contribute --resume
      moshi-fl contribute --data ~/code --data ~/notes --replace
      moshi-fl contribute --discard
    """
    if resume and discard:
        raise click.UsageError("--resume and --discard exclude each other.")
    amounts = [name for name in ("steps", "minutes", "epochs") if flags[name] is not None]
    if len(amounts) > 1:
        raise click.UsageError(f"--{amounts[0]} and --{amounts[1]} exclude each other.")
    privacy = _privacy(flags, resume=resume)
    names = ("hub", "data", "device", "precision", "contributor", "signing_key", "min_attestations")
    own = {name: flags[name] for name in names}
    settings = settings_for(**own)
    use_threads(settings.threads)
    again = f"moshi-fl contribute{hub_flag(settings)} --resume"
    console.resume_command = again if resume else ""
    from moshi_sdk import contribute as work

    if discard:
        plan = work.discard(settings.hub, home=ensure_home())
        console.done("Discarded", base=plan.base_round, steps=plan.training.steps)
        return
    with _Listener(console, again) as listener:
        if resume:
            outcome = work.resume(
                settings.hub,
                home=ensure_home(),
                listener=listener,
                dry_run=dry_run,
                key=settings.own_key,
                interactive=sys.stdin.isatty(),
                root=flags["root"],
                policy=Policy(min_attestations=settings.min_attestations),
                replace=flags["replace"],
                **({"privacy_budget": flags["dp_budget"]} if flags["dp_budget"] else {}),
            )
        else:
            options = replace(_options(flags, settings, dry_run), privacy=privacy)
            if not settings.data:
                raise ConfigError("no data is given.", hint="--data PATH (a file or a folder)")
            outcome = work.contribute(
                settings.hub, settings.data, options, home=ensure_home(), listener=listener
            )
    _report(console, outcome, hub_flag(settings))


def _privacy(flags: dict[str, Any], *, resume: bool) -> Any:
    """What the flags of differential privacy ask for; None without ``--dp``."""
    given = [name for name in (*DP, "dp_budget") if flags[name] is not None]
    if not flags["dp"]:
        alone = [name for name in given if not (resume and name == "dp_budget")]
        if alone:
            raise click.UsageError(f"--{alone[0].replace('_', '-')} needs --dp.")
        return None
    from moshi_sdk.privacy import PrivacyOptions

    names = DP | {"dp_budget": "budget"}
    return PrivacyOptions(**{names[name]: flags[name] for name in given})


def _options(flags: dict[str, Any], settings: Any, dry_run: bool) -> Any:
    from moshi_sdk.planning import Options

    precision = settings.precision if settings.origin("precision") != "default" else None
    names = (
        "root",
        "steps",
        "minutes",
        "epochs",
        "learning_rate",
        "batch_size",
        "trains",
        "seed",
        "max_bytes",
        "replace",
    )
    return Options(
        **{name: flags[name] for name in names},
        device=pick_device(settings.device),
        precision=precision,
        contributor=settings.contributor,
        policy=Policy(min_attestations=settings.min_attestations),
        dry_run=dry_run,
        key=settings.own_key,
        interactive=sys.stdin.isatty(),
    )


class _Listener(AbstractContextManager["_Listener"]):
    """Turns stages into notes and steps into one bar."""

    def __init__(self, console: Console, resume_command: str) -> None:
        self._console = console
        self._resume_command = resume_command
        self._bar: Progress | None = None

    def stage(self, name: str, text: str) -> None:
        """Say what a stage found."""
        self._close()
        self._console.note(f"{LABELS.get(name, name):8}{text}")

    def step(self, progress: Any) -> None:
        """Move the bar."""
        if self._bar is None:
            self._resumable(self._resume_command)  # now there is something to resume
            self._bar = self._console.progress("Training", progress.steps, unit="steps")
            self._bar.__enter__()
        self._bar.update(
            progress.step,
            loss=f"{progress.loss:.3f}",
            speed=f"{progress.tokens_per_second:,.0f} tokens/s",
        )

    def reading(self, done: float, total: float) -> None:
        """Move the bar of what is encoded."""
        if self._bar is None:
            note = "files that are encoded stay so; it goes on with the others"
            self._resumable("the same command again", note)
            self.stage("data", "encoding sound that is new here, which may take a while")
            bar = self._console.progress("Encoding", total, unit="s of sound", in_logs=False)
            self._bar = bar
            self._bar.__enter__()
        self._bar.update(done)

    def _resumable(self, command: str, note: str = "continues where it stopped") -> None:
        self._console.resume_command, self._console.resume_note = command, note

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __exit__(self, *error: object) -> None:
        self._close()


def _report(console: Console, outcome: Any, hub: str) -> None:
    record = outcome.contribution
    facts = {
        "contribution": record.id,
        "round": record.round,
        "contributor": record.contributor,
        "key": fingerprint(record.key),
        "trained": outcome.trained,
        "examples": record.num_examples,
        "loss_before": record.metrics.held_out_before,
        "loss_after": record.metrics.held_out_after,
        "delta": Size(record.delta.bytes),
    }
    if outcome.tensors is not None:
        facts["tensors"] = outcome.tensors
    if record.privacy:
        facts["epsilon"] = record.privacy.epsilon
    if console.json_mode and outcome.data:  # as text it was said when it was read
        console.result(data=_data(outcome.data))
    if console.json_mode and outcome.figures:  # and this, when it was measured
        changes = {n: {"before": c.before, "after": c.after} for n, c in outcome.figures.items()}
        console.result(figures={name.replace(" ", "_"): c for name, c in changes.items()})
    if outcome.note:
        console.note(f"Note    {outcome.note}")
    if outcome.sent is None:
        console.done("Ready; nothing was sent", **facts, sent=False)
        console.hint(f"moshi-fl contribute{hub} --resume   (sends it)")
        return
    sent = outcome.sent
    what = "The hub already had it" if sent.again else "Sent"
    facts |= {"record": Size(sent.record_bytes), "branch": sent.branch, "sent": True}
    if outcome.withdrawn:
        facts["withdrawn"] = outcome.withdrawn
    if outcome.url:
        facts["pull_request"] = outcome.url
    console.done(what, **facts)
    if outcome.problem:
        console.warn(f"the branch is pushed, but there is no pull request: {outcome.problem}")
    console.note("That record, signed, and that delta are all that left; Git keeps them.")
    console.hint(f"moshi-fl status{hub}   (shows when a maintainer has merged it into a round)")


def _data(summary: DataSummary) -> dict[str, object]:
    left = [
        {"reason": reason, "files": count, "names": list(summary.left_out.get(reason, ()))}
        for reason, count in summary.skipped.items()
    ]
    read = {"files": summary.files, "bytes": summary.bytes, "tokens": summary.tokens}
    return {**read, "left_out": left}
