"""Secrets neither print, pickle, copy nor hash, and no error text holds one."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import traceback
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import MaskPrg
from secagg.crypto import secret as module
from secagg.crypto.aead import open_once, seal_once
from secagg.crypto.kdf import derive
from secagg.crypto.keys import KeyPair
from secagg.crypto.prg import open_stream
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import PRIME, basis, parse_share, split
from secagg.crypto.sign import IdentityKey

BYTES = b"correct horse battery staple 123"
SECRET = Secret(BYTES)
MARKS = ("horse", BYTES.hex(), BYTES.hex().upper(), str(int.from_bytes(BYTES, "big")))


def silent(text: str) -> bool:
    return not any(mark in text for mark in MARKS)


def test_every_way_to_print_is_redacted() -> None:
    printed = [
        repr(SECRET),
        str(SECRET),
        f"{SECRET}",
        f"{SECRET!r}",
        f"{SECRET!a}",
        "%s %r" % (SECRET, SECRET),  # noqa: UP031
        "{}".format(SECRET),  # noqa: UP032
        str([SECRET]),
        str({"key": SECRET}),
    ]
    assert printed[:5] == ["Secret(<32 bytes>)"] * 5
    assert all(silent(text) for text in printed)


def test_a_dataclass_prints_its_secrets_redacted() -> None:
    for made in (KeyPair.from_private(SECRET), IdentityKey.from_private(SECRET)):
        assert silent(repr(made))
        assert "Secret(<32 bytes>)" in repr(made)


def test_a_log_line_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("test").warning("key %s %r", SECRET, SECRET)
    assert "Secret(<32 bytes>)" in caplog.text
    assert silent(caplog.text)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickling(protocol: int) -> None:
    for value in (SECRET, [SECRET], KeyPair.from_private(SECRET)):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(value, protocol)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_no_copying(copier: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="never pickled or copied"):
        copier(SECRET)
    with pytest.raises(TypeError, match="never pickled or copied"):
        dataclasses.asdict(KeyPair.from_private(SECRET))


@pytest.mark.parametrize(
    "leak",
    [
        pytest.param(hash, id="hash"),
        pytest.param(lambda s: {s}, id="set"),
        pytest.param(lambda s: {s: 1}, id="key"),
        pytest.param(vars, id="vars"),
        pytest.param(bytes, id="bytes"),
        pytest.param(iter, id="iter"),
        pytest.param(lambda s: s[0], id="index"),
        pytest.param(memoryview, id="memoryview"),
        pytest.param(json.dumps, id="json"),
        pytest.param(lambda s: f"{s:>40}", id="format spec"),
        pytest.param(lambda s: s + b"", id="concatenation"),
        pytest.param(lambda s: s < s, id="order"),
    ],
)
def test_no_other_way_to_the_bytes(leak: Callable[[Secret], object]) -> None:
    with pytest.raises(TypeError) as refused:
        leak(SECRET)
    assert silent(str(refused.value))


@given(st.binary(max_size=40), st.binary(max_size=40))
@settings(deadline=None)
def test_equality_is_that_of_the_bytes(a: bytes, b: bytes) -> None:
    assert (Secret(a) == Secret(b)) == (a == b)
    assert (Secret(a) != Secret(b)) == (a != b)
    assert Secret(a) == Secret(a)
    assert Secret(a).reveal() == a
    assert len(Secret(a)) == len(a)


def test_equality_takes_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *pair: compared.append(pair) or True)
    assert Secret(b"a") == Secret(b"b")
    assert compared == [(b"a", b"b")]


def test_bytes_are_never_equal_to_a_secret() -> None:
    assert SECRET != BYTES
    assert BYTES != SECRET
    assert repr(SECRET) != SECRET
    assert SECRET.__eq__(BYTES) is NotImplemented


def test_a_secret_does_not_change_with_its_source() -> None:
    source = bytearray(b"abc")
    kept = Secret(source)
    source[0] = 0
    assert kept.reveal() == b"abc"
    assert type(kept.reveal()) is bytes


SHORT, SHARE = Secret(BYTES[:31]), b"\xff" + BYTES
LINE = {  # two shares of 2^256, which is no secret; the first one is the secret's bytes
    1: Secret(b"\0" + BYTES),
    2: Secret(((2 * int.from_bytes(BYTES, "big") - 2**256) % PRIME).to_bytes(33, "big")),
}


@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(lambda: KeyPair.from_private(SHORT), id="x25519 size"),
        pytest.param(lambda: KeyPair.from_private(SECRET).agree(bytes(32)), id="x25519 low order"),
        pytest.param(lambda: IdentityKey.from_private(SHORT), id="ed25519 size"),
        pytest.param(lambda: seal_once(SHORT, BYTES, b""), id="seal key size"),
        pytest.param(lambda: open_once(SECRET, BYTES, BYTES), id="open"),
        pytest.param(lambda: open_stream(MaskPrg.AES_128_CTR, SECRET), id="aes key size"),
        pytest.param(lambda: open_stream(MaskPrg.CHACHA20, SHORT), id="chacha key size"),
        pytest.param(
            lambda: derive(SECRET, salt=b"", label="", parties=(), size=9999), id="hkdf size"
        ),
        pytest.param(
            lambda: split(SHORT, threshold=1, holders=1, entropy=bytes), id="shamir secret size"
        ),
        pytest.param(
            lambda: split(SECRET, threshold=2, holders=1, entropy=bytes), id="shamir threshold"
        ),
        pytest.param(lambda: parse_share(SHARE), id="share"),
        pytest.param(lambda: basis((1, 2)).combine(LINE), id="combination"),
        pytest.param(lambda: pickle.dumps(SECRET), id="pickle"),
    ],
)
def test_no_error_tells_a_secret(fail: Callable[[], object]) -> None:
    with pytest.raises(Exception) as failed:  # noqa: PT011
        fail()
    told = [repr(failed.value), str(failed.value), repr(failed.value.args)]
    told += traceback.format_exception(failed.value)
    assert all(silent(text) for text in told)
