"""Does a test notice when a security check is gone? ``python -m tests.mutants`` asks of every one.

A check is marked where it stands, ``# CHECK: <name>``, and its mutant is the product without that
one statement. The suite runs once to see which check refuses something in which test. Then each
mutant meets these tests, quickest first, until one fails. No other test can notice: where a check
lets everything pass, its removal changes nothing.

Nothing on disk is changed: a hook on imports rewrites the marked modules as they are loaded, in
every process that a test starts, too (``hook``).
"""
