"""What a session is, to and from protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secagg.config import SessionConfig, parse_table
from secagg.crypto.labels import SIGN_TASK, enc, u64
from secagg.crypto.sign import SIGNATURE_BYTES, IdentityKey, verify
from secagg.encoding.schema import MAX_TENSORS, Schema, TensorSpec
from secagg.errors import ConfigError, MalformedMessage, RoundAborted
from secagg.masking.transcript import NO_WEIGHTS, TaskOpening
from secagg.wire._pb import service_pb2 as api


def config_to_wire(config: SessionConfig) -> api.SessionConfig:
    """A session's configuration."""
    return api.SessionConfig(
        name=config.name,
        consortium=config.consortium,
        silos=config.silos,
        protection=config.protection,
        colluders=config.colluders,
        threshold=str(config.threshold),
        min_cohort=config.min_cohort,
        mask_prg=config.mask_prg,
        tasks=[
            api.TaskConfig(
                name=task.name,
                weighting=task.weighting,
                rounds=task.rounds,
                ring_bits=task.ring_bits or 0,
                bound=task.bound,
                clip=task.clip,
                weight_cap=task.weight_cap,
                metrics=[api.Metric(name=m.name, bound=m.bound) for m in task.metrics],
            )
            for task in config.tasks
        ],
        chunk_bytes=config.chunk_bytes,
        train_deadline=config.train_deadline,
        phase_deadline=config.phase_deadline,
        max_attempts=config.max_attempts,
        suite=config.suite or "",
    )


def _table(message: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    return {field: getattr(message, field) for field in fields}


def config_from_wire(message: api.SessionConfig) -> SessionConfig:
    """A session's configuration, parsed as strictly as from a file.

    Raises:
        MalformedMessage: it cannot be a session.
    """
    task_fields = ("name", "weighting", "rounds", "bound", "clip", "weight_cap")
    table = _table(
        message,
        (
            *("name", "consortium", "protection", "colluders", "threshold", "min_cohort"),
            *("mask_prg", "chunk_bytes", "train_deadline", "phase_deadline", "max_attempts"),
        ),
    )
    table["suite"] = message.suite or None
    table["silos"] = list(message.silos)
    table["tasks"] = [
        {
            **_table(task, task_fields),
            "ring_bits": task.ring_bits or None,
            "metrics": [{"name": m.name, "bound": m.bound} for m in task.metrics],
        }
        for task in message.tasks
    ]
    try:
        return parse_table(SessionConfig, table, "session")
    except ConfigError as error:
        # CHECK: session-config
        raise MalformedMessage(error.code, error.observed, error.remedy) from None


@dataclass(frozen=True, slots=True)
class SignedOpening:
    """A task's opening with its proposer's signature.

    Args:
        opening: schema, step and digest of the initial weights.
        weights_bytes: size of the initial weights as they are uploaded; 0 where there are none.
        proposer: the silo that proposed it.
        signature: over (session, opening, size).
        sealed_digest: vector digest of the weights as they are uploaded, where they are sealed for
            the session's silos; empty where they are uploaded as they are.
    """

    opening: TaskOpening
    weights_bytes: int
    proposer: str
    signature: bytes
    sealed_digest: bytes = b""

    @property
    def uploaded_digest(self) -> bytes:
        """Vector digest of the weights as they are uploaded."""
        return self.sealed_digest or self.opening.weights_digest

    @staticmethod
    def body(
        opening: TaskOpening, weights_bytes: int, proposer: str, sealed_digest: bytes = b""
    ) -> bytes:
        """What the signature covers, beside the session."""
        return enc(
            opening.task.encode(),
            opening.schema.encode(),
            opening.step.encode(),
            opening.weights_digest,
            u64(weights_bytes),
            proposer.encode(),
            *([sealed_digest] if sealed_digest else []),
        )

    @classmethod
    def sign(
        cls,
        opening: TaskOpening,
        weights_bytes: int,
        proposer: str,
        identity: IdentityKey,
        transcript: bytes,
        sealed_digest: bytes = b"",
    ) -> SignedOpening:
        """Propose an opening, over ``opening_transcript`` of the session."""
        body = cls.body(opening, weights_bytes, proposer, sealed_digest)
        signature = identity.sign(SIGN_TASK, transcript, body)
        return cls(opening, weights_bytes, proposer, signature, sealed_digest)

    def verify(self, key: bytes, transcript: bytes) -> None:
        """Return if the proposer signed this.

        Raises:
            MalformedMessage: it did not.
        """
        body = self.body(self.opening, self.weights_bytes, self.proposer, self.sealed_digest)
        verify(key, SIGN_TASK, transcript, body, self.signature)  # CHECK: opening-verified


def opening_to_wire(value: SignedOpening) -> api.TaskOpening:
    """A task's opening."""
    opening = value.opening
    return api.TaskOpening(
        task=opening.task,
        tensors=[api.Tensor(name=t.name, shape=t.shape) for t in opening.schema.tensors],
        step=opening.step,
        weights_digest=opening.weights_digest,
        weights_bytes=value.weights_bytes,
        proposer=value.proposer,
        signature=value.signature,
        sealed_digest=value.sealed_digest,
    )


def opening_from_wire(message: api.TaskOpening) -> SignedOpening:
    """A task's opening.

    Raises:
        MalformedMessage: sizes, names or order are not right.
    """
    if (  # CHECK: opening-sizes
        len(message.weights_digest) != len(NO_WEIGHTS)
        or len(message.signature) != SIGNATURE_BYTES
        or (message.weights_bytes == 0) != (message.weights_digest == NO_WEIGHTS)
        or len(message.sealed_digest) not in (0, len(NO_WEIGHTS))
        or (message.weights_bytes == 0 and message.sealed_digest)
        or len(message.step) > 4096
        or len(message.tensors) > MAX_TENSORS
    ):
        raise MalformedMessage("opening-size", "A task's opening has fields of the wrong size.")
    schema = Schema(tuple(TensorSpec(t.name, tuple(t.shape)) for t in message.tensors))
    opening = TaskOpening(message.task, schema, message.step, message.weights_digest)
    return SignedOpening(
        opening, message.weights_bytes, message.proposer, message.signature, message.sealed_digest
    )


def aborted_to_wire(error: RoundAborted, round_number: int, attempt: int) -> api.Aborted:
    """Why an attempt ended."""
    return api.Aborted(
        round=round_number,
        attempt=attempt,
        phase=error.phase,
        have=error.have,
        need=error.need,
        blamed=error.blamed,
        because=error.because,
    )


def aborted_from_wire(message: api.Aborted) -> RoundAborted:
    """Why an attempt ended."""
    return RoundAborted(
        message.phase,
        message.have,
        message.need,
        blamed=tuple(message.blamed),
        because=message.because,
    )
