"""``HubRepo``: a local object store and the one hub it talks to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from moshi_fl.errors import HubError, MoshiError, UntrustedHub
from moshi_fl.store.failures import disk_full, hub_failure, local_failure
from moshi_fl.store.leftovers import clean_hub
from moshi_fl.store.names import checked_oid, checked_ref, is_ref, matches
from moshi_fl.store.objects import ObjectStore
from moshi_fl.store.process import Result, Task, run
from moshi_fl.store.settings import (
    REMOTE,
    Pairs,
    hub_settings,
    network_environment,
    whole_files_up_to,
)
from moshi_fl.store.urls import is_local, normalise_url, redact, split_login
from moshi_fl.text import clean

ANY: object = object()
"""As ``expected``: whatever the ref is now."""

_PACK_SLACK = 1 << 16  # bytes of headers, trees and commit beside the files of a pack
_FETCHED = re.compile(
    r"([0-9a-f]{40,64})\t[^\t]*\t(?:(branch|tag|remote-tracking branch) )?'([^']+)'"
)
_FOLDERS = {"branch": "refs/heads/", "tag": "refs/tags/", "remote-tracking branch": "refs/remotes/"}


@dataclass(frozen=True)
class RefUpdate:
    """One ref of a push.

    Attributes:
        ref: Full name on the hub.
        new: Object id it shall point to; None deletes it.
        expected: Object id it must point to now; None when it must not exist yet; or ``ANY``.
    """

    ref: str
    new: str | None
    expected: str | object | None


class PushRejected(HubError):
    """Refs of a push moved meanwhile, so nothing was pushed."""

    def __init__(self, message: str, *, refs: tuple[str, ...], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.refs = refs


class RefMissing(HubError):
    """The hub answers, but does not have a ref."""


class HubRepo(ObjectStore):
    """A bare local object store that talks to one hub: a folder, https, ssh, or loopback http."""

    def __init__(
        self, path: Path, url: str, *, timeout: float = 600.0, token_for: str = ""
    ) -> None:
        """A store in ``path`` for the hub at ``url``; ``timeout`` is in seconds per command.

        ``token_for`` is the hub that ``MOSHI_FL_TOKEN`` is for, when it is not this one: a server
        other than that one's is not shown it.

        Raises:
            ConfigError: The address is not one we use.
        """
        super().__init__(path, timeout=timeout)
        self.url = normalise_url(url)
        self.token_for = normalise_url(token_for) if token_for else self.url
        self._url, self._login = split_login(self.url, self.token_for)

    def beside(self, path: Path) -> HubRepo:
        """A store elsewhere for the same hub; the user's settings are not asked for again."""
        other = HubRepo(path, self.url, timeout=self.timeout, token_for=self.token_for)
        other._user = self._user
        return other

    @property
    def shown_url(self) -> str:
        """The hub's address as it may be printed: without user name and password."""
        return redact(self.url)

    def recover(self) -> None:
        """Remove what killed processes left in the store, and in the hub if it is a folder here."""
        super().recover()
        if is_local(self._url):
            clean_hub(Path(self._url))

    def remote_refs(self, *patterns: str) -> dict[str, str]:
        """The hub's refs and what they point to; empty for an empty hub.

        Args:
            patterns: Exact names, or prefixes that end in ``/`` or ``*``; none means all.
        """
        result = self._network("ls-remote", "--refs", "--", REMOTE)
        if result.status != 0:
            raise self._failure("listing refs", result)
        pairs = (line.split("\t", 1) for line in result.lines if "\t" in line)
        return {
            ref: checked_oid(oid)
            for oid, ref in pairs
            if is_ref(ref) and (not patterns or any(matches(ref, p) for p in patterns))
        }

    def fetch(
        self,
        refs: Mapping[str, str],
        *,
        max_bytes: int | None = None,
        expect: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Fetch exact refs of the hub into local refs, all or none.

        Args:
            refs: Ref on the hub to local ref; local refs are moved by force.
            max_bytes: What the fetched files may add up to; the transfer stops beyond it.
            expect: Ref on the hub to the object id it must have.

        Returns:
            Local ref to object id.

        Raises:
            UntrustedHub: A ref is not what ``expect`` says, or more than ``max_bytes`` came.
            HubError: The hub could not be reached, lacks a ref, or gave a broken answer.
        """
        if not refs:
            return {}
        names = [checked_ref(ref) for ref in refs]
        for local in refs.values():
            checked_ref(local)
        with self.lock(), self._nothing_left_behind():
            found = self._download(names, max_bytes)
            self._compare(found, expect or {})
            if max_bytes is not None:
                self._check_complete(set(found.values()), max_bytes)
            fetched = {local: found[remote] for remote, local in refs.items()}
            self._update_refs(fetched)
        return fetched

    def push(self, updates: Sequence[RefUpdate]) -> None:
        """Push all refs or none; a ref that is already as wanted is fine.

        Raises:
            PushRejected: Refs were not as expected; its ``refs`` names them.
            HubError: The hub refused for another reason, or could not be reached.
        """
        present = self._deletable(updates)
        todo = [update for update in updates if update.new or update.ref in present]
        if not todo:
            return
        argv = ["push", "--porcelain", "--atomic", "--no-verify", "--no-progress", "--no-signed"]
        argv += ["--no-follow-tags", "--recurse-submodules=no"]
        argv += [lease for update in todo for lease in _lease(update)]
        with self.lock():
            result = self._network(*argv, "--", REMOTE, *map(_refspec, todo))
        if result.status != 0:
            self._judge(todo, result)

    def _network(self, *argv: str, ours: Pairs | None = None, limit: int | None = None) -> Result:
        user = [] if is_local(self._url) else self._user_settings()
        pairs = hub_settings(self._url, self._login, self.timeout) + (ours or [])
        env = self._env | network_environment(self._url, user, pairs)
        return run(self.path, Task(argv, env, max_file=limit, timeout=self.timeout))

    def _download(self, refs: Sequence[str], max_bytes: int | None) -> dict[str, str]:
        argv = ["fetch", "--no-tags", "--no-progress", "--no-auto-maintenance", "--refmap="]
        argv += ["--no-recurse-submodules", "--no-show-forced-updates", "--", REMOTE, *refs]
        if max_bytes is None:
            result = self._network(*argv)
        else:
            limit = max_bytes + max_bytes // 64 + _PACK_SLACK
            result = self._network(*argv, ours=whole_files_up_to(max_bytes), limit=limit)
            if result.status != 0 and self._reached(limit):
                raise UntrustedHub(f"fetch: {self.shown_url} sends more than {max_bytes} bytes.")
        if result.status != 0:
            raise self._failure("fetch", result)
        return self._fetched(refs)

    def _fetched(self, refs: Sequence[str]) -> dict[str, str]:
        """What ``FETCH_HEAD`` says: ref on the hub to object id."""
        lines = (self.path / "FETCH_HEAD").read_text(errors="backslashreplace").splitlines()
        heads = [found.groups() for found in map(_FETCHED.match, lines) if found]
        found = {_FOLDERS.get(kind, "") + name: oid for oid, kind, name in heads}
        if missing := [ref for ref in refs if ref not in found]:
            raise RefMissing(f"fetch: {self.shown_url} does not have {', '.join(missing)}.")
        return found

    def _compare(self, found: Mapping[str, str], expect: Mapping[str, str]) -> None:
        for ref, oid in expect.items():
            if found.get(ref) != oid:
                raise UntrustedHub(
                    f"{self.shown_url}: {ref} is {found.get(ref)}, its records promise {oid}.",
                    hint="The hub may be publishing right now: try again; then ask its maintainer.",
                )

    def _check_complete(self, oids: Iterable[str], max_bytes: int) -> None:
        argv = ["rev-list", "--objects", "--missing=print", "--no-object-names", *oids]
        lines = self._git("checking", *argv, "--not", "--all", "--").lines
        if any(line.startswith("?") for line in lines):
            raise UntrustedHub(
                f"fetch: {self.shown_url} has a file of more than {max_bytes} bytes there.",
                hint="Nothing of it was kept.",
            )
        for marker in (self.path / "objects" / "pack").glob("*.promisor"):
            marker.unlink()

    @contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        """Remove the packs that came in the meantime, unless all went well."""
        before = self._packs()
        try:
            yield
            before = self._packs()
        finally:
            for file in self._packs() - before:
                file.unlink(missing_ok=True)

    def _reached(self, limit: int) -> bool:
        # The system ends the writer at its limit; Git only says that the writer has gone.
        return any(file.stat().st_size >= limit for file in self._packs())

    def _packs(self) -> set[Path]:
        return set((self.path / "objects" / "pack").glob("*"))

    def _deletable(self, updates: Sequence[RefUpdate]) -> dict[str, str]:
        doomed = [update.ref for update in updates if update.new is None]
        return self.remote_refs(*doomed) if doomed else {}

    def _failure(self, action: str, result: Result) -> MoshiError:
        if missing := re.search(r"couldn't find remote ref (\S+)", result.words):
            return RefMissing(f"{action}: {self.shown_url} does not have {missing[1]}.")
        if action == "fetch" and disk_full(result.words):
            return local_failure(self.path, action, result)
        return hub_failure(self.shown_url, action, result, timeout=self.timeout)

    def _judge(self, updates: Sequence[RefUpdate], result: Result) -> None:
        """Find out what a push that failed means."""
        refusals = [line.split("\t")[2] for line in result.lines if line.startswith("!\t")]
        # What the hub has decides, since servers word it differently; and the same push, sent by
        # a process that was killed, may have come through in this moment.
        now = self.remote_refs(*(update.ref for update in updates)) if refusals else {}
        if refusals and all(now.get(update.ref) == update.new for update in updates):
            return
        if refusals and (moved := _moved(updates, now)):
            raise PushRejected(
                f"push: {', '.join(moved)} moved on {self.shown_url}; nothing was pushed.",
                refs=moved,
                hint="Fetch, then try again.",
            )
        words = "\n".join([*(clean(refusal) for refusal in refusals), result.words])
        raise self._failure("push", replace(result, words=words))


def _moved(updates: Sequence[RefUpdate], now: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        update.ref
        for update in updates
        if update.expected is not ANY and now.get(update.ref) not in {update.expected, update.new}
    )


def _lease(update: RefUpdate) -> list[str]:
    if update.expected is ANY:
        return []
    expected = "" if update.expected is None else checked_oid(str(update.expected))
    return [f"--force-with-lease={checked_ref(update.ref)}:{expected}"]


def _refspec(update: RefUpdate) -> str:
    force = "+" if update.expected is ANY else ""
    return f"{force}{checked_oid(update.new) if update.new else ''}:{checked_ref(update.ref)}"
