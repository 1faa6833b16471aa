"""``moshi-hub report``: a static site of a hub's rounds."""

from __future__ import annotations

from pathlib import Path

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_hub.options import replica_for


@click.command()
@hub_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("site"),
    show_default=True,
    help="Folder for the pages.",
)
@click.option("--link", metavar="URL", help="Where a browser finds the repository. [default: none]")
@output_options
def report(console: Console, hub: str | None, out: Path, link: str | None) -> None:
    r"""Write a site about the hub: loss, contributions, credit, and a page for each round.

    The pages need no server and no script; open OUT/index.html, or publish the folder.

    \b
    Examples:
      moshi-hub report --hub ./hub.git
      moshi-hub report --out site --link https://github.com/team/model
    """
    from moshi_hub.site import gather, write_site

    if link and not link.startswith(("https://", "http://")):
        raise click.BadParameter("must begin with https://", param_hint="--link")
    history = gather(replica_for(hub), link or "")
    written = write_site(history, out)
    console.done(
        f"Wrote {len(written)} pages",
        index=str(written[0]),
        rounds=len(history.entries),
        contributors=len(history.people()),
    )
