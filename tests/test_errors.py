"""Every error says who is to blame, has a stable code, and survives a trip between processes."""

from __future__ import annotations

import pickle

import pytest

from secagg import errors
from secagg.errors import (
    Conflict,
    FaultyClient,
    FaultyClientOrServer,
    RoundAborted,
    SecaggError,
)

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SecaggError)
]
PLAIN = [
    kind
    for kind in CLASSES
    if not issubclass(kind, FaultyClient | FaultyClientOrServer | RoundAborted)
]
NAMING = [FaultyClient, Conflict, FaultyClientOrServer]


def test_the_taxonomy() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert names >= {
        "ConfigError",
        "OutOfOrder",
        "FaultyClient",
        "FaultyServer",
        "FaultyClientOrServer",
        "TooLate",
        "RoundAborted",
        "MalformedMessage",
    }
    assert all(kind.__doc__ for kind in CLASSES)


def test_blame_is_never_widened_by_inheritance() -> None:
    """Catching one party's class never catches another's; only a conflict is a faulty client."""
    for kind in CLASSES:
        parents = [other for other in CLASSES if other is not kind and issubclass(kind, other)]
        assert parents == ([] if kind is SecaggError else [SecaggError]) + (
            [FaultyClient] if kind is Conflict else []
        )


@pytest.mark.parametrize("kind", PLAIN)
def test_code_observed_and_remedy(kind: type[SecaggError]) -> None:
    error = kind("some-code", "This was seen.", "Do that.")
    assert (error.code, error.observed, error.remedy) == ("some-code", "This was seen.", "Do that.")
    assert str(error) == "[some-code] This was seen. Do that."
    assert str(kind("some-code", "This was seen.")) == "[some-code] This was seen."


@pytest.mark.parametrize("kind", NAMING)
def test_a_blamed_client_is_named(kind: type[FaultyClient | FaultyClientOrServer]) -> None:
    error = kind("clinic-b", "signature", "It does not verify.", "Look at it.")
    assert error.client == "clinic-b"
    assert (error.code, error.observed, error.remedy) == (
        "signature",
        "It does not verify.",
        "Look at it.",
    )
    assert str(error) == "[signature] It does not verify. Look at it."
    assert str(kind("clinic-b", "signature", "No.")) == "[signature] No."


def test_an_aborted_round_says_where_and_how_far() -> None:
    error = RoundAborted("masked_input", 2, 3)
    assert (error.phase, error.have, error.need) == ("masked_input", 2, 3)
    assert (error.code, error.blamed, error.because) == ("round-aborted", (), "")
    assert error.observed == "The attempt ended in masked_input: 2 of 3 needed."
    assert error.remedy
    told = RoundAborted("share_keys", 1, 3, blamed=("b",), because="Shares were missing.")
    assert told.blamed == ("b",)
    assert told.because == "Shares were missing."
    assert told.observed == "The attempt ended in share_keys: 1 of 3 needed. Shares were missing."


@pytest.mark.parametrize(
    "error",
    [
        *(kind("code", "Seen.", "Do.") for kind in PLAIN),
        *(kind("clinic-b", "code", "Seen.", "Do.") for kind in NAMING),
        RoundAborted("unmasking", 2, 5, blamed=("a", "b"), because="Why."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_is_lost_between_processes(error: SecaggError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert str(back) == str(error)
