"""The data sets' exact facts, and that nothing but the pinned files is ever used."""

from __future__ import annotations

import http.client
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from secagg.config import is_name
from secagg.demo import data
from secagg.demo.data import Dataset, load, parse_site, standardiser, statistics
from secagg.errors import ConfigError, InputError

BESIDE = Path(__file__).parents[3] / "shared" / "data" / "heart"
HEART = Path(os.environ.get("SECAGG_HEART_DATA", BESIDE))
SITES = tuple(data.HEART_SITES.values())
needs_heart = pytest.mark.skipif(
    not (HEART / "processed.va.data").is_file(),
    reason="UCI Heart Disease is not here; name its directory in SECAGG_HEART_DATA",
)
BOTH = ["breast-cancer", pytest.param("heart", marks=needs_heart)]


def loaded(name: str, seed: int = 0) -> Dataset:
    return load(name, seed=seed, data_dir=HEART if name == "heart" else None)


def no_fetch(url: str) -> bytes:
    raise AssertionError(f"fetched {url}")


def from_heart(url: str) -> bytes:
    return (HEART / url.rpartition("/")[2]).read_bytes()


def all_rows(dataset: Dataset) -> list[bytes]:
    return sorted(
        row.tobytes()
        for silo in dataset.silos
        for x, y in ((silo.x_train, silo.y_train), (silo.x_test, silo.y_test))
        for row in np.column_stack([x, y])
    )


def everything(dataset: Dataset) -> np.ndarray:
    return np.concatenate([dataset.union_train()[0], dataset.union_test()[0]])


def rounded(part: dict[str, np.ndarray], bits: int) -> dict[str, np.ndarray]:
    """Statistics as an encoding keeps them that has ``bits`` for the fraction of the bound."""
    resolution = data.STATISTICS_BOUND * 2.0**-bits
    return {name: np.round(value / resolution) * resolution for name, value in part.items()}


@needs_heart
def test_heart_has_740_complete_rows_of_13_features() -> None:
    dataset = loaded("heart")
    assert dataset.names == ("cleveland", "hungary", "switzerland", "va")
    rows = [len(silo.y_train) + len(silo.y_test) for silo in dataset.silos]
    assert rows == [303, 261, 46, 130]
    assert sum(rows) == 740
    assert [len(silo.y_train) for silo in dataset.silos] == [200, 173, 31, 86]
    assert dataset.features == len(data.HEART_FEATURES) == 13


@needs_heart
def test_parsed_rows_are_raw() -> None:
    x, y = parse_site((HEART / "processed.cleveland.data").read_text("ascii"))
    assert x.dtype == y.dtype == np.float64
    assert x[0].tolist() == [63, 1, 145, 233, 1, 150, 0, 2.3, 0, 0, 0, 0, 1]
    assert y[:3].tolist() == [0, 1, 1]
    assert y.sum() == 139


def test_breast_cancer_has_all_rows_and_every_silo_enough() -> None:
    for seed in range(20):
        dataset = loaded("breast-cancer", seed)
        rows = [len(silo.y_train) + len(silo.y_test) for silo in dataset.silos]
        assert sum(rows) == 569
        assert min(rows) >= data.MINIMUM_ROWS
        assert min(len(silo.y_test) for silo in dataset.silos) >= 9
        malignant = sum(silo.y_train.sum() + silo.y_test.sum() for silo in dataset.silos)
        assert malignant == 212
    assert dataset.features == 30


@pytest.mark.parametrize("name", BOTH)
def test_the_seed_decides_the_split(name: str) -> None:
    first, again, other = loaded(name, 3), loaded(name, 3), loaded(name, 4)
    for one, two in zip(first.silos, again.silos, strict=True):
        np.testing.assert_array_equal(one.x_train, two.x_train)
        np.testing.assert_array_equal(one.y_test, two.y_test)
    assert not np.array_equal(first.union_test()[0][:9], other.union_test()[0][:9])
    assert all_rows(first) == all_rows(other)


@pytest.mark.parametrize("name", BOTH)
def test_the_split_is_stratified_and_complete(name: str) -> None:
    dataset = loaded(name)
    assert all(map(is_name, dataset.names))
    assert len(dataset.union_train()[1]) + len(dataset.union_test()[1]) == len(all_rows(dataset))
    for silo in dataset.silos:
        assert dataset.silo(silo.name) is silo
        for label in (0, 1):
            train, test = np.sum(silo.y_train == label), np.sum(silo.y_test == label)
            assert train == round(0.66 * (train + test))


