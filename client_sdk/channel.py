"""Calls to the coordinator: mutual TLS, transient faults retried, refusals turned into our errors.

The only file of the SDK that knows gRPC. The coordinator's certificate must carry the DNS name that
the authority gives to coordinators alone, so another member cannot pose as one. A refusal in the
TLS handshake reaches gRPC as a bare UNAVAILABLE: hence our own certificate is checked before
dialling, a server certificate that does not verify is reported at once, and a coordinator that was
never reached is given up after ``CONNECT_SECONDS``.

A training runs longer than a certificate: before every attempt the certificate on disk is looked
at, and a renewed one takes over with a new connection, while calls in flight end over the old one.

The channel is blocking on purpose: so is a trainer, and an event loop in its process would buy
nothing.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import tenacity
from google.protobuf.message import Message

from client_sdk.profile import Profile
from client_sdk.progress import log
from secagg.errors import (
    CredentialError,
    FaultyServer,
    NotFound,
    SecaggError,
    SessionEnded,
    StaleKey,
    StaleModel,
    TooLate,
)
from secagg.pki.credentials import Credentials
from secagg.pki.names import server_dns_name
from secagg.pki.renewal import Reminder, RenewalWatch, utc_now
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import PutChunkRequest

R = TypeVar("R", bound=Message)
Request: TypeAlias = Message | PutChunkRequest
CALL_SECONDS: Final = 60.0
POLL_SECONDS: Final = 40.0
CONNECT_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 300.0
CALLS_IN_FLIGHT: Final = 4
_MAX_REPLY_BYTES: Final = 64 * 2**20
_IDLE_MS: Final = 30_000
"""An idle connection is hung up by us, before the coordinator does; the next call dials again."""
_CODE_KEY: Final = "secagg-code"
_RETRY_KEY: Final = "secagg-retry-after-ms"
_MILLISECONDS: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
_MOST_SECONDS: Final = 30.0
"""Of a pause that the coordinator asks for: then it is asked whether it still means it."""
_BUSY: Final = "Concurrent RPC limit"
"""gRPC's own words where a coordinator has more calls than it takes at once."""
_jitter: Final = tenacity.wait_random(0, 0.2)
_backoff: Final = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # not by us: a server with too many calls drops some unheard
    }
)
_BY_CODE: Final[dict[str, type[SecaggError]]] = {
    "base-stale": StaleModel,
    "key-stale": StaleKey,
    "phase-closed": TooLate,
    "round-over": TooLate,
    "vector-committed": TooLate,
    "round-aborted": TooLate,
    "session-over": SessionEnded,
    "task-done": SessionEnded,
}
_BY_STATUS: Final[dict[grpc.StatusCode, type[SecaggError]]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: CredentialError,
    grpc.StatusCode.PERMISSION_DENIED: CredentialError,
}


class CoordinatorUnreachable(SecaggError):
    """The coordinator could not be reached for long enough to give up."""


class CoordinatorRefused(SecaggError):
    """The coordinator refused a call for a reason that has no class of its own here."""


class ChannelClosed(SecaggError):
    """This side has closed the channel: before a call, during one, or between its attempts."""


@dataclass(eq=False)
class _Line:
    """One gRPC channel under one certificate; hung up once it is replaced and its calls are done.

    Args:
        channel: gRPC's.
        calls: how many are in flight.
    """

    channel: grpc.Channel
    calls: int = 0


