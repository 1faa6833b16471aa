"""Which repository an address means, and whose token is used there."""

import pytest

from moshi_fl.errors import ConfigError
from moshi_fl.forge import find_token, parse_address


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/team/model",
        "https://github.com/team/model.git",
        "https://user:secret@github.com/team/model.git",
        "ssh://git@github.com/team/model.git",
        "git@github.com:team/model.git",
        "https://www.github.com/team/model/",
    ],
)
def test_every_spelling_is_one_repository(url: str) -> None:
    found = parse_address(url)
    assert found is not None
    assert (found.slug, found.api, found.host) == (
        "team/model",
        "https://api.github.com",
        "github.com",
    )
    assert found.clone_url == "https://github.com/team/model.git"


@pytest.mark.parametrize(
    "url", ["/srv/hub.git", "./hub.git", "file:///srv/hub.git", "https://git.example.org/a/b.git"]
)
def test_elsewhere_there_is_no_forge(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GH_HOST", raising=False)
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    assert parse_address(url) is None


def test_an_enterprise_server_is_known_by_setting_or_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "https://git.example.org/team/model.git"
    found = parse_address(url, "https://git.example.org/api/v3/")
    assert found is not None
    assert (found.api, found.slug) == ("https://git.example.org/api/v3", "team/model")
    monkeypatch.setenv("GH_HOST", "git.example.org")
    assert parse_address(url) == found


def test_a_servers_api_says_nothing_about_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GH_HOST", "GITHUB_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    api = "https://git.example.org/api/v3"
    public = "https://github.com/team/model"
    assert parse_address(public, api) == parse_address(public)
    assert parse_address("https://elsewhere.example/team/model", api) is None
    found = parse_address("git@git.example.org:team/model.git", api)
    assert found is not None
    assert found.api == api
    found = parse_address("https://team.ghe.example/a/b", "https://api.team.ghe.example")
    assert found is not None
    assert (found.host, found.api) == ("team.ghe.example", "https://api.team.ghe.example")
    with pytest.raises(ConfigError, match="no base URL"):
        parse_address(public, "git.example.org")


@pytest.mark.parametrize("url", ["https://github.com/team", "https://github.com/a/b/c"])
def test_an_address_that_names_no_repository_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="names no repository"):
        parse_address(url)


def test_tokens_come_from_the_environment_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for name in ("GH_TOKEN", "GITHUB_TOKEN", "GH_ENTERPRISE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert find_token("github.com") == ""
    monkeypatch.setenv("GITHUB_TOKEN", "second")
    monkeypatch.setenv("GH_ENTERPRISE_TOKEN", "elsewhere")
    assert find_token("github.com") == "second"
    assert find_token("git.example.org") == "elsewhere"
    monkeypatch.setenv("GH_TOKEN", "first")
    assert find_token("github.com") == "first"
    monkeypatch.setenv("GH_TOKEN", "two\nlines")
    with pytest.raises(ConfigError, match="GH_TOKEN"):
        find_token("github.com")
