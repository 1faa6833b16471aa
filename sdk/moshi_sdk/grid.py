"""A Flower grid in one process: as many virtual nodes as there are shares of data.

``LocalGrid`` stands where a SuperLink and its SuperNodes would: an unmodified ``ServerApp`` or
``Strategy.start`` sends messages to it, and the ClientApp of ``moshi_sdk.client`` answers them, one
node after the other.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from moshi_fl.errors import ConfigError
from moshi_fl.flower import identify_process, with_config
from moshi_fl.models.family import Corpus
from moshi_sdk.client import OnStep, app, watched

PATIENCE = 20
"""How often a strategy may ask for nodes without sending; one that waits for more asks for ever."""


class LocalGrid(Grid):
    """Virtual nodes in this process; each message is answered when its reply is asked for.

    Args:
        corpora: Data of each node, by node id.
        settings: What the ``config`` record of a message must say and does not: everything that
            ``moshi_sdk.client.job_config`` gives. ``seed`` is a node's own in each of its turns.
        client: The ClientApp; ``moshi_sdk.client.app`` by default.
        on_step: Called after every training step.

    Example:
        >>> strategy = FedAvg(fraction_evaluate=0.0)
        >>> strategy.start(grid=grid, initial_arrays=to_arrays(weights), num_rounds=3)
    """

    def __init__(
        self,
        corpora: Mapping[int, Corpus],
        settings: Mapping[str, Any],
        *,
        client: ClientApp = app,
        on_step: OnStep | None = None,
    ) -> None:
        identify_process()
        self.online: Sequence[int] = sorted(corpora)
        """Nodes that are there at present."""
        self.on_step = on_step
        self.settings = dict(settings)
        """What messages are completed with."""
        self._corpora, self._client = dict(corpora), client
        self._contexts = {node: self._context(node) for node in self.online}
        self._turns = Counter[int]()
        self._sent: dict[str, Message] = {}
        self._messages = self._asked = 0
        self._run = Run.create_empty(0)

    def _context(self, node: int) -> Context:
        place = {"partition-id": self.online.index(node), "num-partitions": len(self.online)}
        return Context(
            run_id=0, node_id=node, node_config=dict(place), state=RecordDict(), run_config={}
        )

    def set_run(self, run: Run) -> None:
        """Say which run this is; nothing depends on it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message; the same as Flower's ``Message(…)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are online, ascending.

        Raises:
            ConfigError: Somebody waits for nodes that will never come.
        """
        self._asked += 1
        if self._asked > PATIENCE:
            raise ConfigError(
                f"the strategy waits for more than the {len(self.online)} nodes there are.",
                hint="lower its min_available_nodes, min_train_nodes or min_evaluate_nodes",
            )
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; their ids are what ``pull_messages`` wants.

        Raises:
            ConfigError: A message is for a node that is not online.
        """
        self._asked = 0
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.online:
                raise ConfigError(f"there is no node {node}; nodes: {_listed(self.online)}.")
            self._messages += 1
            ids.append(str(self._messages))
            # Flower's own grids set the id the same way: the constructor leaves it empty.
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the nodes answer these messages, one after the other; each is answered once."""
        wanted = [self._sent.pop(key) for key in message_ids if key in self._sent]
        return [self._answer(message) for message in wanted]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return all replies, in the same order; there is no time limit."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        training = message.metadata.message_type == "train"
        self._turns[node] += training
        settings = dict(self.settings)
        if training:
            settings["seed"] = node_seed(int(settings["seed"]), node, self._turns[node])
        with watched(self.on_step, self._corpora[node]):
            return self._client(with_config(message, settings), self._contexts[node])


def node_seed(seed: int, node: int, turn: int) -> int:
    """A node's own seed in its n-th turn: 32 bits that depend on these three alone."""
    return int(hashlib.sha256(f"{seed}/{node}/{turn}".encode()).hexdigest()[:8], 16)


def _listed(nodes: Sequence[int]) -> str:
    return ", ".join(map(str, nodes[:20])) + ", …" * (len(nodes) > 20)
