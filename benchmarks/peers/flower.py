"""Flower's SecAgg+, played in one process by its own two ends.

``flwr.server.workflow.SecAggPlusWorkflow`` is the server, ``flwr.client.mod.secaggplus_mod`` each
client, as a Flower app calls them; this module is the grid between them, which hands each message
over. What they call in turn is theirs too: ``quantize``, ``parameters_multiply``,
``parameters_addition``, ``parameters_subtraction``, ``parameters_mod``, ``pseudo_rand_gen``,
``generate_shared_key``, ``create_shares``, ``combine_shares``, ``encrypt``, ``decrypt``,
``dequantize``. The network, the SuperLink's database and the strategy are left out.

Serialised, a message crosses as ``message_to_proto(…).SerializeToString()`` and comes back through
``message_from_proto``, and arrays pass ``ndarray_to_bytes`` and ``bytes_to_ndarray`` as they do in
Flower. Otherwise neither is timed: arrays are handed over by reference, which Flower cannot do.
The model's way down to the clients is left out of both (and so is ours).
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.peers import clock

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common import recorddict_compat
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.task_identity import TaskIdentity

CLIENT = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
SERVER = import_module("flwr.server.workflow.secure_aggregation.secaggplus_workflow")
WEIGHT = 1000
NO_MODEL = Parameters(tensors=[], tensor_type="numpy.ndarray")
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # of the app's process
logging.getLogger("flwr").setLevel(logging.CRITICAL)


@dataclass
class Setting:
    """What a round of theirs is of.

    Args:
        updates: float32 vector by node; none is changed.
        dropped: nodes that fall silent after they shared their keys.
        shares: neighbours and the node itself: n for a complete graph.
        threshold: t.
        serialised: whether messages cross as bytes.
    """

    updates: dict[int, np.ndarray]
    dropped: set[int]
    shares: int
    threshold: int
    serialised: bool = False


@dataclass
class Played:
    """What a round of theirs took, and gave.

    Args:
        mean: the survivors'.
        seconds: all roles, dequantised.
        server_seconds: of the server, from its first step to the unmasked sum, dequantising apart.
        shamir_seconds: of these, in ``combine_shares``.
        client_seconds: of each survivor, its vector's quantising and masking.
        bytes_up: of one survivor, in all messages, if they crossed as bytes.
        replies: the clients' messages, stage by stage.
    """

    mean: np.ndarray
    seconds: float
    server_seconds: float
    shamir_seconds: float
    client_seconds: list[float]
    bytes_up: int
    replies: list[list[Message]]
    arrays: list[np.ndarray] = field(default_factory=list, repr=False)


def play(setting: Setting) -> Played:
    """Play a round."""
    return _run(setting, _Grid(setting), [])


def replay(setting: Setting, played: Played) -> Played:
    """Play the server's part of a round again, on the clients' messages of ``played``."""
    return _run(setting, _Recording(played.replies), played.arrays)


class _Grid:
    """Hands messages to the clients and back; the clients are in here."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._contexts = {node: _context() for node in setting.updates}
        self.client_seconds: list[float] = []
        self.seconds, self.untimed = 0.0, 0.0
        self.bytes_up = dict.fromkeys(setting.updates, 0)
        self.replies: list[list[Message]] = []

    def send_and_receive(self, messages: list[Message], *, timeout: float | None) -> list[Message]:
        began = clock()
        answers = [self._answer(message) for message in messages]
        self.replies.append([answer for answer in answers if answer is not None])
        self.seconds += clock() - began
        return self.replies[-1]

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        if node in self._setting.dropped and stage in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK):
            return None
        message, _ = self._cross(message)
        began = clock()
        answer = secaggplus_mod(message, self._contexts[node], self._app)
        if stage == Stage.COLLECT_MASKED_VECTORS:
            self.client_seconds.append(clock() - began)
        answer, size = self._cross(answer)
        self.bytes_up[node] += size
        return answer

    def _app(self, message: Message, _: Context) -> Message:
        """A client that has trained."""
        update = self._setting.updates[message.metadata.dst_node_id]
        parameters = CLIENT.ndarrays_to_parameters([update])
        result = FitRes(Status(Code.OK, ""), parameters, WEIGHT, {})
        return Message(recorddict_compat.fitres_to_recorddict(result, True), reply_to=message)

    def _cross(self, message: Message) -> tuple[Message, int]:
        """Serialise and parse: where arrays go by reference, to copy the rest, untimed."""
        began = clock()
        data = message_to_proto(message).SerializeToString()
        message = message_from_proto(ProtoMessage.FromString(data))
        if not self._setting.serialised:
            self.untimed += clock() - began
        return message, len(data)


