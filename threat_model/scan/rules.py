"""What a run drew, and what of it may be found where: by kind, with the reason, never by value.

Everything is secret but what ``PUBLIC`` names, and nothing secret may be anywhere but where
``by_design`` says. Above all: a revealed share may be in its holder's Unmasking message of its own
attempt, if it is of the kind that the survivors of that attempt dictate; and in no log and no file.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from secagg.masking.messages import ShareKind
from threat_model.scan.engine import Finding

PUBLIC: Final = {
    "secagg.coordinator.sessions:Sessions.create": "a session's id is told to everybody",
    "secagg.masking.server:describe": "a round's nonce is broadcast in its descriptor",
    "client_sdk.session:Session._encode": "the seed of c1 goes with its upload",
    "secagg.ckks.kernel:_c1_key": "the seed of c1, which openers are given",
    "derived/ckks-c1": "everybody who has the seed derives it",
    "secagg.ring.native:_agrees": "the key of a test vector",
    "secagg.ckks.keyring:seal_blob": "a salt stands before its blob",
}
"""Kinds of values that are drawn and told, and why."""


SILO_KILLED: Final = "silo-killed"
COORDINATOR_KILLED: Final = "coordinator-killed"
END: Final = "end"
"""Moments when everybody's disk is copied: in round 2, in round 3, after the last."""


@dataclass(frozen=True)
class Allowance:
    """Secrets that lie in a member's own files by design.

    Args:
        files: pattern below a member's directory; the secret must be one that its process had.
        kinds: patterns of kinds.
        why: for whoever reads this.
        rounds: where only updates of one round may lie: which, by the moment of the copy.
    """

    files: str
    kinds: tuple[str, ...]
    why: str
    rounds: Mapping[str, int] | None = None

    def covers(self, moment: str, path: str, entry: Entry) -> bool:
        """Whether a secret may be in a file as it was at a moment."""
        kinds = any(fnmatch.fnmatch(kind, k) for kind in entry.kinds for k in self.kinds)
        in_time = self.rounds is None or self.rounds.get(moment) in entry.update_of
        return kinds and in_time and fnmatch.fnmatch(path, self.files)


BY_DESIGN: Final = (
    Allowance(
        "*.key",
        ("secagg.pki.*", "secagg.crypto.sign:*"),
        "a member's own keys, readable by its user alone",
    ),
    Allowance(
        "state/sessions/*/update-*.safetensors",
        ("tensor", "weight", "metric"),
        "the silo's own update, until its round is over: what a restart submits again",
        {SILO_KILLED: 2, COORDINATOR_KILLED: 3},
    ),
    Allowance(
        "state/sessions/*/local-*.safetensors",
        ("model",),
        "the silo's own model in training, as long",
        {SILO_KILLED: 2, COORDINATOR_KILLED: 3},
    ),
    Allowance(
        "keys/*",
        ("secagg.ckks.keyring:*",),
        "the session's key, where the silo's policy names a directory for it",
    ),
)


@dataclass(frozen=True)
class Entry:
    """A secret value.

    Args:
        kinds: the functions that made it.
        owners: the processes that had it.
        share: of a share or its salt: whose, for whom, which, in which attempt.
        update_of: of an update: the rounds that it was for.
    """

    kinds: frozenset[str]
    owners: frozenset[str]
    share: dict[str, Any] | None
    update_of: frozenset[int] = frozenset()

    def __str__(self) -> str:
        """Who had it, and what it is: never the value."""
        of = self.share
        what = f" {of['share']} of {of['owner']} for {of['holder']}" if of is not None else ""
        return f"{', '.join(sorted(self.kinds))}{what} ({' '.join(sorted(self.owners))})"


@dataclass
class Drawn:
    """What the processes wrote down."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Drawn:
        """Read all records; one that a kill cut short was of nothing that went anywhere."""
        drawn = cls()
        for path in sorted(directory.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                drawn._take(json.loads(line))
        return drawn

    def _take(self, record: dict[str, Any]) -> None:
        if "survivors" in record:
            self.outcomes[_attempt(record)] = record
            return
        value = bytes.fromhex(record["value"])
        known = self.entries.get(value, Entry(frozenset(), frozenset(), None))
        self.entries[value] = Entry(
            known.kinds | {record["kind"]},
            known.owners | {record["who"]},
            known.share or (record if "share" in record else None),
            known.update_of | ({record["update_of"]} if "update_of" in record else set()),
        )

    def secrets(self, public: Iterable[str]) -> dict[bytes, Entry]:
        """All but what is public in every way that it was made."""
        kinds = set(public)
        return {value: entry for value, entry in self.entries.items() if not entry.kinds <= kinds}

    def reveals(self, holder: str, attempt: str, share: dict[str, Any]) -> bool:
        """Whether a holder's Unmasking message of an attempt has this share by design."""
        outcome = self.outcomes.get(attempt)
        if outcome is None or (share["holder"], _attempt(share)) != (holder, attempt):
            return False
        survived = share["owner"] in outcome["survivors"]
        dictated = ShareKind.SELF_SEED if survived else ShareKind.MASK_KEY
        return share["owner"] in outcome["dealers"] and share["share"] == dictated


def _attempt(record: dict[str, Any]) -> str:
    return f"{record['session']}-{record['round']}-{record['attempt']}"


def by_design(finding: Finding, entry: Entry, drawn: Drawn) -> bool:
    """Whether a secret may be where it was found."""
    place = finding.place
    if place.startswith("wire/request.Send.unmasking.") and entry.share is not None:
        *_, attempt, holder = place.split(".")
        return finding.form == "raw" and drawn.reveals(holder, attempt, entry.share)
    where, moment, name, path = (*place.split("/", 3), "", "", "")[:4]
    return (where, name in entry.owners) == ("disk", True) and any(
        rule.covers(moment, path, entry) for rule in BY_DESIGN
    )
