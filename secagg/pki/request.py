"""An enrolment request, with proof that its maker holds both keys.

The certificate signing request names the member's URI and is signed by the TLS key; the identity
key signs (member, CSR). Neither proves who sent it: the admin compares the request's fingerprint,
which covers both keys, with its maker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ConfigDict

from secagg.crypto.labels import SIGN_ENROLMENT, digest, enc
from secagg.crypto.sign import KEY_BYTES, verify
from secagg.errors import ConfigError, CredentialError, MalformedMessage
from secagg.pki.credentials import Keys
from secagg.pki.documents import STRICT, decode, encode
from secagg.pki.keys import grouped, load_key, p256_public, public_der
from secagg.pki.names import Identity, Role, parse_uri

FORMAT: Final = "secagg/1/request"
# Encodings of points of order 1, 2, 4 and 8, without the sign bit. Signatures under such a key
# verify for one message in eight or more without a private key, so they prove no possession.
# OpenSSL accepts them. Source: Chalkias et al., "Taming the many EdDSAs" (ePrint 2020/1244).
_P: Final = 2**255 - 19
_Y_OF_ORDER_8: Final = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_LOW_ORDER: Final = frozenset({0, 1, _P - 1, _P, _P + 1, _Y_OF_ORDER_8, _P - _Y_OF_ORDER_8})
_AGAIN: Final = "Make the request again with `secagg silo request`."


@dataclass(frozen=True, slots=True)
class RequestFile:
    """A request as JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: Literal["secagg/1/request"]
    consortium: str
    role: Role
    name: str
    csr: str
    identity_key: bytes | None
    signature: bytes | None


@dataclass(frozen=True, slots=True)
class Request:
    """A member's wish to be certified; one that exists has both its proofs of possession.

    Args:
        role: what it wants to be.
        name: what it wants to be called.
        consortium: where.
        csr_pem: PKCS #10 for a P-256 key, naming the member's URI.
        identity_key: 32-byte Ed25519 public key; None for an admin.
        signature: by the identity key; None for an admin.

    Raises:
        CredentialError: ``request-name``, ``request-malformed`` or ``request-signature``.
    """

    role: Role
    name: str
    consortium: str
    csr_pem: bytes
    identity_key: bytes | None
    signature: bytes | None

    def __post_init__(self) -> None:
        csr = _load_csr(self.csr_pem)
        if _csr_identity(csr) != self.identity:  # CHECK: request-name
            raise CredentialError(
                "request-name", "The CSR and the request name different members.", _AGAIN
            )
        if not csr.is_signature_valid:  # CHECK: csr-signature
            raise _unproven("TLS")
        if (self.identity_key is None) != (self.role is Role.ADMIN):  # CHECK: request-role
            raise _malformed("an identity key, for a silo or coordinator only")
        self._check_identity_key()  # CHECK: request-identity-key

    @classmethod
    def make(cls, identity: Identity, keys: Keys) -> Request:
        """Ask for a certificate for ``keys``, which stay where they are."""
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)]))
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]),
                critical=False,
            )
            .sign(load_key(keys.tls), hashes.SHA256())
        )
        csr_pem = csr.public_bytes(serialization.Encoding.PEM)
        public = signature = None
        if keys.identity is not None:
            public = keys.identity.public
            signed = _possession(identity, public)
            signature = keys.identity.sign(SIGN_ENROLMENT, signed, csr_pem)
        return cls(identity.role, identity.name, identity.consortium, csr_pem, public, signature)

    @property
    def identity(self) -> Identity:
        """Who the maker wants to be."""
        try:
            return Identity(self.consortium, self.role, self.name)
        except ConfigError as error:
            raise CredentialError("request-name", error.observed, error.remedy) from None

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The TLS key to certify."""
        return p256_public(_load_csr(self.csr_pem))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both public keys, in groups of four hex digits: the same at renewal."""
        return grouped(
            digest(SIGN_ENROLMENT, public_der(self.public_key), self.identity_key or b"")
        )

    def to_json(self) -> bytes:
        """The file's bytes."""
        return encode(
            RequestFile(
                format=FORMAT,
                consortium=self.consortium,
                role=self.role,
                name=self.name,
                csr=self.csr_pem.decode(),
                identity_key=self.identity_key,
                signature=self.signature,
            )
        )

    @classmethod
    def from_json(cls, data: bytes) -> Request:
        """Read a file.

        Raises:
            CredentialError: ``request-malformed``, ``request-name`` or ``request-signature``.
        """
        file = decode(RequestFile, data, code="request-malformed", what="enrolment request")
        return cls(
            role=file.role,
            name=file.name,
            consortium=file.consortium,
            csr_pem=file.csr.encode(),
            identity_key=file.identity_key,
            signature=file.signature,
        )

    def _check_identity_key(self) -> None:
        if self.identity_key is None or self.signature is None:
            if self.identity_key is not self.signature:  # CHECK: request-signature-given
                raise _malformed("a signature exactly if it has an identity key")
            return
        if len(self.identity_key) != KEY_BYTES:  # CHECK: request-identity-key-size
            raise _malformed(f"an identity key of {KEY_BYTES} bytes")
        # CHECK: request-low-order
        if int.from_bytes(self.identity_key, "little") % 2**255 in _LOW_ORDER:
            raise _unproven("identity")
        signed = _possession(self.identity, self.identity_key)
        try:
            # CHECK: request-signature
            verify(self.identity_key, SIGN_ENROLMENT, signed, self.csr_pem, self.signature)
        except MalformedMessage:
            raise _unproven("identity") from None


def _possession(identity: Identity, public: bytes) -> bytes:
    return enc(identity.uri.encode(), public)


def _load_csr(pem: bytes) -> x509.CertificateSigningRequest:
    try:
        csr = x509.load_pem_x509_csr(pem)
        p256_public(csr)  # CHECK: csr-p256
    except (ValueError, x509.InvalidVersion, CredentialError):
        raise _malformed("a CSR for a P-256 key") from None
    return csr


def _csr_identity(csr: x509.CertificateSigningRequest) -> Identity:
    try:
        names = list(csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (
        ValueError,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ):
        raise _malformed("a CSR with one SAN") from None
    # CHECK: csr-names
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        raise _malformed("a CSR with one SAN, a URI")
    try:
        return parse_uri(names[0].value)
    except CredentialError as error:
        raise CredentialError("request-name", error.observed, _AGAIN) from None


def _malformed(expected: str) -> CredentialError:
    return CredentialError("request-malformed", f"An enrolment request has {expected}.", _AGAIN)


def _unproven(key: str) -> CredentialError:
    return CredentialError(
        "request-signature",
        f"The request does not prove that its maker holds the {key} key.",
        "It was changed on the way. " + _AGAIN,
    )
