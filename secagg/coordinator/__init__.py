"""The coordinator: a shell around the protocol core.

    settings    what an operator configures
    session     one session as a state machine: tasks, readiness, attempts, results; time comes in
    spool       uploads on disk, and the store of signed sums
    driver      runs a session by the monotonic clock, wakes those who wait
    identity    who is calling, from the peer certificate alone
    status      errors to gRPC status codes; the only file here that knows them
    servicer    the wire contract's methods
    tls         server credentials that follow the files on disk
    server      puts it together

Nothing in here is trusted by a silo. A coordinator that misbehaves can refuse service or publish a
wrong sum; it cannot read an update.
"""
