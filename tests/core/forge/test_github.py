"""GitHub's API, held to GitHub's own description of it: every request and every answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moshi_fl.forge import ForgeError, GitHub, Offer, Status, parse_address
from moshi_fl.forge.api import Api
from moshi_fl.forge.github import MAX_BODY
from tests.support.github import FakeGitHub, serving
from tests.support.openapi import description

OFFER = Offer(
    "contribute/3/" + "a" * 32,
    "main",
    "Contribution aaaa to round 3",
    "From ann.",
    ("contribution",),
)


@pytest.fixture
def hub() -> Iterator[FakeGitHub]:
    fake = FakeGitHub(
        description(),
        tokens={"t-ann": "ann", "t-bob": "bob", "t-carol": "carol"},
        writers={"carol"},
    )
    with serving(fake):
        yield fake
    assert fake.problems == []


def as_user(hub: FakeGitHub, token: str) -> GitHub:
    repository = parse_address(f"{hub.url}/{hub.owner}/{hub.name}.git", hub.url)
    assert repository is not None
    waits: list[float] = []
    return GitHub(repository, Api(repository.api, token, wait=waits.append), wait=waits.append)


def changes(hub: FakeGitHub) -> list[str]:
    return [request for request in hub.requests if not request.startswith("GET")]


def test_a_contributor_without_rights_pushes_to_a_fork_that_is_made_once(hub: FakeGitHub) -> None:
    ann = as_user(hub, "t-ann")
    assert ann.push_url() == f"{hub.url}/ann/model.git"
    assert ann.push_url() == f"{hub.url}/ann/model.git"
    assert as_user(hub, "t-carol").push_url() == f"{hub.url}/hub/model.git"


def test_a_pull_request_is_opened_once_and_then_only_brought_up_to_date(hub: FakeGitHub) -> None:
    ann = as_user(hub, "t-ann")
    first = ann.propose(OFFER)
    hub.requests.clear()
    assert ann.propose(OFFER).number == first.number
    assert all("labels" in change for change in changes(hub))  # ann may not label: it is no error
    newer = Offer(OFFER.branch, "main", OFFER.title, "From ann, again.")
    assert ann.propose(newer).number == first.number
    assert hub.pulls[0]["body"] == "From ann, again."
    assert len(hub.pulls) == 1
    assert hub.pulls[0]["head"]["label"] == f"ann:{OFFER.branch}"


def test_a_maintainer_opens_from_the_hub_itself_and_labels(hub: FakeGitHub) -> None:
    made = as_user(hub, "t-carol").propose(OFFER)
    assert hub.pulls[0]["head"]["label"] == f"hub:{OFFER.branch}"
    assert as_user(hub, "t-carol").proposal(made.number).labels == ("contribution",)


def test_a_closed_pull_request_is_not_opened_again(hub: FakeGitHub) -> None:
    ann, carol = as_user(hub, "t-ann"), as_user(hub, "t-carol")
    number = ann.propose(OFFER).number
    carol.close(number, "Included in round 4 with weight 1.", marker="round")
    hub.requests.clear()
    again = ann.propose(OFFER)
    assert (again.number, again.is_open) == (number, False)
    carol.close(number, "Said twice.", marker="round")
    assert changes(hub) == []


def test_without_a_token_a_person_is_shown_the_page(hub: FakeGitHub) -> None:
    nobody = as_user(hub, "")
    page = f"{hub.url}/hub/model/compare/main...{OFFER.branch}?expand=1"
    assert nobody.propose(OFFER).url == page
    assert hub.requests == []


def test_all_pages_of_open_proposals_are_read_oldest_first(hub: FakeGitHub) -> None:
    ann = as_user(hub, "t-ann")
    for number in range(7):
        branch = f"contribute/3/{number:032x}"
        ann.propose(Offer(branch, "main", "x", "y"))
    ann.propose(Offer("other", "main", "x", "y"))
    found = list(ann.proposals("contribute/"))
    assert [proposal.number for proposal in found] == list(range(1, 8))
    assert found[0].clone_url == f"{hub.url}/ann/model.git"
    assert found[0].author == "ann"


def test_one_comment_stays_one_and_a_forged_marker_is_not_mine(hub: FakeGitHub) -> None:
    ann, carol = as_user(hub, "t-ann"), as_user(hub, "t-carol")
    number = ann.propose(OFFER).number
    ann.say(number, "I say: accepted!", marker="report")
    for body in ("accepted", "accepted", "rejected: zero-delta"):
        carol.say(number, body, marker="report")
    assert [comment["body"] for comment in hub.comments[number]] == [
        "<!-- moshi-fl:report -->\nI say: accepted!",
        "<!-- moshi-fl:report -->\nrejected: zero-delta",
    ]
    carol.say(number, "long " * 30_000, marker="report")
    text = hub.comments[number][1]["body"]
    assert len(text) <= MAX_BODY
    assert text.endswith("*(shortened)*\n")


def test_an_apps_comment_stays_one_though_it_is_not_told_its_name(hub: FakeGitHub) -> None:
    hub.tokens["t-app"] = "our-app[bot]"
    hub.writers.add("our-app[bot]")
    number = as_user(hub, "t-ann").propose(OFFER).number
    as_user(hub, "t-ann").say(number, "I say: accepted!", marker="report")
    for body in ("accepted", "accepted", "rejected: zero-delta"):
        as_user(hub, "t-app").say(number, body, marker="report")
    assert [(entry["user"]["login"], entry["body"]) for entry in hub.comments[number]] == [
        ("ann", "<!-- moshi-fl:report -->\nI say: accepted!"),
        ("our-app[bot]", "<!-- moshi-fl:report -->\nrejected: zero-delta"),
    ]


def test_a_job_pushes_to_its_own_repository_only(
    hub: FakeGitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens["t-job"] = "github-actions[bot]"
    monkeypatch.setenv("GITHUB_REPOSITORY", "Hub/model")
    assert as_user(hub, "t-job").push_url() == f"{hub.url}/hub/model.git"
    monkeypatch.setenv("GITHUB_REPOSITORY", "region/model")
    with pytest.raises(ForgeError, match="no fork of hub/model to push to"):
        as_user(hub, "t-job").push_url()
    assert changes(hub) == []


def test_a_status_is_set_once(hub: FakeGitHub) -> None:
    carol, commit = as_user(hub, "t-carol"), "a" * 40
    for state in ("pending", "success", "success"):
        carol.set_status(commit, Status("moshi-fl/verify", state, "3 of 3 agree"))  # type: ignore[arg-type]
    assert len(hub.status_list[commit]) == 2
    assert carol.statuses(commit)["moshi-fl/verify"].state == "success"


def test_labels_that_are_not_there_are_no_error(hub: FakeGitHub) -> None:
    carol = as_user(hub, "t-carol")
    number = carol.propose(OFFER).number
    carol.label(number, ["accepted"], remove=["pending / new", "contribution"])
    assert carol.proposal(number).labels == ("accepted",)


def test_published_keys_are_read(hub: FakeGitHub) -> None:
    hub.keys["ann"] = [f"ssh-ed25519 AAAA{number}" for number in range(5)]
    assert as_user(hub, "").keys_of("ann") == tuple(hub.keys["ann"])


@pytest.mark.parametrize(
    ("status", "headers", "body", "words"),
    [
        (401, {}, {"message": "Bad credentials"}, "GH_TOKEN"),
        (
            403,
            {"X-Accepted-GitHub-Permissions": "pull_requests=write"},
            {"message": "Resource not accessible by personal access token"},
            "pull_requests=write",
        ),
        (404, {}, {"message": "Not Found"}, "cannot see it"),
        (
            422,
            {},
            {"message": "Validation Failed", "errors": [{"message": "No commits"}]},
            "No com",
        ),
        (429, {"Retry-After": "3600"}, {"message": "slow down"}, "3,600 seconds"),
        (
            403,
            {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "99999999999"},
            {"message": "API rate limit exceeded"},
            "too many requests",
        ),
    ],
)
def test_each_refusal_says_what_to_do(
    hub: FakeGitHub, status: int, headers: dict[str, str], body: dict[str, object], words: str
) -> None:
    hub.refusals.append((status, headers, body))
    with pytest.raises(ForgeError) as caught:
        as_user(hub, "t-ann").api.send("POST", "repos/hub/model/pulls", {})
    assert words in f"{caught.value} {caught.value.hint}"
    assert caught.value.status == status
    assert "t-ann" not in f"{caught.value} {caught.value.hint} {as_user(hub, 't-ann').api!r}"


def test_short_limits_and_hiccups_are_waited_out(hub: FakeGitHub) -> None:
    waits: list[float] = []
    api = Api(hub.url, "t-ann", wait=waits.append)
    hub.refusals += [
        (503, {}, {}),
        (403, {"Retry-After": "7"}, {"message": "You have exceeded a secondary rate limit"}),
    ]
    assert api.get("user")["login"] == "ann"
    assert waits == [1.0, 7.0]


def test_what_changes_something_is_not_repeated_after_a_hiccup(hub: FakeGitHub) -> None:
    hub.refusals.append((502, {}, {"message": "Server Error"}))
    with pytest.raises(ForgeError, match="502"):
        as_user(hub, "t-ann").api.send("POST", "repos/hub/model/pulls", {})
    assert len(hub.requests) == 1


def test_a_forge_that_is_away_leaves_git() -> None:
    waits: list[float] = []
    with pytest.raises(ForgeError) as caught:
        Api("http://127.0.0.1:9", wait=waits.append).get("user")
    assert "cannot be reached" in str(caught.value)
    assert "Git alone" in caught.value.hint
    assert len(waits) == 3
