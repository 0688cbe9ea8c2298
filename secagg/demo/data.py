"""Two public data sets over four silos, and the standardisation that the silos agree on.

``breast-cancer`` is scikit-learn's copy of the Wisconsin data (569 rows, 30 features), its rows
dealt to four silos by a Dirichlet(0.3) over the labels: one archive, made uneven on purpose.
``heart`` is UCI Heart Disease (doi:10.24432/C52P4X, CC BY 4.0): four hospitals, each a silo, which
differ by themselves. Its four files are pinned by SHA-256; no row of another file is ever used.

The heart data follow FLamby's convention ([TerrailAE+22], Fed-Heart-Disease): the columns slope,
ca and thal are dropped, then every row with a missing value, which leaves 740 rows; cp and restecg
are one-hot without their first level. The levels are constants, so all silos agree on the 13
features without telling each other what they hold. A label is 1 for any disease (num > 0).
A cholesterol of 0 also means "not measured" (all of Switzerland, part of VA) and is kept, as there.

Every feature is loaded in a public unit, about its greatest published value: magnitudes are then
around 1 or below, so a secure sum of features needs no wide bound. A unit is a constant and takes
nothing from a silo's rows; a feature that varies is standardised to the same in any unit.

The silos share one mean and one variance without showing their own: each adds its ``statistics``
in a secure sum, and everyone derives the same ``standardiser`` from the total.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import platformdirs
from numpy.typing import NDArray

from secagg.errors import ConfigError, InputError

FloatArray: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = tuple[FloatArray, FloatArray]
"""Features (rows, d) and labels (rows,), 0 or 1; float64."""
Fetch: TypeAlias = Callable[[str], bytes]
"""From a URL to the body found there; raises OSError or HTTPException."""

DATA_SETS: Final = ("breast-cancer", "heart")

STATISTICS_BOUND: Final = 2.0**12
"""Bound on the magnitude of every element of ``statistics``, for any silo of either data set.

A constant: a bound taken from a silo's rows would tell about them. At most 740 rows of features of
magnitudes around 1 stay below 2**10, even if one silo held every row. The resolution is 2**-48 of
a feature's squared unit where the encoding keeps 60 bits for the fraction of the bound, and about
2**-22 where, as under CKKS, it keeps about 34.
"""
_CONSTANT: Final = 1e-6
"""Variance, in a feature's squared unit, below which it may be no more than the sum's resolution.

