"""Makes a hub: settings, tokenizer, random weights of round 0, and one atomic first push."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import msgspec

import moshi_fl
from moshi_fl.errors import ConfigError, HubError, MoshiError
from moshi_fl.forge import Repository
from moshi_fl.history import HUB_FILE, MAIN, PREFIXES, TOKENIZER_FILE, Refs, round_path
from moshi_fl.hubfile import VocabularyRules, parse_hubfile
from moshi_fl.models.family import Preset
from moshi_fl.records import Manifest, Round, dump
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.store import Author, HubRepo, PushRejected, RefUpdate, create_hub, is_local
from moshi_fl.weights import count_parameters, sha256_bytes, weights_digest
from moshi_hub.heldout import store_pool
from moshi_hub.keys import ROLES, KeyStore
from moshi_hub.metadata import first_metadata
from moshi_hub.propose import keyframe_files, software, utc_now
from moshi_hub.publish import (
    Sign,
    author,
    commit_files,
    commit_latest,
    latest_files,
    put_all,
    seconds,
)
from moshi_hub.regional import NO_GROWTH, Beginning

TEMPLATE = files("moshi_hub") / "template"
WORKFLOWS = ("submit", "verify", "evaluate", "report", "merge", "pages")
FILLED = ("README.md", "SECURITY.md", ".github/CODEOWNERS", ".github/requirements.txt")
"""Files of the template with placeholders."""
VERBATIM = (
    ".github/dependabot.yml",
    ".github/pull_request_template.md",
    *(f".github/workflows/{name}.yml" for name in WORKFLOWS),
)
"""Those that are taken as they are."""
_WORDS = {
    "tokenizer": "how text becomes tokens",
    "contribute": "    moshi-fl contribute --hub URL --data ~/code    # train it on your code and "
    "send a delta",
    "use": "    moshi-fl generate --hub URL 'The '             # let it continue a text",
    "install": "pip install moshi-fl",
}
"""What ``README.md`` says of a model that writes."""
_SPEECH_WORDS = {
    "tokenizer": "how the words that it says become tokens (a SentencePiece model)",
    "contribute": "    moshi-fl contribute --hub URL --data ~/calls   # train it on your recorded "
    "dialogues and send a delta",
    "use": "    moshi-fl speak --hub URL --in a.wav --out b.wav   # let it answer a voice",
    "install": "pip install 'moshi-fl[speech]'",
}
"""The same of one that speaks."""


@dataclass(frozen=True)
class Plan:
    """What ``moshi-hub init`` is asked for."""

    url: str
    family: str
    preset: str
    name: str
    seed: int = 0
    prefix: str = PREFIXES[0]
    eval_data: tuple[Path, ...] = ()
    maintainer: str = "moshi-hub"
    tokenizer: bytes | None = None
    passphrase: bytes = b""
    source: Path | None = None
    """Folder with a model to begin with, instead of random weights."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``[model]`` to have otherwise than the preset."""
    repository: Repository | None = None
    """Where on a GitHub it lies; workflows for it are written then."""
    beginning: Beginning | None = None
    """Another hub's round to begin with, instead of random weights."""


def create(plan: Plan, home: Path, preset: Preset | None = None) -> Snapshot:
    """Create a hub, or fill an empty repository, and publish round 0.

    Args:
        plan: What is wanted.
        home: Folder of this user's moshi-fl data.
        preset: Settings to use instead of the family's preset that the plan names.

    Raises:
        HubError: The repository already holds something, or cannot be reached.
        ConfigError: Unknown family or preset.
    """
    from moshi_fl.models import get_preset, task_of
    from moshi_fl.models.common import require_part
    from moshi_fl.models.family import Speaks
    from moshi_fl.models.folder import read_folder, require_weights_of

    given, upstream = read_folder(plan.source) if plan.source else None, plan.beginning
    plan = replace(plan, family=given.family) if given else plan
    preset = preset or (upstream.preset if upstream else get_preset(plan.family, plan.preset))
    preset = given.over(preset) if given else preset
    preset = replace(preset, model={**preset.model, **plan.model})
    if plan.tokenizer is not None and given:  # the model is settled
        preset = replace(preset, tokenizer=plan.tokenizer)
    elif plan.tokenizer is not None:
        preset = _with_tokenizer(plan.family, preset, plan.tokenizer)
    hubfile = render_hubfile(plan, preset)
    config = parse_hubfile(hubfile)
    task = task_of(config, preset.tokenizer)
    require_part(task, config.training.trains)
    begun = given or upstream
    if begun:
        require_weights_of(task, begun.weights)
    folder = Path(plan.url.removeprefix("file://")).expanduser() if is_local(plan.url) else None
    replica = Replica(plan.url, home)
    with left_as_found(replica.repo, folder):
        if folder:
            create_hub(folder)
        _refuse_used(replica.repo)
        replica.forget()
        replica.repo.prepare()
        weights = begun.weights if begun else task.initial_weights(plan.seed)
        if plan.eval_data:
            replica.folder.mkdir(parents=True, exist_ok=True)
            store_pool(replica, config, preset.tokenizer, plan.eval_data, weights)
        record = Round(
            hub=config.hub.id,
            round=0,
            previous=None,
            weights=weights_digest(weights),
            parameters=count_parameters(weights),
            tokenizer=sha256_bytes(preset.tokenizer),
            vocabulary_tensors=task.vocabulary_tensors,
            strategy=upstream.origin.strategy if upstream else None,
            created=utc_now(),
            software=software(),
        )
        keys = KeyStore(home, config.hub.id, passphrase=lambda _: plan.passphrase)
        signers = {role: keys.create(role, plan.passphrase) for role in ROLES}

        def sign(files: Mapping[str, bytes], _: int) -> Mapping[str, bytes]:
            return first_metadata(files, signers, keys, config.trust)

        with replica.workspace() as workspace:
            paths = keyframe_files(weights, workspace / "keyframe")
            pages = pages_of(plan, replica.repo.shown_url, speaks=isinstance(task, Speaks))
            _push_first(replica.repo, plan, hubfile, record, preset.tokenizer, paths, pages, sign)
    return replica.pull()


