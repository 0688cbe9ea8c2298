"""The benchmark suite: every cost beside a floor that was measured in the same minute.

Machines are shared and drift, so absolute times mean little. Each benchmark names a floor, the
least that any implementation would have to do (the keystream alone, the addition alone, the copy
alone), and ``measure.measure`` runs the two in turn. The ratio of their least times is what is
kept, compared and published; times stand beside it. Results are checked: a fast wrong sum fails.

    floors      what the floors are
    measure     a benchmark and its floor in turn, with the peak of memory
    memory      a process's resident memory
    stage       a consortium, and its session up to masked vectors
    cases       which sizes run always and which (``full``) are left out of --quick
    conftest    one core, --quick, --group, what was skipped
    table       the README's table from the JSON; a benchmark with a ``headline`` has a row in it
    plot        cost of a round against n and d from the JSON

``secagg bench`` runs all of it (``secagg/cli/bench.py``). pytest needs the repository's root on its
path: ``python -m pytest benchmarks --benchmark-only``.
"""