def test_a_cut_deals_every_row_once() -> None:
    x = np.arange(50.0)[:, np.newaxis]
    y = (np.arange(50) % 3 == 0).astype(np.float64)
    cut = data._cut("silo-1", x, y, np.random.default_rng(1))
    train, test = set(cut.x_train[:, 0]), set(cut.x_test[:, 0])
    assert not train & test
    assert train | test == set(range(50))
    np.testing.assert_array_equal(cut.y_train, cut.x_train[:, 0] % 3 == 0)
    np.testing.assert_array_equal(cut.y_test, cut.x_test[:, 0] % 3 == 0)


def test_a_missing_value_drops_its_row_unless_its_column_is_dropped() -> None:
    x, y = parse_site(
        "28,1,2,130,132,0,2,185,0,0,?,?,?,0\n"
        "29,1,2,140,?,0,0,170,0,0,1,0,3,1\n"
        "60,0,1,140,0,1,1,120,1,-.5,2,?,?,3\n"
    )
    assert x.tolist() == [
        [28, 1, 130, 132, 0, 185, 0, 0, 1, 0, 0, 0, 1],
        [60, 0, 140, 0, 1, 120, 1, -0.5, 0, 0, 0, 1, 0],
    ]
    assert y.tolist() == [0, 1]


@pytest.mark.parametrize("text", ["1,2,3\n", "28,1,2,130,x,0,2,185,0,0,?,?,?,0\n"])
def test_a_row_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"14 columns|could not convert"):
        parse_site(text)


def test_no_row_at_all_still_has_13_features() -> None:
    x, y = parse_site("")
    assert (x.shape, y.shape) == ((0, 13), (0,))


def test_a_changed_file_is_refused_by_name(tmp_path: Path) -> None:
    for site in SITES:
        (tmp_path / f"processed.{site}.data").write_text("28,1,2,130,132,0,2,185,0,0,?,?,?,0\n")
    with pytest.raises(ConfigError, match=r"processed\.cleveland\.data.*SHA-256") as refused:
        load("heart", seed=0, data_dir=tmp_path, fetch=no_fetch)
    assert refused.value.code == "heart-digest"
    assert "--data-dir" in refused.value.remedy


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"processed\.cleveland\.data cannot be read") as refused:
        load("heart", seed=0, data_dir=tmp_path, fetch=no_fetch)
    assert refused.value.code == "heart-file"


@needs_heart
def test_fetched_files_are_cached_and_a_damaged_one_is_fetched_again(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    urls: list[str] = []

    def fetch(url: str) -> bytes:
        urls.append(url)
        return from_heart(url)

    first = load("heart", seed=0, cache_dir=cache, fetch=fetch)
    assert urls == [
        "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease"
        f"/processed.{site}.data"
        for site in SITES
    ]
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        f"processed.{site}.data" for site in SITES
    )
    again = load("heart", seed=0, cache_dir=cache, fetch=no_fetch)
    np.testing.assert_array_equal(first.union_test()[0], again.union_test()[0])
    (cache / "processed.va.data").write_bytes(b"")
    load("heart", seed=0, cache_dir=cache, fetch=fetch)
    assert len(urls) == 5


def test_a_fetched_file_that_is_not_the_pinned_one_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load("heart", seed=0, cache_dir=tmp_path, fetch=lambda url: b"<html>moved</html>")
    assert refused.value.code == "heart-digest"
    assert list(tmp_path.iterdir()) == []


def test_a_fetch_reads_no_more_than_a_mebibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert timeout > 0
        return io.BytesIO(bytes(2**21))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert len(data.fetch_https("https://example.org/")) == 2**20


@pytest.mark.parametrize("failure", [OSError("no route"), http.client.IncompleteRead(b"")])
def test_a_failed_download_says_what_to_do(tmp_path: Path, failure: Exception) -> None:
    def fetch(url: str) -> bytes:
        raise failure

    with pytest.raises(ConfigError, match="--data-dir") as refused:
        load("heart", seed=0, cache_dir=tmp_path, fetch=fetch)
    assert refused.value.code == "heart-download"


