"""This silo's part in the custody of its session's key.

Whoever has the key gives it to the others: ``Keeper`` waits for requests in a thread of its own, so
that a silo that joins late or comes back has it within a moment, though everybody else is training.
Whoever has not got it asks, and makes it where the coordinator says that it is the first; what the
coordinator says in between is believed by nobody (``secagg.ckks.custody``).

Keys live in memory, and on disk only where the silo's policy names a directory for them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Final

from client_sdk.channel import POLL_SECONDS, Channel, ChannelClosed, CoordinatorRefused
from client_sdk.membership import Membership
from client_sdk.progress import log
from client_sdk.transfer import parsed
from secagg.ckks.custody import Custodian, Pending, ask, unwrap, wrap
from secagg.ckks.keyring import HeldKey, Keyring, make_key, open_blob, seal_blob
from secagg.ckks.sealing import Sealer
from secagg.config import SiloId
from secagg.crypto.secret import Entropy
from secagg.disk import Disk
from secagg.errors import (
    ConfigError,
    FaultyClient,
    FaultyClientOrServer,
    FaultyServer,
    MalformedMessage,
    SecaggError,
    SessionEnded,
    StaleKey,
)
from secagg.masking.ledger import Keyed, Ledger
from secagg.suite import KeyName, Suite
from secagg.wire import custody as wire
from secagg.wire._pb import service_pb2 as api
from secagg.wire.attempt import key_to_wire

BOXES: Final = 5
"""How many boxes that are no use this silo takes before it gives up."""
WAITS: Final = 120
"""How often this silo asks a coordinator that goes on with a key that is worn."""
_UNFIT: Final = frozenset({"key-box-members", "key-replaced"})
"""Refusals of a key that no other silo's box would mend."""
_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 4.0


