"""``moshi-hub comment``: say on a pull request what jobs have found of it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import load_settings
from moshi_fl.console import Console
from moshi_fl.errors import HubError
from moshi_hub.options import replica_for

SUMMARY = "GITHUB_STEP_SUMMARY"


@click.command()
@click.option(
    "--results",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the files of `verify --out` and `attest --out`.",
)
@hub_option
@output_options
def comment(console: Console, results: Path, hub: str | None) -> None:
    r"""Say on a pull request what jobs have found: one comment, one status, one label.

    The comment is edited in place. The files are taken for hostile, and they must be about what
    the pull request shows now. Where GITHUB_STEP_SUMMARY names a file, the comment goes there, too.

    \b
    Examples:
      moshi-hub comment --results results
    """
    from moshi_fl.forge import open_forge
    from moshi_hub.announce import tell_results
    from moshi_hub.pinned import check_head
    from moshi_hub.results import read_results

    replica = replica_for(hub)
    found = read_results(results, replica.look().config.hub.id)
    forge = open_forge(replica.repo, load_settings().github_api)
    author = check_head(forge, found.gate).author if found.gate.pull_request else ""
    text, problems, lesser = tell_results(forge, found, author, replica.repo.shown_url)
    _summarise(text)
    if not found.gate.pull_request:
        console.line(text.rstrip())
    for problem in (*problems, *lesser):
        console.warn(problem)
    if problems:
        raise HubError(
            "not all of it could be said.", hint="Run it again: what is said is not said twice."
        )
    what = "Said it" if found.gate.pull_request else "There is no pull request: said here only"
    console.done(what, pull_request=found.gate.pull_request, verdict=found.outcome)


def _summarise(text: str) -> None:
    if path := os.environ.get(SUMMARY):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
