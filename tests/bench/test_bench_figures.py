"""From what was recorded to a figure: ratios, text, the README's table, the plot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from secagg.cli.measured import Measured, bytes_text, ratio_text, time_text

from .conftest import document, one


def test_a_result_is_what_was_recorded() -> None:
    first, second, third = document(
        one("a", 2.0, 0.5, headline="masks", upload=7),
        one("b", 1.0, seconds=0.25),  # what was timed held more than the work
        one("c", 1.0, ratio_to_floor=0.9, params=None),  # of rates: no floor's time beside it
    ).results
    assert (first.ratio_to_floor, first.headline, first.more) == (4.0, "masks", {"upload": 7})
    assert (second.seconds, second.floor, second.ratio_to_floor) == (0.25, None, None)
    assert (third.ratio_to_floor, third.more, third.params) == (None, {"ratio_to_floor": 0.9}, {})
    assert first.case == "a"


def test_the_document_reads_back() -> None:
    made = document(one("a", 2.0, 0.5, steps={"seal": [1, 2.5]}), one("b", 1.0))
    assert Measured.from_json(made.to_json(), "x") == made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1234.0, "1234 s"), (1.5, "1.5 s"), (2.5e-3, "2.5 ms"), (3e-6, "3 µs"), (4.5e-8, "45 ns")],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_ratios_in_words() -> None:
    assert [ratio_text(ratio) for ratio in (0.377, 4.712, 20.92, 234.5)] == [
        *("0.38×", "4.71×", "20.9×", "234×")
    ]


def test_bytes_in_words() -> None:
    sizes = [None, 999, 4_100_000, 2_500_000_000]
    assert [bytes_text(size) for size in sizes] == ["", "< 1 MB", "4 MB", "2.50 GB"]


def benchmark(seconds: float) -> Any:
    stats = SimpleNamespace(stats=SimpleNamespace(min=seconds))
    return SimpleNamespace(extra_info={}, stats=stats)


def test_what_is_recorded() -> None:
    from benchmarks.measure import record

    fixture = benchmark(3.0)
    record(fixture, floor="memcpy", floor_seconds=2.0, elements=10**9, upload=7, headline="x")
    assert fixture.extra_info == {
        "seconds": 3.0,
        "floor": "memcpy",
        "floor_seconds": 2.0,
        "ratio_to_floor": 1.5,
        "elements": 10**9,
        "ns_per_element": 3.0,
        "peak_bytes": None,
        "upload": 7,
        "headline": "x",
    }
    fixture = benchmark(3.0)
    record(fixture, floor="memcpy", floor_seconds=2.0, elements=10**9, seconds=1.0)
    assert (fixture.extra_info["seconds"], fixture.extra_info["ratio_to_floor"]) == (1.0, 0.5)


def test_the_floor_runs_in_turn_with_the_work() -> None:
    from benchmarks.floors import Floor
    from benchmarks.measure import measure

    events: list[str] = []

    def pedantic(work: Any, setup: Any, rounds: int) -> str:
        for _ in range(rounds):
            setup()
            result = work()
        return str(result)

    def work() -> str:
        events.append("work")
        return "done"

    fixture = benchmark(1.0)
    fixture.pedantic = pedantic
    floor = Floor("a floor", lambda: events.append("floor"))
    result = measure(
        fixture, work, floor, elements=1, rounds=2, fresh=lambda: events.append("fresh")
    )
    assert result == "done"
    assert events == ["fresh", "floor", "work"] * 2
    events.clear()
    measure(fixture, work, floor, elements=1)
    assert len(events) >= 2 * (3 + 1)  # three rounds and the first that does not count


def test_the_peak_is_above_what_was_there() -> None:
    from benchmarks.measure import PeakMemory

    held = np.ones(2**23)
    with PeakMemory() as peak:
        scratch = held.copy()
        del scratch
    if peak.bytes is None:
        pytest.skip("this kernel lets nobody reset the peak")
    assert 60 * 2**20 < peak.bytes < 80 * 2**20  # one copy of 64 MiB, and it alone


def test_names_of_cases() -> None:
    from benchmarks.cases import label, sweep

    assert [label(v) for v in (16, 1000, 10**4, 10**8, 12345, "ckks")] == [
        *("16", "1000", "1e4", "1e8", "12345", "ckks")
    ]
    assert [case.id for case in sweep("d", [10**5, 7]).args[1]] == ["d=1e5", "d=7"]


def test_the_floors_do_what_they_say() -> None:
    from benchmarks import floors
    from secagg.config import MaskPrg
    from secagg.ring.vectors import PowerRing

    for made in (
        *(floors.keystream(prg, size, 2) for prg in MaskPrg for size in (5, 300_000)),
        floors.addition(PowerRing(16), 100, 3),
        floors.copy(100, 2),
        floors.small_products(10),
        floors.wide_products(10),
        floors.together(floors.verifications(2), floors.copy(10)),
    ):
        made.run()
        assert made.name


def test_the_table_holds_the_headlines() -> None:
    from benchmarks.table import insert, markdown

    peer = {"peer": "TenSEAL", "peer_seconds": 8.0, "speedup": 4.0}
    made = markdown(
        document(one("a", 2.0, 0.5, headline="sealing", **peer), one("b", 1.0, 1.0), one("c", 1.0))
    )
    rows = [line for line in made.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| sealing | 2 s | 2 µs | 4.00× memcpy; 4× faster than TenSEAL | 5 MB |",
    ]
    assert made.endswith("2026-01-02, a cpu, 2 cores; path openssl; numpy 2.")
    text = "before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n"
    written = insert(text, made)
    assert written == f"before\n<!-- bench:start -->\n{made}\n<!-- bench:end -->\nafter\n"
    assert insert(written, made) == written
    with pytest.raises(ValueError, match="headline"):
        markdown(document(one("b", 1.0, 1.0)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- bench:start -->",
        "<!-- bench:end --> <!-- bench:start -->",
        "<!-- bench:start --> <!-- bench:end --> <!-- bench:end -->",
    ],
)
def test_a_document_without_its_markers_is_left_alone(text: str, tmp_path: Path) -> None:
    from benchmarks.table import main

    source, target = tmp_path / "results.json", tmp_path / "README.md"
    source.write_text(document(one("a", 2.0, 0.5, headline="sealing")).to_json())
    target.write_text(text)
    with pytest.raises(ValueError, match="bench:start"):
        main(str(source), str(target))
    assert target.read_text() == text


def test_the_table_goes_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.table import main

    source, target = tmp_path / "results.json", tmp_path / "README.md"
    source.write_text(document(one("a", 2.0, 0.5, headline="sealing")).to_json())
    target.write_text("<!-- bench:start -->\n<!-- bench:end -->\n")
    main(str(source), str(target))
    assert "| sealing | 2 s |" in target.read_text()
    main(str(source))
    assert capsys.readouterr().out.strip() in target.read_text()


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw, rounds

    made = document(
        *(
            one(f"round[n={n}-d={d}]", n * d * 2e-8, n * d * 1e-8, group="round", params=params)
            for n in (4, 16)
            for d in (10**5, 10**6)
            for params in [{"n": n, "d": d}]
        ),
        one("a", 1.0, 1.0),
    )
    assert [(one.n, one.d) for one in rounds(made)][:2] == [(4, 10**5), (4, 10**6)]
    for name in ("plot.png", "plot.svg"):
        draw(made, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ValueError, match="no round"):
        rounds(document(one("a", 1.0, 1.0)))
