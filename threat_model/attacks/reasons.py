"""Reasons that are no error's code: what is seen where nothing is raised, and there is no gain.

Every other reason is a stable code of the product, or the name of gRPC's status where a handshake
or gRPC itself refused, before any code of ours ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

OBSERVED: Final[Mapping[str, str]] = {
    "aborted-before-reveal": "the attempt ended before anybody revealed, and the dealer is named",
    "box-sealed": "a box holds nothing that can be read without its key",
    "calls-equal": "all silos made the same calls",
    "certificate-has-expired": "TLS refused a certificate after its end",
    "certificate-is-not-yet-valid": "TLS refused a certificate before its begin",
    "complained": "a silo named the dealer whose box it could not open",
    "connection-closed": "the coordinator closed a connection that was one too many",
    "found-again": "what was acknowledged is there after a restart",
    "found-nowhere": "secrets were searched for, and are in none of the places",
    "dealer-blamed": "the attempt ended, and names the dealer of the wrong secret",
    "fresh-masks": "masks of two attempts do not cancel out",
    "handshake-closed": "the coordinator closed connections that did not become any",
    "key-space": "no key of the space that was searched opens it",
    "key-stands": "the session goes on under its key",
    "masked": "the difference of two uploads is noise",
    "one-share-is-none": "a single share gives no secret",
    "only-a-handshake": "to a server without TLS a silo said nothing but TLS' first message",
    "only-library-headers": "calls carry no header but gRPC's own",
    "only-listed-fields": "requests hold what is listed, and nothing else",
    "only-self-seeds": "nobody honest revealed a share of a survivor's mask key",
    "reset": "a stream was reset",
    "rounded": "a published sum says nothing of the noise",
    "sealed": "the weights are not in what was sent",
    "self-mask": "a mask stays on that nobody takes off",
    "sizes-equal": "all silos' messages have the same sizes",
    "sum-exact": "the sum is that of the survivors' updates, whatever one of them sent",
    "tls-handshake": "no handshake came about",
    "unable-to-get-local-issuer-certificate": "TLS found nobody it trusts who signed a certificate",
    "unsupported-certificate-purpose": "TLS refused a certificate that is for serving alone",
}