Over all silos the least variance of a feature is above 1e-3, and one silo's alone is above 1e-5
unless it is 0. Four silos that each err by 2**-22 change one by less than 1e-7.
"""

TRAIN_SHARE: Final = 0.66
DIRICHLET_CONCENTRATION: Final = 0.3
MINIMUM_ROWS: Final = 30
"""Fewest rows of a breast-cancer silo, train and test together."""

# Round numbers near the maxima in the data set's published summary (scikit-learn's DESCR), in its
# order: radius, texture, perimeter, area, smoothness, compactness, concavity, concave points,
# symmetry, fractal dimension.
_CANCER_UNITS: Final = (
    *(30.0, 40.0, 200.0, 2500.0, 0.2, 0.4, 0.5, 0.2, 0.3, 0.1),  # mean
    *(3.0, 5.0, 25.0, 600.0, 0.04, 0.15, 0.4, 0.06, 0.08, 0.03),  # standard error
    *(40.0, 50.0, 250.0, 4500.0, 0.25, 1.0, 1.25, 0.3, 0.7, 0.2),  # worst
)

HEART_FEATURES: Final = (
    *("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak"),
    *("cp-2", "cp-3", "cp-4", "restecg-1", "restecg-2"),
)
# Round upper ends of the clinical ranges: years, -, mmHg, mg/dl, -, beats a minute, -, mm of ST
# depression; a feature that is 0 or 1 keeps its unit.
_HEART_UNITS: Final = (
    *(100.0, 1.0, 200.0, 500.0, 1.0, 200.0, 1.0, 5.0),
    *(1.0, 1.0, 1.0, 1.0, 1.0),
)
HEART_SITES: Final[Mapping[str, str]] = MappingProxyType(
    {"cleveland": "cleveland", "hungary": "hungarian", "switzerland": "switzerland", "va": "va"}
)
"""Silo name to the site's name in UCI's files."""

HEART_SHA256: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cleveland": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
        "hungarian": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
        "switzerland": "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
        "va": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
    }
)
_HEART_URL: Final = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease"
_HEART_COLUMNS: Final = 14
_CP, _RESTECG, _NUM = 2, 6, 13
_NUMERIC: Final = (0, 1, 3, 4, 5, 7, 8, 9)
_USED: Final = (*range(10), _NUM)
_CP_LEVELS: Final = (2.0, 3.0, 4.0)
_RESTECG_LEVELS: Final = (1.0, 2.0)
_FETCH_SECONDS: Final = 30
_FETCH_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class SiloData:
    """One silo's rows: features float64 (rows, d), labels float64 0 or 1.

    The features are not standardised; each is in its public unit, with magnitudes around 1.
    """

    name: str
    x_train: FloatArray
    y_train: FloatArray
    x_test: FloatArray
    y_test: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A data set cut over its silos, in a fixed order."""

    name: str
    silos: tuple[SiloData, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The silos' names, in order; each can name a member of a consortium."""
        return tuple(silo.name for silo in self.silos)

    @property
    def features(self) -> int:
        """The number d of features."""
        return len(self.silos[0].x_train.T)

    def silo(self, name: str) -> SiloData:
        """The rows of the silo called ``name``; KeyError if there is none."""
        return {silo.name: silo for silo in self.silos}[name]

    def union_train(self) -> Rows:
        """All training rows together, as no silo ever sees them: for baselines only."""
        return (
            np.concatenate([silo.x_train for silo in self.silos]),
            np.concatenate([silo.y_train for silo in self.silos]),
        )

    def union_test(self) -> Rows:
        """All test rows together, on which every reported accuracy is measured."""
        return (
            np.concatenate([silo.x_test for silo in self.silos]),
            np.concatenate([silo.y_test for silo in self.silos]),
        )


def fetch_https(url: str) -> bytes:
    """The body at ``url``, at most 1 MiB of it: a longer one then fails its SHA-256.

    Raises:
        OSError: no connection, no such page, or a time-out (30 s).
        http.client.HTTPException: the answer broke off.
    """
    with urllib.request.urlopen(url, timeout=_FETCH_SECONDS) as answer:  # noqa: S310 - https constant
        body: bytes = answer.read(_FETCH_BYTES)
    return body


def load(
    name: str,
    *,
    seed: int,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    fetch: Fetch = fetch_https,
) -> Dataset:
    """Load a data set, cut over its silos and into train (66 %) and test (34 %) by ``seed``.

    Args:
        name: one of ``DATA_SETS``.
        seed: not negative; the same seed gives the same rows in the same order.
        data_dir: for heart, a directory with UCI's four ``processed.*.data``; nothing is fetched.
        cache_dir: where fetched files are kept; the user's cache directory if None.
        fetch: how a file is fetched that the cache lacks.

    Raises:
        ConfigError: an unknown name, a missing extra, a file missing, unreachable or not the
            pinned one, or a ``data_dir`` for data that are not read from files.
    """
    if name == "heart":
        cache = cache_dir or platformdirs.user_cache_path("secagg") / "heart-disease"
        return _heart(seed, lambda site: _site_bytes(site, data_dir, cache, fetch))
    if name != "breast-cancer":
        raise ConfigError(
            "demo-data", f"There is no data set {name!r}.", f"Choose {' or '.join(DATA_SETS)}."
        )
    if data_dir is not None:
        raise ConfigError(
            "demo-data", "breast-cancer is not read from files.", "Leave --data-dir out."
        )
    return _breast_cancer(seed)


def statistics(features: FloatArray) -> dict[str, FloatArray]:
    """What a silo adds to the secure sum from which all silos derive one mean and variance.

    Args:
        features: (rows, d), float64, as in ``SiloData``.

    Returns:
        ``count`` of shape (), ``sum`` and ``square_sum`` of shape (d,); float64, magnitudes at
        most ``STATISTICS_BOUND``.

    Raises:
        InputError: a magnitude is beyond the bound or not finite; nothing may be sent.
    """
    parts = {
        "count": np.array(len(features), dtype=np.float64),
        "sum": np.sum(features, axis=0, dtype=np.float64),
        "square_sum": np.sum(np.square(features, dtype=np.float64), axis=0),
    }
    if not all(bool(np.all(np.abs(part) <= STATISTICS_BOUND)) for part in parts.values()):
        raise InputError(
            "statistics-bound",
            "A silo's feature statistics are not finite or leave their bound.",
            "Check the units of the silo's features.",
        )
    return parts


def standardiser(sums: Mapping[str, FloatArray]) -> tuple[FloatArray, FloatArray]:
    """The mean and the (population) standard deviation of all rows that were counted.

    A feature that is constant over all rows gets deviation 1, so that it standardises to 0; one
    whose variance is below 1e-6 of its squared unit counts as constant, since that little is
    rounding of the sum.

    Args:
        sums: the elementwise total of the silos' ``statistics``.

    Returns:
        mean (d,) and deviation (d,), float64, in the features' units; every deviation > 0.

    Raises:
        InputError: the total counts no row.
    """
    count = float(sums["count"])
    if not count >= 1:
        raise InputError("statistics-empty", "The silos' statistics count no row.")
    mean = sums["sum"] / count
    variance = sums["square_sum"] / count - np.square(mean)
    return mean, np.sqrt(np.where(variance > _CONSTANT, variance, 1.0))


def parse_site(text: str) -> Rows:
    """The complete rows of one ``processed.*.data``: 13 features as in ``HEART_FEATURES``, raw.

    Raises:
        ValueError: a row has not 14 columns, or holds something that is no number.
    """
    cells = [line.split(",") for line in text.splitlines() if line.strip()]
    if any(len(row) != _HEART_COLUMNS for row in cells):
        raise ValueError("a row of UCI Heart Disease has 14 columns")
    used = [[row[column] for column in _USED] for row in cells]
    complete = [[float(cell) for cell in row] for row in used if "?" not in row]
    table = np.array(complete, dtype=np.float64).reshape(len(complete), len(_USED))
    features = (
        table[:, _NUMERIC],
        _one_hot(table[:, _CP], _CP_LEVELS),
        _one_hot(table[:, _RESTECG], _RESTECG_LEVELS),
    )
    return np.hstack(features), (table[:, -1] > 0).astype(np.float64)


def _one_hot(column: FloatArray, levels: tuple[float, ...]) -> FloatArray:
    """(rows, len(levels)) indicators."""
    return np.column_stack([np.where(column == level, 1.0, 0.0) for level in levels])


def _heart(seed: int, read: Callable[[str], bytes]) -> Dataset:
    generator = np.random.default_rng(seed)
    silos = []
    for name, site in HEART_SITES.items():
        x, y = parse_site(read(site).decode("ascii"))
        silos.append(_cut(name, x / _HEART_UNITS, y, generator))
    return Dataset("heart", tuple(silos))


def _breast_cancer(seed: int) -> Dataset:
    try:
        from sklearn.datasets import load_breast_cancer
    except ModuleNotFoundError as missing:
        raise ConfigError(
            "extra-missing", "scikit-learn is not installed.", "pip install 'secagg[demo]'"
        ) from missing
    x, target = load_breast_cancer(return_X_y=True)
    y = (target == 0).astype(np.float64)  # scikit-learn codes malignant as 0
    generator = np.random.default_rng(seed)
    parts = _deal_until_enough(y, 4, generator)
    silos = [
        _cut(f"silo-{number}", x[rows] / _CANCER_UNITS, y[rows], generator)
        for number, rows in enumerate(parts, start=1)
    ]
    return Dataset("breast-cancer", tuple(silos))


def _deal_until_enough(
    y: FloatArray, silos: int, generator: np.random.Generator
) -> list[NDArray[np.intp]]:
    """Deal again until every silo has ``MINIMUM_ROWS``; the first such deal of the generator."""
    while True:
        parts = _deal(y, silos, generator)
        if min(map(len, parts)) >= MINIMUM_ROWS:
            return parts


def _deal(y: FloatArray, silos: int, generator: np.random.Generator) -> list[NDArray[np.intp]]:
    """Row numbers for each silo: per label, shares drawn from a Dirichlet distribution."""
    dealt = []
    for label in (0, 1):
        rows = generator.permutation(np.flatnonzero(y == label))
        shares = generator.dirichlet(np.full(silos, DIRICHLET_CONCENTRATION))
        edges = (np.cumsum(shares)[:-1] * len(rows)).astype(np.intp)
        dealt.append(np.split(rows, edges))
    return [np.concatenate(parts) for parts in zip(*dealt, strict=True)]


def _cut(name: str, x: FloatArray, y: FloatArray, generator: np.random.Generator) -> SiloData:
    """Cut a silo's rows into train and test, ``TRAIN_SHARE`` of each label into train."""
    train, test = [], []
    for label in (0, 1):
        rows = generator.permutation(np.flatnonzero(y == label))
        edge = round(TRAIN_SHARE * len(rows))
        train.append(rows[:edge])
        test.append(rows[edge:])
    kept, held_out = np.concatenate(train), np.concatenate(test)
    return SiloData(name, x[kept], y[kept], x[held_out], y[held_out])


def _site_bytes(site: str, data_dir: Path | None, cache_dir: Path, fetch: Fetch) -> bytes:
    name = f"processed.{site}.data"
    if data_dir is None:
        return _cached(cache_dir / name, HEART_SHA256[site], fetch)
    path = data_dir / name
    try:
        body = path.read_bytes()
    except OSError as unreadable:
        raise ConfigError(
            "heart-file",
            f"{path} cannot be read: {unreadable.strerror}.",
            "--data-dir must hold UCI's four processed.*.data; leave it out to download them.",
        ) from unreadable
    return _pinned(body, HEART_SHA256[site], str(path))


def _cached(path: Path, sha256: str, fetch: Fetch) -> bytes:
    """The cached file if it is the pinned one; else fetched, checked, then put in its place."""
    if path.is_file() and _digest(body := path.read_bytes()) == sha256:
        return body
    url = f"{_HEART_URL}/{path.name}"
    try:
        body = fetch(url)
    except (OSError, http.client.HTTPException) as failure:
        raise ConfigError(
            "heart-download",
            f"{url} cannot be fetched: {failure}.",
            f"Fetch UCI's four processed.*.data elsewhere and name their directory with"
            f" --data-dir, or put them into {path.parent}.",
        ) from failure
    _pinned(body, sha256, url)
    try:
        _replace(path, body)
    except OSError as unwritable:
        raise ConfigError(
            "heart-cache",
            f"{path} cannot be written: {unwritable.strerror}.",
            "Make its directory writable, or name a directory with the files with --data-dir.",
        ) from unwritable
    return body


def _pinned(body: bytes, sha256: str, origin: str) -> bytes:
    if _digest(body) != sha256:
        raise ConfigError(
            "heart-digest",
            f"{origin} is not the pinned file: its SHA-256 is not {sha256}.",
            "Get UCI's original processed.*.data, unedited, and name their directory with"
            " --data-dir.",
        )
    return body


def _replace(path: Path, body: bytes) -> None:
    """Write whole or not at all: silos that start together may share the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
        draft.write(body)
    os.replace(draft.name, path)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