def _with_tokenizer(name: str, preset: Preset, tokenizer: bytes) -> Preset:
    from moshi_fl.models import get_family
    from moshi_fl.models.family import TakesTokenizer

    family = get_family(name)
    if not isinstance(family, TakesTokenizer):
        raise ConfigError(
            f"family {name!r} has a tokenizer of its own.",
            hint="Leave out --tokenizer, or choose --family moc or speech.",
        )
    return family.with_tokenizer(preset, tokenizer)


@contextmanager
def left_as_found(repo: HubRepo, folder: Path | None) -> Iterator[None]:
    """Take away what the block made in a hub's folder if it fails and nothing was published."""
    around = (folder, *folder.parents) if folder else ()
    made = [path for path in around if not (path.exists() or path.is_symlink())]
    was_empty = folder is not None and folder.is_dir() and not any(folder.iterdir())
    try:
        yield
    except BaseException:
        if folder and (made or was_empty) and not _published(repo):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has put something beside it meanwhile
                for path in made:
                    path.rmdir()
        raise


def _published(repo: HubRepo) -> bool:
    """Whether somebody, be it another process, has put something there; where unsure, yes."""
    try:
        return bool(repo.remote_refs())
    except MoshiError:
        return True


def _refuse_used(repo: HubRepo) -> None:
    repo.prepare()
    if present := repo.remote_refs():
        raise HubError(
            f"{repo.shown_url} already holds {len(present)} ref(s), such as {min(present)}.",
            hint="a hub starts in an empty repository; give another path or URL",
        )


def _push_first(
    repo: HubRepo,
    plan: Plan,
    hubfile: str,
    record: Round,
    tokenizer: bytes,
    keyframe: Sequence[Path],
    pages: Mapping[str, bytes],
    sign: Sign,
) -> None:
    by, refs, when = author(plan.maintainer), Refs(plan.prefix), seconds(record.created)
    place = commit_files(repo, refs.keyframe(0), keyframe, by, when)
    record = msgspec.structs.replace(record, keyframe=place)
    manifest = Manifest(hub=record.hub, rounds=(record,))
    signed = latest_files(manifest, hubfile.encode(), tokenizer)
    latest = commit_latest(repo, manifest, {**signed, **sign(signed, 0)}, by)
    texts = {
        **pages,
        HUB_FILE: hubfile.encode(),
        TOKENIZER_FILE: tokenizer,
        round_path(0): dump(record),
    }
    what = plan.beginning.words if plan.beginning else None
    what = what or ("given weights" if plan.source else "random weights")
    main = _first_commit(repo, texts, f"Round 0: {what}\n", by, when)
    try:
        repo.push(
            [
                RefUpdate(MAIN, main, None),
                RefUpdate(refs.latest, latest, None),
                RefUpdate(place.ref, place.commit, None),
            ]
        )
    except PushRejected as error:
        raise HubError(f"{repo.shown_url} was filled by someone else meanwhile.") from error


def _first_commit(
    repo: HubRepo, texts: Mapping[str, bytes], message: str, by: Author, when: int
) -> str:
    tree = repo.tree(put_all(repo, texts))
    return repo.commit(tree, message=message, author=by, when=when)


def pages_of(plan: Plan, url: str, *, speaks: bool = False) -> dict[str, bytes]:
    """Files for people on main, and on a GitHub those for its jobs.

    Args:
        plan: What is wanted.
        url: The hub's address as people may see it.
        speaks: Whether its model listens and speaks, instead of writing.
    """
    where = plan.repository
    values = {"name": plan.name, "family": plan.family, "url": url, "badge": ""}
    values |= _SPEECH_WORDS if speaks else _WORDS
    if where is None:
        return {"README.md": render("README.md", **values).encode()}
    runs = f"{where.web}/{where.slug}/actions/workflows/merge.yml"
    values["badge"] = f"[![Rounds]({runs}/badge.svg)]({runs})\n\n"
    values |= {"owner": where.owner, "version": moshi_fl.__version__}
    filled = {name: render(name, **values).encode() for name in FILLED}
    # Workflows have a dollar sign of their own, so nothing is filled in there.
    return filled | {name: (TEMPLATE / name).read_bytes() for name in VERBATIM}


def render(template: str, /, **values: str) -> str:
    """A file of the hub template with its placeholders filled."""
    text = (TEMPLATE / template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def render_hubfile(plan: Plan, preset: Preset) -> str:
    """``hub.toml`` of a new hub, with comments, parsed once to prove that it is valid."""
    return render(
        HUB_FILE,
        id=secrets.token_hex(8),
        name=_toml(plan.name),
        refs=_toml(plan.prefix),
        family=_toml(plan.family),
        model=_lines(preset.model),
        training=_lines(preset.training),
        delta=_lines(preset.delta),
        evaluation=_lines(preset.evaluation),
        server_learning_rate=str(preset.server_learning_rate),
        max_size=str(NO_GROWTH if plan.beginning else VocabularyRules().max_size),
    )


def _lines(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{key} = {_toml(value)}" for key, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
