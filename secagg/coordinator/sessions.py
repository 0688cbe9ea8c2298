"""All sessions of a coordinator: created, found, brought back after a restart, forgotten.

A session that is over is kept as long as there is room, so that silos that come late find its sums.
Then the oldest ones go, in two steps: one is *forgotten* at once, also on the event loop and while
another session asks for room; its records and files are *erased*, in a worker thread, before
anything takes their place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from secagg.config import SessionConfig
from secagg.coordinator.records import parse
from secagg.coordinator.retrace import restore
from secagg.coordinator.session import Session
from secagg.coordinator.spool import Holding, damaged
from secagg.coordinator.standing import Means
from secagg.coordinator.state import State
from secagg.errors import Conflict, MalformedMessage, NotFound, QuotaExceeded
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api


class Sessions:
    """The sessions, by id and by name.

    Args:
        means: what they work with; each gets to know what the others keep on disk.
    """

    def __init__(self, means: Means) -> None:
        self._means = replace(means, holdings=self._holdings, free=self._free, erase=self._erase)
        self._limits = means.limits
        self._sessions: dict[bytes, Session] = {}
        self._forgotten = deque[Session]()
        self._lock = threading.Lock()
        self._erasing = threading.Lock()

    def restore(self, now: float) -> None:
        """Bring all sessions of the journal back, and remove what belongs to none.

        Raises:
            StorageDamaged: records or blobs are not what was stored.
        """
        for session_id, rows in self._means.journal.load().items():
            if (
                not rows or parse(rows[0]).created.session_id != session_id
            ):  # CHECK: journal-beginning
                raise damaged(f"session {session_id.hex()[:8]} has no beginning")
            self._sessions[session_id] = restore(rows, self._means, now)
        folders = {session.folder for session in self._sessions.values()}
        for name in self._means.disk.names("sessions"):
            folder = "/".join(name.split("/")[:2])
            if folder not in folders:
                self._means.disk.remove(folder)

    def create(self, message: api.SessionConfig, key: bytes = b"", creator: str = "") -> Session:
        """Create a session; the same call again gives the session that it created.

        Args:
            message: the configuration; without silos, all of the manifest's.
            key: of the call; empty for none.
            creator: the admin who calls.

        Raises:
            MalformedMessage: the configuration cannot be a session.
            Conflict: an active session has that name.
            QuotaExceeded: too many are active, of this admin or of all.
        """
        with self._lock:
            if not message.silos:
                message.silos.extend(sorted(self._means.manifest().silos))
            config = wire_session.config_from_wire(message)
            again = next((s for s in self.all() if key and s.key == key), None)
            if again is not None and again.config == config:
                return again
            self._check(config)
            self._check_quota(creator)
            self._make_room()
            self._erase()
            session_id = self._means.entropy(32)
            session = Session.create(config, session_id, self._means, key, creator)
            self._sessions[session_id] = session
            return session

    def _check(self, config: SessionConfig) -> None:
        manifest = self._means.manifest()
        if config.consortium != manifest.consortium:  # CHECK: session-consortium
            raise MalformedMessage(
                "session-consortium", f"This coordinator serves consortium {manifest.consortium}."
            )
        if unknown := set(config.silos) - manifest.silos.keys():  # CHECK: session-silos-known
            raise MalformedMessage("session-silos", f"No such silos: {sorted(unknown)}.")
        for session in self.all():
            if (
                session.config.name == config.name and session.state is State.ACTIVE
            ):  # CHECK: session-name-free
                raise Conflict("admin", "session-name", f"Session {config.name} is active.")

    def _check_quota(self, creator: str) -> None:
        """Only sessions whose creator was noted count: one from an older journal is nobody's."""
        most = self._limits.sessions_per_admin
        own = [
            s for s in self.all() if s.state is State.ACTIVE and creator and s.creator == creator
        ]
        if len(own) >= most:  # CHECK: quota-sessions
            raise QuotaExceeded(
                "quota-sessions",
                f"{creator} has {len(own)} active sessions.",
                f"Abort one: an admin may have {most} (sessions_per_admin).",
            )

    def _make_room(self) -> None:
        """Forget the oldest session that is over, with its sums, if there are too many."""
        if len(self._sessions) < self._limits.max_sessions:
            return
        over = self._over()
        if not over:  # CHECK: session-count
            raise QuotaExceeded("session-count", "This coordinator drives no more at once.")
        self._forget(over[0])

    def _free(self, size: int) -> bool:
        """Forget the oldest sessions that are over to free so many bytes, if they hold so many.

        Otherwise all of them stay: it would be in vain. Waits for nobody; see ``_erase``.
        """
        over = [session for session in self._over() if session.kept_bytes]
        if sum(session.kept_bytes for session in over) < size:
            return False
        for session in over:
            if size > 0:
                size -= session.kept_bytes
                self._forget(session)
        return True

    def _forget(self, session: Session) -> None:
        """Let nobody find a session any more; whoever has it already finds it over."""
        if self._sessions.pop(session.session_id, None) is not None:  # else another thread did
            self._forgotten.append(session)

    def _erase(self) -> None:
        """Remove records and files of forgotten sessions; return when they are gone.

        Raises:
            StorageFailed: the disk refuses.
        """
        with self._erasing:
            while self._forgotten:
                session = self._forgotten[0]
                self._means.journal.forget(session.session_id)
                self._means.disk.remove(session.folder)
                self._forgotten.popleft()

    def by_id(self, session_id: bytes) -> Session:
        """Return a session.

        Raises:
            NotFound: there is no such session.
        """
        session = self._sessions.get(session_id)
        if session is None:  # CHECK: session-known
            raise NotFound("session-unknown", "There is no such session at this coordinator.")
        return session

    def by_name(self, name: str) -> Session:
        """Return the newest session of a name.

        Raises:
            NotFound: there is none.
        """
        for session in reversed(self.all()):
            if session.config.name == name:
                return session
        raise NotFound(
            "session-unknown",
            f"There is no session named {name!r} at this coordinator.",
            "An admin creates it with `secagg session create`.",
        )

    def all(self) -> list[Session]:
        """All sessions, oldest first."""
        return list(self._sessions.values())

    def _over(self) -> list[Session]:
        return [session for session in self.all() if session.state is not State.ACTIVE]

    def _holdings(self) -> Iterator[Holding]:
        for session in self.all():
            yield from session.holdings()