@needs_heart
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError) as refused:
        load("heart", seed=0, cache_dir=tmp_path / "file", fetch=from_heart)
    assert refused.value.code == "heart-cache"


@pytest.mark.parametrize(("name", "directory"), [("iris", None), ("breast-cancer", Path())])
def test_a_choice_that_cannot_be_right_is_refused(name: str, directory: Path | None) -> None:
    with pytest.raises(ConfigError) as refused:
        load(name, seed=0, data_dir=directory)
    assert refused.value.code == "demo-data"


def test_the_extra_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'secagg\[demo\]'") as refused:
        load("breast-cancer", seed=0)
    assert refused.value.code == "extra-missing"


@needs_heart
def test_heart_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert loaded("heart").features == 13


@needs_heart
def test_heart_is_loaded_in_its_units() -> None:
    x, _ = parse_site((HEART / "processed.cleveland.data").read_text("ascii"))
    silo = loaded("heart").silo("cleveland")
    units = np.concatenate([silo.x_train, silo.x_test]) * data._HEART_UNITS
    np.testing.assert_allclose(np.sort(units, axis=0), np.sort(x, axis=0), rtol=1e-15)


def test_breast_cancer_is_loaded_in_its_units() -> None:
    from sklearn.datasets import load_breast_cancer

    x, _ = load_breast_cancer(return_X_y=True)
    units = everything(loaded("breast-cancer")) * data._CANCER_UNITS
    np.testing.assert_allclose(np.sort(units, axis=0), np.sort(x, axis=0), rtol=1e-15)


@pytest.mark.parametrize("name", BOTH)
def test_a_features_unit_is_about_its_greatest_value(name: str) -> None:
    greatest = np.max(np.abs(everything(loaded(name))), axis=0)
    assert np.all((greatest > 0.7) & (greatest < 1.25))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-9), (60, 1e-9), (34, 1e-5)])
def test_the_standardiser_is_numpys_on_the_pooled_rows(
    name: str, bits: int | None, tolerance: float
) -> None:
    dataset = loaded(name)
    parts = [statistics(silo.x_train) for silo in dataset.silos]
    if bits is not None:
        parts = [rounded(part, bits) for part in parts]
    mean, deviation = standardiser({k: sum(p[k] for p in parts) for k in parts[0]})
    pooled = dataset.union_train()[0]
    np.testing.assert_allclose(mean, pooled.mean(axis=0), rtol=tolerance)
    np.testing.assert_allclose(deviation, pooled.std(axis=0), rtol=tolerance)


def test_a_constant_feature_gets_deviation_one() -> None:
    features = np.column_stack([np.zeros(7), np.full(7, 0.1), np.arange(7.0)])
    mean, deviation = standardiser(statistics(features))
    np.testing.assert_allclose(mean, [0, 0.1, 3])
    np.testing.assert_allclose(deviation, [1, 1, 2])


@pytest.mark.parametrize("error", [-(2.0**-22), 2.0**-22])
def test_a_constant_feature_is_told_from_the_sums_error(error: float) -> None:
    sums = statistics(np.column_stack([np.zeros(60), np.ones(60)]))
    _, deviation = standardiser({**sums, "square_sum": sums["square_sum"] + 4 * error})
    np.testing.assert_array_equal(deviation, [1, 1])


@pytest.mark.parametrize("name", BOTH)
def test_statistics_stay_within_their_bound_even_for_one_silo_with_all_rows(name: str) -> None:
    dataset = loaded(name)
    parts = statistics(everything(dataset))
    assert parts["count"].shape == ()
    assert parts["sum"].shape == parts["square_sum"].shape == (dataset.features,)
    assert all(part.dtype == np.float64 for part in parts.values())
    assert max(float(np.max(np.abs(part))) for part in parts.values()) < data.STATISTICS_BOUND / 4


@pytest.mark.parametrize("value", [64.1, np.inf, np.nan])
def test_statistics_beyond_their_bound_are_not_sent(value: float) -> None:
    with pytest.raises(InputError) as refused:
        statistics(np.array([[1.0, value]]))
    assert refused.value.code == "statistics-bound"


def test_statistics_of_no_row_standardise_nothing() -> None:
    with pytest.raises(InputError) as refused:
        standardiser(statistics(np.empty((0, 3))))
    assert refused.value.code == "statistics-empty"
