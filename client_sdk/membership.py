"""Who this silo is in a session: what the coordinator said, checked against what the silo has.

The manifest is the authority's, the policy the operator's; the session's parameters are fixed from
the first answer on, so that a coordinator cannot change them under a running training.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from client_sdk.channel import Channel
from client_sdk.profile import Profile
from client_sdk.transfer import parsed
from secagg.errors import ConfigError, FaultyServer
from secagg.masking import transcript
from secagg.masking.client import Member, check_session_name
from secagg.masking.ledger import Ledger
from secagg.pki.credentials import save_manifest
from secagg.pki.manifest import SignedManifest
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_from_wire


class Membership:
    """This silo's place in one session.

    Args:
        name: the session's name.
        profile: the silo's.
        channel: to the coordinator.
        ledger: the silo's, which knows the sessions of this name that it took part in.

    Raises:
        ConfigError: the profile is not a silo's.
        PolicyRefused: the session is below this silo's floors.
        FaultyServer: what the coordinator says of the session cannot be.
    """

    def __init__(self, name: str, profile: Profile, channel: Channel, ledger: Ledger) -> None:
        # CHECK: profile-role
        if profile.policy is None or profile.credentials.identity_key is None:
            raise ConfigError("profile-role", "This profile is not a silo's.")
        self._name = name
        self._credentials = profile.credentials
        self._policy = profile.policy
        self._identity_key = profile.credentials.identity_key
        self._channel = channel
        self._refreshing = threading.Lock()
        self.member = self._ask()
        # CHECK: joined-session-name
        check_session_name(name, self.member.session_id, profile.policy, ledger)

    @property
    def session_hash(self) -> bytes:
        """Hash of the session's parameters."""
        return transcript.session_hash(self.member.session)

    @property
    def opening_transcript(self) -> bytes:
        """What a proposer of this session signs over."""
        return transcript.opening_transcript(self.session_hash, self.member.session_id)

    def refresh(self) -> Member:
        """Take up a newer manifest; the session itself must be the one that was joined.

        Raises:
            FaultyServer: it is another one, or has other parameters.
        """
        with self._refreshing:  # an answer that was slow must not take the place of a newer one
            return self._refresh()

    def _refresh(self) -> Member:
        fresh, joined = self._ask(), self.member
        if fresh.session_id != joined.session_id:  # CHECK: session-replaced
            raise FaultyServer(
                "session-replaced",
                f"Another session named {self._name} has taken this one's place.",
                "Join again if that is meant.",
            )
        if transcript.session_hash(fresh.session) != self.session_hash:  # CHECK: session-changed
            raise FaultyServer("session-changed", "The session's parameters changed.")
        self.member = replace(joined, manifest=fresh.manifest)
        return self.member

    def _ask(self) -> Member:
        reply = self._channel.call(
            "JoinSession", api.JoinSessionRequest(session=self._name), api.JoinSessionReply
        )
        directory, identity = self._credentials.directory, self._credentials.identity
        manifest = save_manifest(directory, SignedManifest.from_json(reply.manifest))
        config = parsed(lambda: config_from_wire(reply.config))
        # CHECK: session-answered
        if (config.name, config.consortium) != (self._name, identity.consortium):
            raise FaultyServer("session-name", "The coordinator answered with another session.")
        if identity.name not in config.silos:  # CHECK: session-member
            raise FaultyServer("session-member", "The session's list of silos is without this one.")
        self._policy.check_session(config)  # CHECK: joined-policy
        return Member(
            name=next(name for name in config.silos if name == identity.name),
            identity=self._identity_key,
            manifest=manifest.manifest,
            policy=self._policy,
            session=config,
            session_id=bytes(reply.session_id),
        )
