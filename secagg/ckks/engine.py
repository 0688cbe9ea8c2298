"""The one module that touches TenSEAL: SEAL's number-theoretic transform and its decoder.

What leaves SEAL are residues mod q, read out of its files (``formats``), which pass through memory
alone. Parameters are rebuilt from the suite: nothing is ever loaded that came over a wire but
residues, checked to be residues.

SEAL's encoder and encryptor are not on the way in: they draw a second uniform polynomial, take
values as Python objects, and give no buffer, which is half of the time (threat_model/decisions/0008
has the figures). Two polynomials of coefficients are loaded as if they were a ciphertext,
transformed together, and read out; so is the key, once. On the way out, SEAL decodes.

Any process of the same user can open the memory that files pass through, where the process can be
dumped (a worker cannot, ``worker``). It holds the key or a message for as long as one call takes,
and nothing afterwards. A forked process shares it: two that sealed at once would send one message
and noise under two halves c1, which is the key. So a fork is refused (``Home``).

The library is imported when an engine is made, not before: a coordinator needs none.
"""

from __future__ import annotations

import importlib
import os
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.ckks.formats import VERSION, PairFormat, before_plaintext
from secagg.encoding.layout import Reals
from secagg.errors import ConfigError, MalformedMessage, OutOfOrder
from secagg.ring.vectors import PRIME_BITS, Vector
from secagg.suite import Parameters, Suite

_EXTRA: Final = "pip install 'secagg[ckks]'"


def require() -> Any:
    """Import what the engine needs: for a silo to call before a round starts.

    Returns:
        The module ``tenseal.sealapi``.

    Raises:
        ConfigError: TenSEAL or zstandard is not installed or cannot be loaded.
    """
    try:
        importlib.import_module("zstandard")
        return importlib.import_module("tenseal.sealapi")
    except ImportError as error:
        raise ConfigError(
            "extra-missing", f"Homomorphic encryption needs {error.name or 'TenSEAL'}.", _EXTRA
        ) from None


class Home:
    """The process that something was made in.

    A process that is forked from it shares its memory files and pipes, and has none of its threads:
    locks may be held for ever, and what it would wait for never ends.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this is another process."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Return if this is the process; to be called before any lock is taken.

        Raises:
            OutOfOrder: ``forked``.
        """
        if self.left:  # CHECK: forked
            raise OutOfOrder(
                "forked",
                "A sealer is used in a process that was forked from the one that made it.",
                "Make a sealer in each process, after the fork.",
            )


class Engine:
    """Transforms coefficients, and decodes, under one set of parameters.

    Not for two threads at once: there is one buffer.

    Args:
        suite: the parameters.

    Raises:
        ConfigError: the library is missing, or is one whose primes or files are others.
    """

    def __init__(self, suite: Suite) -> None:
        seal, numbers = require(), suite.parameters
        self.home = Home()
        self._modulus = numbers.modulus
        self._context = _context(seal, numbers)
        self._encoder = seal.CKKSEncoder(self._context)
        self._evaluator = seal.Evaluator(self._context)
        self._plaintext, self._ciphertext = seal.Plaintext(), seal.Ciphertext()
        parms_id = tuple(self._context.first_parms_id())
        self._before_plaintext = before_plaintext(numbers.degree, parms_id, numbers.scale)
        self._pair = PairFormat(numbers.degree, numbers.modulus, parms_id, numbers.scale)
        self._before_pair = self._pair.before_words()
        self._file = os.memfd_create("secagg-ckks")
        weakref.finalize(self, os.close, self._file)
        self._path = f"/proc/self/fd/{self._file}"

    def encoded_secret(self, secret: npt.NDArray[np.int8]) -> Vector:
        """Return s in the NTT domain.

        Args:
            secret: N coefficients in {−1, 0, 1}, not all of them 0.

        Returns:
            N residues.

        Raises:
            ConfigError: the library's files are none that this version reads.
        """
        coefficients = secret.astype(np.int64)
        coefficients += (coefficients >> 63) & self._modulus
        pair = np.stack([coefficients, coefficients]).view(np.uint64)
        try:
            residues: Vector = self.transform(pair)[0].copy()
        except (MalformedMessage, RuntimeError) as error:  # SEAL's own, of a file's version
            raise ConfigError(
                "ckks-library",
                f"TenSEAL's files are not those of SEAL {VERSION[0]}.{VERSION[1]}: {error}",
                _EXTRA,
            ) from None
        return residues

    def transform(self, pair: Vector) -> Vector:
        """Return two polynomials in the NTT domain.

        Args:
            pair: shape (2, N), contiguous: coefficients mod q, the second polynomial not zero.

        Returns:
            Shape (2, N): residues in SEAL's order, read-only.

        Raises:
            OutOfOrder: ``forked``.
        """
        self.home.check()  # CHECK: forked-transform
        try:
            os.pwritev(self._file, [self._before_pair, pair.data], 0)
            self._ciphertext.load(self._context, self._path)
            self._evaluator.transform_to_ntt_inplace(self._ciphertext)
            self._ciphertext.save(self._path)  # Zstandard adds 1/256 and a few bytes at most
            data = os.pread(self._file, self._pair.body_size * 9 // 8, 0)
        finally:
            os.ftruncate(self._file, 0)
        residues: Vector = self._pair.read(data).reshape(pair.shape)
        return residues

    def decode(self, residues: Vector, out: Reals) -> None:
        """Write the slots of a polynomial.

        Args:
            residues: N words below q, contiguous, in the NTT domain, at the suite's scale.
            out: N float64: the real and imaginary parts of N/2 slots in turn.

        Raises:
            OutOfOrder: ``forked``.
        """
        self.home.check()  # CHECK: forked-decode
        try:
            os.pwritev(self._file, [self._before_plaintext, residues.data], 0)
            self._plaintext.load(self._context, self._path)
        finally:
            os.ftruncate(self._file, 0)
        slots = self._encoder.decode_complex(self._plaintext)
        out[:] = np.fromiter(slots, np.complex128, len(out) // 2).view(np.float64)


def _context(seal: Any, numbers: Parameters) -> Any:
    """Build SEAL's context, with its check for 128-bit security.

    Raises:
        ConfigError: SEAL would choose another prime, or holds the parameters for insecure.
    """
    primes = seal.CoeffModulus.Create(numbers.degree, [PRIME_BITS])
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(numbers.degree)
    parameters.set_coeff_modulus(primes)
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    # CHECK: seal-security
    if [prime.value() for prime in primes] != [numbers.modulus] or not context.parameters_set():
        raise ConfigError(
            "ckks-parameters",
            f"SEAL refuses N = {numbers.degree} with q = {numbers.modulus}: "
            f"{context.parameters_error_name()}.",
            _EXTRA,
        )
    return context
