"""The consortium's authority, and what each member holds from it.

One offline ECDSA P-256 key certifies every TLS key and signs the manifest of identity keys, so a
member has one trust anchor and one fingerprint to compare. The coordinator never holds that key:
it can neither add a silo nor swap a silo's identity key.

    names          who a certificate speaks for, and how strictly that is read
    certificates   X.509 as this product makes it and checks it
    manifest       the signed membership, which never goes back to an older version
    enrolment      request (made where the keys stay) and bundle (what the authority returns);
                   ``request`` has the request's own checks, ``keys`` the P-256 keys
    authority      the offline directory that approves and revokes
    credentials    what a running process loads, with every check
    profile        the files beside the keys that an operator edits
    documents      strict JSON; ``files``: private files, written atomically

Time is an argument everywhere in here; the command line and the shells read the clock.
"""
