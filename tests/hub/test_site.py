"""The static site: whole, harmless whatever contributors call themselves, readable as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moshi_fl.records import dump
from moshi_hub.cli import main
from moshi_hub.figures import RoundFigures, figures_path, read_figures, shown
from tests.support.hubs import git
from tests.support.simulator import HubSimulator

HOSTILE = '<script>alert(1)</script>"\u202e'


class Page(HTMLParser):
    """Counts tags, and collects links and ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in {"href", "src", "xlink:href"}:
                self.links.append(value or "")
            elif name == "id":
                self.ids.append(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    os.environ["MOSHI_FL_HOME"] = str(folder / "home")
    try:
        hub = HubSimulator(folder)
        for number in range(3):
            hub.contribute("ann", seed=2 * number + 1)
            hub.contribute(HOSTILE, seed=2 * number + 2)
            hub.merge()
        words = ["report", "--hub", str(hub.path), "--out", str(folder / "site"), "--json"]
        assert main([*words, "--link", "https://git.example.org/team/model"]) == 0
        assert main([*words, "--link", "javascript:alert(1)"]) == 2
    finally:
        del os.environ["MOSHI_FL_HOME"]
    return folder / "site"


def test_every_round_has_a_page_and_every_link_leads_somewhere(site: Path) -> None:
    assert sorted(path.name for path in (site / "rounds").iterdir()) == [
        "0000.html",
        "0001.html",
        "0002.html",
        "0003.html",
    ]
    for path in site.rglob("*.html"):
        page = Page(path)
        assert len(page.ids) == len(set(page.ids))
        for link in page.links:
            if link.startswith("#"):
                assert link[1:] in page.ids
            elif not link.startswith("https://git.example.org/team/model"):
                assert (path.parent / link).is_file()


def test_names_are_text_and_nothing_is_loaded_or_run(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = Page(path)
        assert not {"script", "iframe", "img", "link", "form", "object"} & set(page.tags)
        text = path.read_text(encoding="utf-8")
        assert "\u202e" not in text
        assert not re.search(r"url\(|@import", text)
    assert "&lt;script&gt;" in (site / "index.html").read_text(encoding="utf-8")


def test_a_screen_reader_finds_its_way(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert '<html lang="en">' in text
    assert text.index('class="skip"') < text.index('id="content"')
    assert text.count('role="img"') == text.count("<desc") == 2
    assert text.count("<caption>") == text.count("<table>")
    assert 'scope="col"' in text
    assert 'scope="row"' in text


def test_each_round_leads_to_its_commit(site: Path) -> None:
    at = "https://git.example.org/team/model"
    repo = site.parent / "hub.git"
    for number in range(4):
        page = Page(site / "rounds" / f"{number:04d}.html")
        folder = f"rounds/{number:04d}"
        added = git(repo, "log", "--format=%H", "--diff-filter=A", "main", "--", folder).split()
        assert len(added) == 1
        assert f"{at}/commit/{added[0]}" in page.links
        assert f"{at}/tree/{added[0]}/{folder}" in page.links
        files = git(repo, "ls-tree", "-r", "--name-only", added[0]).splitlines()
        shown = [ln.removeprefix(f"{at}/blob/{added[0]}/") for ln in page.links if "/blob/" in ln]
        assert set(shown) <= set(files)
        assert len(shown) == (3 if number else 0)  # the report and two contributions
        for link in page.links:
            if "/commit/" in link:
                assert git(repo, "cat-file", "-t", link.rsplit("/", 1)[1]).strip() == "commit"


def test_a_site_needs_no_address_of_the_repository(hub: HubSimulator, tmp_path: Path) -> None:
    hub.rounds(1)
    assert main(["report", "--hub", hub.url, "--out", str(tmp_path / "site"), "--json"]) == 0
    page = Page(tmp_path / "site" / "rounds" / "0001.html")
    assert all(link.startswith(("#", "../", "0")) for link in page.links)


@pytest.mark.parametrize("odd", ["too large", "a folder", "gone again"])
def test_figures_that_are_no_file_of_figures_hold_up_no_page(
    hub: HubSimulator, tmp_path: Path, odd: str
) -> None:
    hub.rounds(1)
    path = figures_path(1)
    name = f"{path}/nested" if odd == "a folder" else path
    hub.commit({name: b" " * (1 << 17)})
    if odd == "gone again":
        hub.commit({}, remove=[path])
    assert main(["report", "--hub", str(hub.path), "--out", str(tmp_path / "site")]) == 0
    assert "Figures" not in (tmp_path / "site" / "rounds" / "0001.html").read_text()


def test_a_regions_site_says_what_it_took(tmp_path: Path) -> None:
    above = HubSimulator(tmp_path / "above")
    below = HubSimulator(tmp_path / "below", upstream=above.url)
    assert main(["report", "--hub", below.url, "--out", str(tmp_path / "site"), "--json"]) == 0
    text = (tmp_path / "site" / "rounds" / "0000.html").read_text(encoding="utf-8")
    assert f"Taken as it is from round 0 of hub <code>{above.sync().state.config.hub.id}" in text


@pytest.mark.parametrize("page", ["index.html", "rounds/0001.html"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_in_light_and_in_dark(
    site: Path, tmp_path: Path, width: int, page: str
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: pages are not looked at")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    shots = []
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        more = [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}"]
        command = [browser, *flags, *more, f"--screenshot={shot}", (site / page).as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        assert shot.stat().st_size > 10_000
        shots.append(shot.read_bytes())
    assert shots[0] != shots[1]


def test_figures_of_a_round_are_taken_for_a_strangers() -> None:
    """They lie on main, where whoever may push can put anything."""
    before = {"text perplexity": 819.6, "codebook 1": 5.551}
    record = RoundFigures(before=before, after={"text perplexity": 12450.2})
    good = dump(record)
    found = read_figures(good)
    assert found is not None
    assert [tuple(map(str, row)) for row in found.changes] == [
        ("codebook 1", "5.55", "None"),
        ("text perplexity", "820", "12,450"),
    ]
    assert "| codebook 1 | 5.55 | - |" in shown(found)
    for bad in (
        b"",
        good.replace(b"codebook 1", b"<script>"),
        good.replace(b"5.551", b"NaN"),
        good.replace(b"figures", b"verdict"),
        dump(RoundFigures(before={f"x{n}": 1.0 for n in range(201)}, after={})),
        good + b" " * (1 << 16),
    ):
        assert read_figures(bad) is None
