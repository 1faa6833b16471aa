"""``moshi-hub init``: create a hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from moshi_fl.cli import output_options, set_option
from moshi_fl.config import ensure_home, load_settings
from moshi_fl.console import Console
from moshi_fl.errors import ConfigError
from moshi_fl.forge import Repository, parse_address
from moshi_fl.history import PREFIXES
from moshi_fl.replica import Replica
from moshi_fl.store import redact
from moshi_fl.text import Size
from moshi_hub.options import maintainer


@click.command()
@click.argument("hub", metavar="PATH|URL")
@click.option("--family", default="char", show_default=True, help="Model family.")
@click.option("--preset", default="tiny", show_default=True, help="Ready-made settings of it.")
@set_option
@click.option(
    "--weights",
    "source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Begin with the model in this folder, which says its family, instead of random weights.",
)
@click.option("--upstream", metavar="URL", help="Begin with this hub's model and newest round.")
@click.option("--name", help="The hub's name in texts. [default: from PATH or URL]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of round 0.")
@click.option(
    "--eval-data",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Held-out files; they stay on this machine, and merges are measured on them.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json to use instead of the preset's (family moc).",
)
@click.option(
    "--branches-only",
    is_flag=True,
    help=f"Keep weights under {PREFIXES[1]}, for hosts that take only branches and tags.",
)
@click.option(
    "--github/--no-github",
    default=None,
    help="Write workflows for GitHub into it. [default: where the URL is one of GitHub's]",
)
@click.option("--passphrase", is_flag=True, help="Ask for a passphrase for the hub's keys.")
@click.option("--passphrase-env", metavar="NAME", help="Take it from this variable.")
@output_options
def init(  # noqa: PLR0913 - one parameter an option
    console: Console,
    *,
    hub: str,
    family: str,
    preset: str,
    model: dict[str, bool | int | float | str],
    source: Path | None,
    upstream: str | None,
    name: str | None,
    seed: int,
    eval_data: tuple[Path, ...],
    tokenizer: Path | None,
    branches_only: bool,
    github: bool | None,
    passphrase: bool,
    passphrase_env: str | None,
) -> None:
    r"""Create a hub, or fill an empty repository, and publish round 0: random weights, or given.

    \b
    Examples:
      moshi-hub init ./hub.git --eval-data ~/held-out
      moshi-hub init https://git.example.org/team/model.git --preset base
      moshi-hub init ./hub.git --family moc --tokenizer tokenizer.json
      moshi-hub init ./hub.git --family speech --set ttt_layers=1
      moshi-hub init ./hub.git --weights imported
      moshi-hub init ./region.git --upstream https://git.example.org/team/model.git
    """
    from moshi_fl.models import get_preset
    from moshi_fl.subwords import start_of
    from moshi_hub.create import Plan, create
    from moshi_hub.heldout import too_few
    from moshi_hub.keys import KeyStore
    from moshi_hub.regional import begin_from, refuse_choices

    repository = _repository(hub, github)
    refuse_choices(click.get_current_context())
    plan = Plan(
        url=hub,
        family=family,
        preset=preset,
        name=name or hub.rstrip("/").removesuffix(".git").replace("\\", "/").split("/")[-1],
        seed=seed,
        prefix=PREFIXES[1] if branches_only else PREFIXES[0],
        eval_data=eval_data,
        maintainer=maintainer(),
        tokenizer=start_of(tokenizer) if tokenizer else None,
        passphrase=_passphrase(passphrase, passphrase_env),
        source=source,
        model=model,
        repository=repository,
    )
    if upstream:
        plan = begin_from(plan, upstream, ensure_home())
    snapshot = create(plan, ensure_home())
    record, shown = snapshot.record, redact(hub)
    begun = "" if upstream else f"/{source.name if source else preset}"
    console.done(
        f"Created a hub at {shown}",
        hub=snapshot.state.config.hub.id,
        model=f"{snapshot.state.config.family}{begun}",
        parameters=record.parameters,
        keyframe=Size(record.keyframe.bytes if record.keyframe else 0),
        weights=record.weights,
        root=snapshot.root,
        keys=KeyStore(ensure_home(), snapshot.state.config.hub.id).folder,
    )
    console.note("Whoever has these keys speaks for the hub: keep a copy of them in a safe place.")
    if not source and (note := get_preset(family, preset).note):
        console.note(note)
    if eval_data and (few := too_few(Replica(hub, ensure_home()), snapshot.state)):
        console.warn(few)
    if not eval_data:
        console.note("No held-out data: merges will not be measured. (--eval-data DIR)")
    if repository:
        for line in next_steps(repository, measured=bool(eval_data)):
            console.note(line)
    console.hint(f"moshi-fl contribute --hub {shown} --data PATH   (anyone can, from now on)")


def _repository(hub: str, github: bool | None) -> Repository | None:
    found = None if github is False else parse_address(hub, load_settings().github_api)
    if github and found is None:
        raise ConfigError(
            f"{redact(hub)} is on no GitHub that is known here.",
            hint="moshi-fl config set github_api https://HOST/api/v3   (an Enterprise server)",
        )
    return found


def next_steps(repository: Repository, *, measured: bool) -> list[str]:
    """What a maintainer does in the settings of a new repository, in a few lines."""
    owner = repository.slug.partition("/")[0]
    pool = " and MOSHI_HUB_POOL_KEY (moshi-hub pool seal)" if measured else ""
    online, anchor = "moshi-hub keys export", "moshi-hub keys export --role anchor"
    return [
        f"What is left to do in {repository.web}/{repository.slug}/settings:",
        f"- First, if {owner} is an organisation: in .github/CODEOWNERS, its team, @{owner}/TEAM.",
        "- Actions, General: let Actions create pull requests; ask before strangers' first runs.",
        f"- Environment evaluators, main only: secrets MOSHI_HUB_ANCHOR_KEY ({anchor}){pool}.",
        f"- Environment publishing, main only, reviewed: secret MOSHI_HUB_ONLINE_KEY ({online}).",
        "- Branches: protect main; demand a review by its code owners.",
        "- Pages: deploy from GitHub Actions.",
    ]


def _passphrase(ask: bool, variable: str | None) -> bytes:
    if variable:
        if not (value := os.environ.get(variable)):
            raise ConfigError(f"--passphrase-env: {variable} is not set.")
        return value.encode()
    if not ask:
        return b""
    if not sys.stdin.isatty():
        raise ConfigError("--passphrase asks, and nobody is there.", hint="--passphrase-env NAME")
    text = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    return str(text).encode()