class Keys:
    """The keys of one session that this silo holds, and how it comes by them.

    The trainer's thread and the keeper's may use it at once.

    Args:
        suite: the session's.
        membership: who this silo is.
        channel: to the coordinator.
        ledger: remembers the newest key over a restart.
        disk: where keys may be kept; None keeps them in memory alone.
        entropy: source of keys.

    Attributes:
        arrived: set whenever a key has come; whoever waits for one clears it.
        kept: whether a keeper gives the key to others.
        shared: set once another silo is known to have been given a key, or to have given one.

    Raises:
        ConfigError: the kept keys are damaged.
    """

    def __init__(
        self,
        suite: Suite,
        membership: Membership,
        channel: Channel,
        ledger: Ledger,
        disk: Disk | None,
        entropy: Entropy,
    ) -> None:
        self._suite = suite
        self._membership = membership
        self._channel = channel
        self._ledger = ledger
        self._disk = disk
        self._entropy = entropy
        self._session_id = membership.member.session_id
        self._file = f"{self._session_id.hex()}.keys"
        self._ring = self._kept()  # what is on disk is not lost with this process
        self._stale: KeyName | None = None
        self.arrived = threading.Event()
        self.shared = threading.Event()
        if self._ring.keys:
            self.shared.set()
        self.kept = False
        self._sealer: tuple[KeyName, Sealer] | None = None
        self._asking = threading.RLock()  # one thread asks; the other then finds what it got

    @property
    def held(self) -> HeldKey | None:
        """The newest key, unless the coordinator has said that there is a newer one."""
        newest = self._ring.newest
        return None if newest is None or newest.name == self._stale else newest

    def close(self) -> None:
        """Stop what seals and opens."""
        if self._sealer is not None:
            self._sealer[1].close()
        self._sealer = None

    def outdated(self, name: KeyName) -> None:
        """Note that the session has, or has to have, a newer key than this one."""
        newest = self._ring.newest
        if newest is not None and newest.name == name:
            self._stale = name

    def newest(self, opened: Mapping[KeyName, int]) -> HeldKey:
        """Return the session's newest key, fit for a round; ask for it, or make it, if need be.

        Args:
            opened: how many sums were released under each key, as far as this silo knows.

        Raises:
            FaultyServer: the coordinator goes on with a key that is worn or that somebody has who
                left, or back to an older one.
            FaultyClient, FaultyClientOrServer: nobody sent a box that was any use.
        """
        with self._asking:
            key = self.held
            if key is None or not self._fit(key, opened):
                key = self._obtain_newer()
                self._check(key, opened)  # CHECK: key-fit-again
            return key

    def renew(self) -> None:
        """Get the session's newest key, if this silo has an older one.

        Raises:
            As ``newest``.
        """
        with self._asking:
            if self._ring.keys and self.held is None:
                self._obtain_newer()

    def find(self, name: KeyName) -> HeldKey:
        """Return the key of a past sum; ask the session's silos if this one has not got it.

        Raises:
            ConfigError: ``key-gone``: nobody that answered has it any more.
        """
        for _ in self._boxes(name):
            found = self._ring.find(name)
            if found is not None:
                return found
        raise _gone(f"A past sum of epoch {name.epoch}")

    def _boxes(self, wanted: KeyName | None = None) -> Iterator[None]:
        """Go through what other silos have, as long as there are some that answer."""
        yield
        for _ in range(max(BOXES, self._membership.member.session.colluders + 1)):
            with self._asking:
                self._obtain(0, wanted)
            yield
            if not self.shared.is_set():
                return  # nobody answered: this silo made a key for itself

    def sealer(self, key: HeldKey) -> Sealer:
        """What seals and opens under a key; the one for another key is closed."""
        name = key.name
        if self._sealer is None or self._sealer[0] != name:
            self.close()
            self._sealer = name, Sealer(self._suite, key.material)
        return self._sealer[1]

    def await_company(self) -> None:
        """Wait until another silo has the key, too: what is sealed is not lost with this one."""
        self.newest({})
        log.info("waiting until another silo of the session has its key, too")
        for second in count(1):
            if not self.kept or self.shared.wait(_PAUSE_SECONDS):
                return  # a session that ends meanwhile ends the keeper; the next call says so
            if not second % 25:
                self._membership.refresh()  # as does this, if this silo is not let in any more

    def seal_blob(self, label: str, parties: tuple[str, ...], data: bytes) -> bytearray:
        """Seal data for the session's silos of now, under its newest key."""
        self._membership.refresh()
        return seal_blob(self.newest({}), label, parties, data, self._entropy)

    def open_blob(self, label: str, parties: tuple[str, ...], blob: bytearray) -> bytearray:
        """Open what a silo of the session has sealed, under whichever of its keys.

        Raises:
            ConfigError: ``key-gone``: nobody that answered has the key, or it is no such blob.
        """
        tried: set[KeyName] = set()
        for _ in self._boxes():
            for key in reversed(self._ring.keys):
                if key.name not in tried:
                    tried.add(key.name)
                    with contextlib.suppress(MalformedMessage):
                        return open_blob(key, label, parties, blob)
        raise _gone("A blob")

    def report(self, name: KeyName, round_number: int) -> None:
        """Tell the coordinator that a sum did not open: the key's epoch ends."""
        request = api.EndKeyRequest(
            session_id=self._session_id, key=key_to_wire(name), round=round_number
        )
        with contextlib.suppress(SessionEnded):  # by this very sum: no epoch follows
            self._channel.call("EndKey", request, api.Ack)
        self.outdated(name)

    def serve(self, answered: set[bytes]) -> tuple[bool, list[api.CheckpointWish]]:
        """Answer those who ask for the key; waits for them up to 25 s.

        Args:
            answered: ephemeral keys of the requests that were dealt with before; grows.

        Returns:
            Whether anybody new has asked, and the checkpoints that others wait for.

        Raises:
            StaleKey: this silo has not got the newest key.
        """
        key = self.held
        if key is None:
            raise StaleKey("key-stale", "This silo has no key to give.")
        request = api.AwaitKeyRequestsRequest(
            session_id=self._session_id, key=key_to_wire(key.name)
        )
        try:
            reply = self._channel.call(
                "AwaitKeyRequests", request, api.AwaitKeyRequestsReply, seconds=POLL_SECONDS
            )
        except StaleKey:
            self.outdated(key.name)
            raise
        fresh = {message.ephemeral for message in reply.requests} - answered
        if fresh:
            self._membership.refresh()  # who was revoked just now gets nothing
        for message in reply.requests:  # again, if it is listed again: the box was lost
            self._answer(message, quietly=message.ephemeral in answered)
            answered.add(message.ephemeral)
        return bool(fresh), list(reply.checkpoints)

    def _answer(self, message: api.KeyRequest, *, quietly: bool) -> None:
        try:
            asked = wire.request_from_wire(message)
            box = wrap(self._ring, asked, self._custodian(), self._entropy)
        except (FaultyClientOrServer, FaultyServer, MalformedMessage) as refusal:
            if not quietly:
                log.warning("a request for the session's key is not answered: %s", refusal)
            return
        self._channel.call(
            "SendKeyBox",
            api.SendKeyBoxRequest(session_id=self._session_id, box=wire.box_to_wire(box)),
            api.Ack,
        )
        self.shared.set()
        if not quietly:
            log.info("gave the session's key of epoch %d to %s", box.epoch, box.recipient)

    # How a key comes here.

    def _obtain_newer(self) -> HeldKey:
        """Get a key of a later epoch than this silo's newest; of any, if it lacks that one."""
        return self._obtain(self._ring.epoch + (self._ring.newest is not None))

    def _obtain(self, epoch: int, wanted: KeyName | None = None) -> HeldKey:
        """Ask until there is a key of the session's current epoch, which is at least this one.

        Args:
            epoch: the least that will do.
            wanted: which past key a sum is to be opened with, if any.
        """
        epoch = max(epoch, self._ring.epoch, 1)
        left = BOXES
        refused: SecaggError | None = None
        for _ in range(WAITS):
            pending, reply = self._ask(epoch)
            self._membership.refresh()  # a key that comes, or is made, is for the members of now
            match reply.WhichOneof("answer"):
                case "epoch" if reply.epoch > epoch:
                    epoch = reply.epoch
                case "epoch":  # it has not seen yet what this silo has
                    refused = refused or self._behind(reply.epoch)
                    time.sleep(_PAUSE_SECONDS)
                case "make" if epoch <= self._ring.epoch:
                    refused = refused or self._behind(epoch - 1)
                    epoch = self._ring.epoch + 1  # no second key of an epoch
                case "make":
                    self._make(epoch)
                case _:
                    box = parsed(lambda: wire.box_from_wire(reply.box))  # noqa: B023
                    try:
                        keys = unwrap(pending, box, self._custodian())
                        self._take(keys, box.sender, wanted)
                        self.shared.set()
                    except (FaultyClient, FaultyClientOrServer) as refusal:
                        left, refused = left - 1, refusal
                        log.warning("a box with the session's key is no use: %s", refusal)
                        if refusal.code in _UNFIT or left <= 0:
                            epoch += 1  # where another silo asks for that, too, a key is made
            newest = self.held
            if newest is not None and newest.epoch >= epoch:
                return newest
        raise refused or FaultyServer(
            "key-worn",
            f"The coordinator does not begin epoch {epoch} of the session's keys.",
            "Nothing was sent. Ask its operator for its newest manifest.",
        )

    def _ask(self, epoch: int) -> tuple[Pending, api.AskKeyReply]:
        """Ask for an epoch's key, until there is an answer."""
        pending, request = ask(self._custodian(), epoch, self._entropy)
        message = api.AskKeyRequest(
            session_id=self._session_id, request=wire.request_to_wire(request)
        )
        while True:
            reply = self._channel.call("AskKey", message, api.AskKeyReply, seconds=POLL_SECONDS)
            if reply.WhichOneof("answer") is not None:
                return pending, reply
            log.info("waiting for a silo of the session that has its key")

    def _behind(self, current: int) -> FaultyServer | None:
        """What is wrong with a coordinator that is at an older epoch than this silo."""
        if current >= self._ring.epoch:
            return None
        return FaultyServer(
            "key-epoch",
            f"The coordinator is at epoch {current} of the session's keys; this silo has taken one "
            f"of epoch {self._ring.epoch}.",
            "Nothing was sent under an older one. Ask the coordinator's operator for its newest "
            "state, or start another silo: two that are ahead take it along.",
        )

    def _make(self, epoch: int) -> None:
        """Make an epoch's key; it counts once the coordinator has taken down its name."""
        me = self._custodian()
        key = make_key(self._session_id, epoch, me.members, self._entropy)
        announcement = api.AnnounceKeyRequest(
            session_id=self._session_id, key=key_to_wire(key.name), members=list(key.members)
        )
        try:
            self._channel.call("AnnounceKey", announcement, api.Ack)
        except (StaleKey, CoordinatorRefused) as refusal:  # another one was quicker
            log.info("the key that this silo made is not used: %s", refusal)
            time.sleep(_PAUSE_SECONDS)
            return
        self.shared.clear()
        self._take((key,), me.name)
        log.info("made the session's key of epoch %d", epoch)

    def _take(
        self, keys: tuple[HeldKey, ...], sender: SiloId, wanted: KeyName | None = None
    ) -> None:
        ring = self._ring.add(keys, sender, wanted)
        newest = ring.keys[-1].name
        if newest != self._ledger.newest_key(self._session_id):
            self._ledger.record(Keyed(self._session_id, newest.epoch, newest.key_id))
        if self._disk is not None:
            self._disk.replace(self._file, memoryview(ring.pack()))
        self._ring = ring
        self.arrived.set()

    # Whether a key is good.

    def _fit(self, key: HeldKey, opened: Mapping[KeyName, int]) -> bool:
        try:
            self._check(key, opened)
        except FaultyServer as reason:
            log.info("asking for a newer key: %s", reason)
            return False
        return True

    def _check(self, key: HeldKey, opened: Mapping[KeyName, int]) -> None:
        # CHECK: key-fit
        self._ring.check(key.name, self._custodian().members, opened.get(key.name, 0))

    def _custodian(self) -> Custodian:
        member = self._membership.member
        known = member.manifest.silos
        return Custodian(
            member.name,
            member.identity,
            {silo: known[silo] for silo in member.session.silos if silo in known},
            member.session_id,
            self._membership.opening_transcript,
        )

    def _kept(self) -> Keyring:
        floor = self._ledger.newest_key(self._session_id)
        data = None if self._disk is None else self._disk.read(self._file)
        if data is None:
            return Keyring(self._session_id, floor)
        try:
            return Keyring.unpack(data, self._session_id, floor)
        except MalformedMessage as error:
            raise ConfigError(
                error.code,
                f"The kept keys of the session cannot be used: {error.observed}",
                "Remove the file; the other silos have the key.",
            ) from None