class _Recording:
    """Hands the server what the clients answered before."""

    def __init__(self, replies: list[list[Message]]) -> None:
        self.replies, self._left = replies, iter(replies)
        self.client_seconds: list[float] = []
        self.bytes_up: dict[int, int] = {}
        self.seconds, self.untimed = 0.0, 0.0

    def send_and_receive(self, messages: list[Message], *, timeout: float | None) -> list[Message]:
        return next(self._left)


class _Strategy:
    """Samples everybody and keeps the aggregate."""

    def __init__(self, nodes: list[int]) -> None:
        self._nodes = nodes
        self.parameters = NO_MODEL

    def configure_fit(self, *_: Any) -> list[tuple[Any, FitIns]]:
        return [(SimpleNamespace(node_id=node), FitIns(NO_MODEL, {})) for node in self._nodes]

    def aggregate_fit(self, _: int, results: list[tuple[Any, FitRes]], __: Any) -> Any:
        self.parameters = results[0][1].parameters
        return None, {}


class _Watch:
    """Times what the server calls: Shamir, and when it begins to dequantise."""

    def __init__(self) -> None:
        self.shamir, self.unmasked = 0.0, 0.0
        self._combine, self._dequantize = SERVER.combine_shares, SERVER.dequantize

    def combine_shares(self, shares: list[bytes]) -> bytes:
        began = clock()
        secret: bytes = self._combine(shares)
        self.shamir += clock() - began
        return secret

    def dequantize(self, *arguments: Any) -> Any:
        self.unmasked = clock()
        return self._dequantize(*arguments)


def _run(setting: Setting, grid: _Grid | _Recording, arrays: list[np.ndarray]) -> Played:
    workflow = SecAggPlusWorkflow(
        setting.shares, setting.threshold, clipping_range=1.0, max_weight=float(WEIGHT)
    )
    strategy, watch = _Strategy(list(setting.updates)), _Watch()
    context = LegacyContext(_context(), strategy=strategy)  # type: ignore[arg-type]
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(
        NO_MODEL, True
    )
    random.seed(0)  # its graph
    with (
        patch.object(SERVER, "combine_shares", watch.combine_shares),
        patch.object(SERVER, "dequantize", watch.dequantize),
        _arrays_by(setting, arrays) as read,
    ):
        began = clock()
        workflow(grid, context)
        ended = clock()
        mean = read(strategy.parameters)
    return Played(
        mean=mean,
        seconds=ended - began - grid.untimed,
        server_seconds=watch.unmasked - began - grid.seconds,
        shamir_seconds=watch.shamir,
        client_seconds=grid.client_seconds,
        bytes_up=max(grid.bytes_up.values(), default=0),
        replies=grid.replies,
        arrays=arrays,
    )


@contextmanager
def _arrays_by(setting: Setting, arrays: list[np.ndarray]) -> Iterator[Any]:
    """How arrays get into messages: as flwr serialises them, or by their number in a list."""
    if setting.serialised:
        with patch.object(CLIENT, "ndarrays_to_parameters", ndarrays_to_parameters, create=True):
            yield lambda parameters: parameters_to_ndarrays(parameters)[-1]
        return

    def put(array: np.ndarray) -> bytes:
        arrays.append(array)
        return (len(arrays) - 1).to_bytes(8, "big")

    def get(number: bytes) -> np.ndarray:
        return arrays[int.from_bytes(number, "big")]

    def put_all(several: list[np.ndarray]) -> Parameters:
        return Parameters([put(array) for array in several], "numpy.ndarray")

    def get_all(parameters: Parameters) -> list[np.ndarray]:
        return [get(number) for number in parameters.tensors]

    with (
        patch.object(CLIENT, "ndarray_to_bytes", put),
        patch.object(CLIENT, "parameters_to_ndarrays", get_all),
        patch.object(CLIENT, "ndarrays_to_parameters", put_all, create=True),
        patch.object(SERVER, "bytes_to_ndarray", get),
        patch.object(SERVER, "ndarrays_to_parameters", put_all),
    ):
        yield lambda parameters: get_all(parameters)[-1]


def _context() -> Context:
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