class Channel:
    """A connection to the coordinator of a profile.

    Args:
        profile: checked credentials and address.
        service: "Aggregation" or "Admin".
        now: aware, UTC.

    Raises:
        CredentialError: our own certificate has expired or is not valid yet.
    """

    def __init__(
        self,
        profile: Profile,
        service: str = "Aggregation",
        *,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._address = profile.coordinator
        self._service = api.DESCRIPTOR.services_by_name[service]
        self._now = now
        self._reached = False
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._closed = threading.Event()
        self._watch = RenewalWatch(profile.credentials, now=now)
        self._reminder = Reminder()
        self._credentials = profile.credentials
        self._line = _Line(_dial(self._address, self._credentials))
        self._lines = [self._line]
        try:
            self._check_certificate()  # CHECK: own-certificate-at-start
        except CredentialError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; calls in flight fail, and pauses end. Twice is once."""
        with self._lock:
            self._closed.set()
            lines, self._lines = self._lines, []
        for line in lines:
            line.channel.close()

    def call(
        self, method: str, request: Request, kind: type[R], *, seconds: float = CALL_SECONDS
    ) -> R:
        """Call a method, retrying transient faults with exponential backoff.

        Raises:
            CoordinatorUnreachable: transient faults went on for too long.
            CredentialError: a certificate, ours or theirs, was refused, or ours has expired.
            ChannelClosed: by another thread, or before.
            StaleModel, TooLate, SessionEnded, NotFound, CoordinatorRefused: as the coordinator
                says.
        """
        return self._retry(lambda: self._attempt(method, request, seconds), kind)

    def once(self, method: str, request: Message, *, seconds: float) -> None:
        """Call a method without retrying and without caring: a courtesy on the way out."""
        self._take_up_renewal()
        with contextlib.suppress(grpc.RpcError, ChannelClosed):
            self._invoke(method, request, seconds)

    def call_many(self, method: str, requests: Iterable[Request], kind: type[R]) -> None:
        """Call an idempotent method for each request, a few in flight.

        Raises:
            As ``call``.
        """
        for _ in self.each(method, requests, kind):
            pass

    def each(
        self, method: str, requests: Iterable[Request], kind: type[R]
    ) -> Generator[R, None, None]:
        """Call an idempotent method for each request, a few in flight; give the replies in order.

        Whoever stops before the end closes it: then the calls in flight are cancelled.

        Raises:
            As ``call``.
        """
        flying: list[tuple[Request, Any, _Line]] = []
        try:
            for request in requests:
                self._check_certificate()  # CHECK: own-certificate-in-flight
                line, stub = self._pick_up(method)
                with self._unless_closed():
                    flying.append((request, stub.future(request, timeout=CALL_SECONDS), line))
                if len(flying) >= CALLS_IN_FLIGHT:
                    yield self._land(method, *flying.pop(0), kind)
            while flying:
                yield self._land(method, *flying.pop(0), kind)
        finally:
            for _, future, line in flying:
                future.cancel()
                self._put_down(line)

    def _land(self, method: str, request: Request, future: Any, line: _Line, kind: type[R]) -> R:
        try:
            return self._checked(future.result(), kind)
        except grpc.RpcError as error:  # the same again has the same reply again
            again = functools.partial(self._attempt, method, request, CALL_SECONDS)
            return self._retry(again, kind, error)
        finally:
            self._put_down(line)

    def _attempt(self, method: str, request: Request, seconds: float) -> Any:
        self._check_certificate()  # CHECK: own-certificate-each-call
        return self._invoke(method, request, seconds)

    def _invoke(self, method: str, request: Request, seconds: float) -> Any:
        line, stub = self._pick_up(method)
        try:
            with self._unless_closed():
                return stub(request, timeout=seconds)
        finally:
            self._put_down(line)

    @contextlib.contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """Give our error for gRPC's, if the channel is closed between picking up and calling."""
        try:
            yield
        except ValueError:
            if not self._closed.is_set():
                raise
            raise _closed() from None

    # Our own certificate, and the connection under it.

    def _check_certificate(self) -> None:
        """Take up a renewal, and return if what we have then is valid; warn if not for long.

        Raises:
            CredentialError: ``certificate-expired`` or ``certificate-not-yet-valid``.
        """
        self._take_up_renewal()
        now, credentials = self._now(), self._credentials
        credentials.check_validity(now)  # CHECK: own-certificate-validity
        if self._reminder.due(credentials, now):
            log.warning("%s", credentials.ending(now))

    def _take_up_renewal(self) -> None:
        with self._renewing:  # calls come from the trainer's thread and from the key's keeper
            self._look_for_renewal()

    def _look_for_renewal(self) -> None:
        found = self._watch.poll()
        if isinstance(found, CredentialError):
            log.warning(
                "The renewed certificate is not taken up, the old one stays in use: %s", found
            )
        elif found is not None and found.certificate_pem != self._credentials.certificate_pem:
            self._replace_line(found)
            log.info(
                "%s goes on under its renewed certificate, good until %s UTC",
                found.identity.uri,
                found.not_after.strftime("%F %T"),
            )

    def _replace_line(self, renewed: Credentials) -> None:
        line = _Line(_dial(self._address, renewed))
        with self._lock:
            if self._closed.is_set():
                line.channel.close()
                return
            self._line, self._credentials = line, renewed
            self._lines.append(line)
        self._hang_up()

    def _pick_up(self, method: str) -> tuple[_Line, Any]:
        """The line in use, kept open until it is put down, and a stub of a method over it.

        Raises:
            ChannelClosed: there is none any more.
        """
        with self._lock:
            if self._closed.is_set():
                raise _closed()
            stub = self._stub(method)
            self._line.calls += 1
            return self._line, stub

    def _put_down(self, line: _Line) -> None:
        with self._lock:
            line.calls -= 1
        self._hang_up()

    def _hang_up(self) -> None:
        """Close the lines that are replaced and have no call in flight any more."""
        with self._lock:
            over = [line for line in self._lines if line is not self._line and not line.calls]
            self._lines = [line for line in self._lines if line not in over]
        for line in over:
            line.channel.close()

    def _stub(self, method: str) -> Any:
        descriptor = self._service.methods_by_name[method]
        return self._line.channel.unary_unary(
            f"/{self._service.full_name}/{method}",
            request_serializer=operator.methodcaller("SerializeToString"),
            response_deserializer=getattr(api, descriptor.output_type.name).FromString,
        )

    def _retry(
        self, attempt: Callable[[], Any], kind: type[R], failed: grpc.RpcError | None = None
    ) -> R:
        """Make an attempt until it succeeds; ``failed`` is how the first one ended, if it has."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._may_heal),
            wait=_pause,
            stop=self._gives_up,
            sleep=tenacity.sleep_using_event(self._closed),
            reraise=True,
        )
        attempts = attempt if failed is None else _after(failed, attempt)
        try:
            reply = retrying(attempts)
        except grpc.RpcError as error:
            raise self._translate(error) from None
        self._reached = True
        return self._checked(reply, kind)

    def _may_heal(self, error: BaseException) -> bool:
        """Whether another attempt is worth its while; who has refused one has been reached."""
        if not isinstance(error, grpc.RpcError):
            return False
        self._reached = self._reached or _is_refusal(error)
        return not self._closed.is_set() and _is_transient(error)

    def _gives_up(self, state: tenacity.RetryCallState) -> bool:
        return tenacity.stop_after_delay(self._patience)(state)

    @property
    def _patience(self) -> float:
        """Seconds for the attempts of one call; they grow once the coordinator is reached."""
        return RETRY_SECONDS if self._reached else CONNECT_SECONDS

    def _checked(self, reply: Any, kind: type[R]) -> R:
        if not isinstance(reply, kind):  # CHECK: reply-type
            raise FaultyServer("reply-type", "The coordinator answered with another message.")
        return reply

    def _translate(self, error: grpc.RpcError) -> SecaggError:
        status, text = error.code(), error.details() or ""
        if _names_bad_certificate(text):
            return CredentialError(
                "coordinator-certificate",
                f"The certificate of {self._address} is not the consortium's coordinator's.",
                "Check the address in profile.toml, and that the authority is the same.",
            )
        if status in _TRANSIENT and self._closed.is_set():
            return _closed()
        if status in _TRANSIENT:
            return CoordinatorUnreachable(
                "coordinator-unreachable",
                f"{self._address} did not answer for {self._patience:.0f} s ({text}).",
                "Check the address and that it serves. If it does, it refuses this certificate: "
                "another authority's, revoked, or expired by its clock.",
            )
        code = _told(error, _CODE_KEY) or status.name.lower()
        kind = _BY_CODE.get(code) or _BY_STATUS.get(status, CoordinatorRefused)
        return kind(code, text)


def _dial(address: str, credentials: Credentials) -> grpc.Channel:
    """A channel under a certificate; it connects with the first call."""
    return grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(
            credentials.authority_pem,
            credentials.tls_key_pem.reveal(),
            credentials.certificate_pem,
        ),
        options=[
            ("grpc.ssl_target_name_override", server_dns_name(credentials.identity.consortium)),
            ("grpc.max_receive_message_length", _MAX_REPLY_BYTES),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.client_idle_timeout_ms", _IDLE_MS),
            ("grpc.enable_retries", 0),
        ],
    )


def _is_refusal(error: grpc.RpcError) -> bool:
    """Whether the coordinator itself has refused, and no fault on the way to it."""
    told = _told(error, _CODE_KEY) or _told(error, _RETRY_KEY)
    return told is not None or _is_busy(error)


def _is_busy(error: grpc.RpcError) -> bool:
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and _BUSY in (error.details() or "")


def _is_transient(error: grpc.RpcError) -> bool:
    text = error.details() or ""
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _told(error, _RETRY_KEY) is not None or _is_busy(error)
    return error.code() in _TRANSIENT and not _names_bad_certificate(text)


def _after(failed: grpc.RpcError, attempt: Callable[[], Any]) -> Callable[[], Any]:
    """An attempt that has failed once already."""
    failures = [failed]

    def again() -> Any:
        if failures:
            raise failures.pop()
        return attempt()

    return again


def _pause(state: tenacity.RetryCallState) -> float:
    """For as long as the coordinator says that its quota needs; else back off."""
    error = state.outcome.exception() if state.outcome is not None else None
    told = _told(error, _RETRY_KEY) if isinstance(error, grpc.RpcError) else None
    if told is None or not _MILLISECONDS.fullmatch(told):
        return _backoff(state)
    return min(int(told) / 1000, _MOST_SECONDS) + _jitter(state)


def _told(error: grpc.RpcError, key: str) -> str | None:
    """An entry of what came with a refusal."""
    entries = error.trailing_metadata() or ()
    return next((str(entry.value) for entry in entries if entry.key == key), None)


def _closed() -> ChannelClosed:
    return ChannelClosed(
        "channel-closed",
        "This side has closed its channel to the coordinator; the call may have been served.",
        "Make no call after close().",
    )


def _names_bad_certificate(text: str) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in text or "not found in certificate" in text