class Keeper:
    """Gives what others ask for, in a thread of its own, until it is closed.

    Args:
        keys: the key.
        offer: offers a checkpoint of a task after more results than these; says whether it was
            accepted and had not been before.
    """

    def __init__(self, keys: Keys, offer: Callable[[str, int, set[tuple[str, int]]], bool]) -> None:
        self._keys = keys
        keys.kept = True
        self._offer = offer
        self._offered: set[tuple[str, int]] = set()
        self._answered: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="secagg-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a wait that is under way ends with its channel."""
        self._over.set()
        self._keys.arrived.set()

    def join(self) -> None:
        """Wait until the thread has ended, after ``close`` and after its channel was closed."""
        self._thread.join(_LONGEST_PAUSE_SECONDS)

    def _run(self) -> None:
        try:
            self._keep()
        finally:
            self._keys.kept = False

    def _keep(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._over.is_set():
            began = time.monotonic()
            try:
                busy = self._serve()
            except (SessionEnded, ChannelClosed):
                return
            except Exception as error:  # noqa: BLE001 - the thread's border
                busy = False
                if not self._over.is_set():
                    log.error("other silos cannot be helped any more just now: %r", error)
            busy |= time.monotonic() - began > _LONGEST_PAUSE_SECONDS  # a wait is a pause
            pause = _PAUSE_SECONDS if busy else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if not busy and self._keys.arrived.wait(pause):
                self._keys.arrived.clear()
                pause = _PAUSE_SECONDS

    def _serve(self) -> bool:
        """Serve once; return whether there was anything to do."""
        try:
            busy, wishes = self._keys.serve(self._answered)
            for wish in wishes:
                busy |= self._offer(wish.task, wish.results, self._offered)
        except StaleKey:
            self._keys.renew()  # with its past keys this silo may be the only one to help
            return False
        except (SessionEnded, ChannelClosed):
            raise
        except SecaggError as error:
            if not self._over.is_set():
                log.warning("other silos cannot be helped just now: %s", error)
            return False
        return busy


def _gone(what: str) -> ConfigError:
    return ConfigError(
        "key-gone",
        f"{what} was sealed under a key that no silo has which answered.",
        "Start a silo that was there, or keep keys on disk (key_directory in policy.toml).",
    )
