"""The embedded default: a whole evaluation on this machine, by processes with keys of their own.

They show the same machinery and catch faults of memory and arithmetic, but they have one owner.
So their agreement is no word of independent people, and the records say ``local``.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from moshi_fl.errors import ConfigError
from moshi_fl.evidence import Seat
from moshi_fl.signing import IDENTITY_FILE, Signer, own_signer
from moshi_fl.weights import write_atomic
from moshi_hub.agenda import awaited
from moshi_hub.board import FolderBoard
from moshi_hub.chair import Chair
from moshi_hub.evaluator import Evaluator
from moshi_hub.judging import Decided
from moshi_hub.measure import Desk

ANCHOR = "anchor"
ANCHOR_KEY = "MOSHI_HUB_ANCHOR_KEY"


def key_folder(home: Path, hub: str, name: str) -> Path:
    """Where the key of one of this machine's evaluators for a hub lies."""
    return home / "evaluators" / hub / name


def local_signer(home: Path, hub: str, name: str) -> Signer:
    """The signer of one of this machine's evaluators; its key is made on first use.

    The anchor's may come from a variable: a CI forgets what it made.

    Raises:
        ConfigError: The variable holds another key than the one that lies here.
        SigningError: The key cannot be used, or ssh-keygen is not there.
    """
    folder = key_folder(home, hub, name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    given = os.environ.get(ANCHOR_KEY, "").strip() if name == ANCHOR else ""
    if given:
        _keep_given(folder / IDENTITY_FILE, given)
    return own_signer(folder)


def _keep_given(path: Path, key: str) -> None:
    """Write a private key to its file, unless it is there."""
    if not path.exists():
        write_atomic(path, key.encode() + b"\n")  # ssh-keygen wants the last line to end
    elif path.read_text(encoding="utf-8", errors="replace").split() != key.split():
        raise ConfigError(
            f"{ANCHOR_KEY} is another key than the one in {path}.",
            hint=f"unset {ANCHOR_KEY}, or move the folder {path.parent} away",
        )


def local_seats(home: Path, hub: str, count: int) -> dict[str, tuple[Signer, Seat]]:
    """So many evaluators beside the anchor, by name."""
    found = {}
    for name in map(str, range(1, count + 1)):
        signer = local_signer(home, hub, name)
        seat = Seat(key=signer.public_key, owner=f"this machine, {name}", counts=True)
        found[name] = signer, seat
    return found


def evaluate_locally(
    chair: Chair,
    signers: Mapping[str, Signer],
    folder: Path,
    *,
    on_step: Callable[[str], None] | None = None,
) -> Decided:
    """Carry a session through, from where its folder has it.

    Args:
        chair: The hub's part.
        signers: All evaluators of this machine by name, the anchor included.
        folder: Where the session lies; a killed evaluation goes on from there.
        on_step: Told what was done.
    """
    board, tell = FolderBoard(folder / "board"), on_step or (lambda _: None)
    with ExitStack() as stack:
        staff = {
            Evaluator(signer, folder, lambda: chair.desk).id: _Worker(stack, name, signer, folder)
            for name, signer in signers.items()
        }
        while (decided := chair.decided(board)) is None:
            session = chair.read(board)
            missing = [who for who in awaited(session) if who in staff]
            running = {who: staff[who].start(board, chair.desk) for who in missing}
            for who, work in running.items():
                for words in work.result():
                    tell(f"{staff[who].name} {words}")
            if not any(work.result() for work in running.values()):
                tell(f"the hub {chair.act(board, session)}")
        return decided


class _Worker:
    """One evaluator's process; started when it is first needed, kept until the end."""

    def __init__(self, stack: ExitStack, name: str, signer: Signer, folder: Path) -> None:
        self.name = f"evaluator {name}" if name != ANCHOR else "the anchor"
        self._stack, self._folder = stack, folder / f"own-{name}"
        self._key = signer.key_path
        self._pool: ProcessPoolExecutor | None = None

    def start(self, board: FolderBoard, desk: Desk) -> Future[list[str]]:
        """Let it do what it can do now."""
        if self._pool is None:
            pool = ProcessPoolExecutor(max_workers=1, mp_context=_context())
            self._pool = self._stack.enter_context(pool)
        return self._pool.submit(_work, board.folder, self._key, self._folder, desk)


def _context() -> multiprocessing.context.BaseContext:
    """Children of a fresh process that has imported torch once, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moshi_hub.local", "torch"])
    return context


def _work(board: Path, key: Path, folder: Path, desk: Desk) -> list[str]:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 3))
    return Evaluator(Signer(key), folder, lambda: desk).advance(FolderBoard(board))


def forget_sessions(folder: Path, number: int) -> None:
    """Remove sessions of rounds up to this one."""
    for path in folder.glob("*-*"):
        start = path.name.split("-")[0]
        if start.isdigit() and int(start) <= number:
            shutil.rmtree(path, ignore_errors=True)
