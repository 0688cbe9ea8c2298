"""What an admin and a silo's operator decide: frozen, valid by construction.

Policy numbers go in, parameters come out: the threshold from its rule and the cohort, the fixed
point's scale from the word size and the worst possible sum. A configuration that could wrap a sum,
or whose threshold could not hold against its own number of colluders, cannot be constructed.

No security parameter has a default here. ``parse_toml`` reads strictly: an unknown key is an
error, since a misspelt floor would be no floor.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal, NewType, TypeAlias, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from secagg.errors import ConfigError, PolicyRefused
from secagg.suite import Suite

SiloId = NewType("SiloId", str)
"""A member's name as the authority certified it."""

COHORT_FLOOR: Final = 3
MAX_COHORT: Final = 256
MAX_CHUNK_BYTES: Final = 4 * 2**20
MIN_FRACTION_BITS: Final = 4
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)

RingBits: TypeAlias = Literal[16, 32, 64]
_T = TypeVar("_T")
_STRICT: Final = ConfigDict(extra="forbid", strict=True)


class Phase(StrEnum):
    """The phases of an attempt, in order."""

    ADVERTISE_KEYS = "advertise_keys"
    SHARE_KEYS = "share_keys"
    MASKED_INPUT = "masked_input"
    CONSISTENCY = "consistency"
    UNMASKING = "unmasking"


class Protection(StrEnum):
    """What stands between an update and the coordinator.

    Under ``ckks`` the coordinator reads nothing, but any silo that works with it reads every
    update: all silos hold the key. Under ``ckks+masked`` the two together read the sum alone.
    """

    MASKED = "masked"
    CKKS = "ckks"
    CKKS_MASKED = "ckks+masked"

    @property
    def masks(self) -> bool:
        """Whether updates are masked: keys are shared, and a sum is unmasked by its survivors."""
        return self is not Protection.CKKS

    @property
    def seals(self) -> bool:
        """Whether updates are encrypted under a key that silos alone have."""
        return self is not Protection.MASKED

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of an attempt, in order."""
        if self.masks:
            return tuple(Phase)
        return (Phase.ADVERTISE_KEYS, Phase.MASKED_INPUT, Phase.CONSISTENCY)


class MaskPrg(StrEnum):
    """Generator of mask streams."""

    AES_128_CTR = "aes-128-ctr"
    CHACHA20 = "chacha20"


class Clip(StrEnum):
    """What happens to a value beyond the task's bound: an error, or clipping that is counted."""

    NONE = "none"
    ELEMENT = "element"
    L2 = "l2"


class Weighting(StrEnum):
    """Whether a task's result is divided by the sum of the weights."""

    MEAN = "mean"
    SUM = "sum"


def is_name(text: str) -> bool:
    """Whether ``text`` can name a consortium, member, session, task or metric: a DNS label."""
    return _NAME.fullmatch(text) is not None


def silo_id(text: str) -> SiloId:
    """Parse a member's name.

    Raises:
        ConfigError: not 1 to 63 lower-case letters, digits and inner hyphens.
    """
    _check_name("silo", text)
    return SiloId(text)


def _check_name(what: str, text: str) -> None:
    if not is_name(text):  # CHECK: name
        raise ConfigError(
            "name",
            f"{text!r} cannot name a {what}.",
            "Use 1 to 63 lower-case letters, digits and inner hyphens.",
        )


def _check_number(what: str, value: float) -> None:
    if not 1e-100 < value < 1e100:  # CHECK: number
        raise ConfigError("number", f"{what} = {value} is not a number between 1e-100 and 1e100.")


@dataclass(frozen=True, slots=True)
class ThresholdRule:
    """t as a fraction of the cohort: t = ⌊n · numerator / denominator⌋ + 1.

    Raised, where the number of colluders demands it, to the least t with 2t > n + n_c and
    t ≥ n_c + 2: two sets of t silos then share an honest one, so no two survivor sets can both
    gather t signatures, and a sum always holds at least two honest updates.
    Source: Bonawitz et al. 2017 (ePrint 2017/281), section 6.2.
    """

    numerator: int
    denominator: int

    def __post_init__(self) -> None:
        # CHECK: threshold-fraction
        if not 0 < self.denominator <= 2 * self.numerator or self.numerator >= self.denominator:
            raise ConfigError("threshold", f"{self} is not a fraction in [1/2, 1).")

    def __str__(self) -> str:
        return f"{self.numerator}/{self.denominator}"

    @classmethod
    def parse(cls, text: str) -> ThresholdRule:
        """Read "2/3"."""
        match = re.fullmatch(r"([1-9][0-9]{0,3})/([1-9][0-9]{0,3})", text, re.ASCII)
        if match is None:  # CHECK: threshold-text
            raise ConfigError("threshold", f"threshold = {text!r} is no fraction such as 2/3.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def read(cls, value: object) -> object:
        """Read a rule that stands as text in a file."""
        return cls.parse(value) if isinstance(value, str) else value

    def threshold(self, n: int, colluders: int) -> int:
        """Return t for a cohort of n.

        Raises:
            ConfigError: no t ≤ n can hold against that many colluders.
        """
        rule = n * self.numerator // self.denominator + 1
        t = max(rule, colluders + 2, (n + colluders) // 2 + 1)
        if t > n:  # CHECK: threshold-cohort
            raise ConfigError(
                "threshold",
                f"A cohort of {n} has no threshold against {colluders} colluders "
                f"(2t > n + n_c and t ≥ n_c + 2 give t = {t}).",
                "Raise min_cohort or lower colluders.",
            )
        return t


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that rides in every vector of a task: ``|value| ≤ bound``."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    bound: float

    def __post_init__(self) -> None:
        _check_name("metric", self.name)  # CHECK: metric-name
        _check_number(f"bound of metric {self.name}", self.bound)  # CHECK: metric-bound-number


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """One kind of aggregation in a session, known before any tensor's shape is.

    Args:
        name: the task's name.
        weighting: mean or sum; a sum has weight_cap 1.
        rounds: how many results of this task the session releases, at least 1.
        ring_bits: w, the word size: bytes per parameter are w / 8. None where the session has a
            suite, which brings its own ring.
        bound: greatest magnitude of an element; of the L2 norm where ``clip`` is l2.
        clip: what happens beyond the bound.
        weight_cap: greatest weight of one silo.
        metrics: numbers averaged by weight beside the tensors.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    weighting: Weighting
    rounds: int
    bound: float
    clip: Clip
    weight_cap: float
    ring_bits: RingBits | None = None
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        _check_name("task", self.name)  # CHECK: task-name
        _check_number(f"bound of task {self.name}", self.bound)  # CHECK: task-bound-number
        # CHECK: weight-cap-number
        _check_number(f"weight_cap of task {self.name}", self.weight_cap)
        if self.ring_bits not in (None, 16, 32, 64):  # CHECK: ring-bits
            raise ConfigError("ring", f"ring_bits = {self.ring_bits}; it is 16, 32 or 64.")
        if not 1 <= self.rounds < 2**31:  # CHECK: task-rounds
            raise ConfigError("rounds", f"Task {self.name} has rounds = {self.rounds}.")
        if self.weighting is Weighting.SUM and self.weight_cap != 1:  # CHECK: sum-weight-cap
            raise ConfigError("weight-cap", f"Task {self.name} is a sum: its weight_cap is 1.")
        names = [metric.name for metric in self.metrics]
        if len(set(names)) != len(names):  # CHECK: metrics-distinct
            raise ConfigError("metric", f"Task {self.name} names a metric twice.")


def fraction_bits(ring_bits: int, cohort: int) -> int:
    """Return f: values in [−1, 1] become integers in [−2^f, 2^f] and no sum of ``cohort`` wraps.

    The greatest f with cohort · 2^f ≤ 2^(w−1) − 1. Stochastic rounding stays within ±2^f, since
    both ends are integers.

    Raises:
        ConfigError: fewer than 4 bits are left.
    """
    f = (((1 << (ring_bits - 1)) - 1) // cohort).bit_length() - 1
    if f < MIN_FRACTION_BITS:  # CHECK: ring-capacity
        raise ConfigError(
            "ring-capacity",
            f"{cohort} silos in words of {ring_bits} bits leave {f} bits for a value "
            f"(at least {MIN_FRACTION_BITS}).",
            "Use a larger ring_bits.",
        )
    return f


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What an admin creates: who may take part, under which protection, for which tasks.

    Args:
        name: the session's name.
        consortium: the consortium whose authority certified everybody.
        silos: who may take part, sorted; the largest possible cohort.
        protection: what stands between an update and the coordinator.
        colluders: n_c, how many silos may work with a malicious coordinator.
        threshold: the rule that gives t for a cohort.
        min_cohort: least number of silos, in the cohort and among the survivors.
        mask_prg: generator of the mask streams.
        tasks: at least one.
        chunk_bytes: size of an upload's chunks, a multiple of 64 up to 4 MiB.
        train_deadline: seconds from the first Ready until a cohort forms without the rest.
        phase_deadline: seconds that each phase after that may take.
        max_attempts: attempts at one round before ``submit`` gives up.
        suite: parameters of homomorphic encryption, where the protection has it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    consortium: str
    silos: tuple[SiloId, ...]
    protection: Protection
    colluders: int
    threshold: Annotated[ThresholdRule, BeforeValidator(ThresholdRule.read)]
    min_cohort: int
    mask_prg: MaskPrg
    tasks: tuple[TaskConfig, ...]
    chunk_bytes: int = 2**20
    train_deadline: float = 3600.0
    phase_deadline: float = 60.0
    max_attempts: int = 3
    suite: Suite | None = None

    def __post_init__(self) -> None:
        _check_name("session", self.name)  # CHECK: config-session-name
        _check_name("consortium", self.consortium)  # CHECK: config-consortium-name
        for name in self.silos:
            _check_name("silo", name)  # CHECK: config-silo-names
        # CHECK: config-silos
        if list(self.silos) != sorted(set(self.silos)) or len(self.silos) > MAX_COHORT:
            raise ConfigError("silos", f"silos must be sorted, distinct and at most {MAX_COHORT}.")
        if self.colluders < 1:  # CHECK: config-colluders
            raise ConfigError("colluders", f"colluders = {self.colluders}; at least 1 is assumed.")
        if not COHORT_FLOOR <= self.min_cohort <= len(self.silos):  # CHECK: config-min-cohort
            raise ConfigError(
                "min-cohort",
                f"min_cohort = {self.min_cohort} with {len(self.silos)} silos; "
                f"it is at least {COHORT_FLOOR} and at most their number.",
            )
        for n in range(self.min_cohort, len(self.silos) + 1):
            self.threshold.threshold(n, self.colluders)  # CHECK: config-threshold
        # CHECK: config-chunk-bytes
        if not (64 <= self.chunk_bytes <= MAX_CHUNK_BYTES and self.chunk_bytes % 64 == 0):
            raise ConfigError(
                "chunk-bytes", f"chunk_bytes = {self.chunk_bytes}; a multiple of 64 up to 4 MiB."
            )
        _check_number("train_deadline", self.train_deadline)  # CHECK: config-train-deadline
        _check_number("phase_deadline", self.phase_deadline)  # CHECK: config-phase-deadline
        if self.max_attempts < 1:  # CHECK: config-max-attempts
            raise ConfigError("max-attempts", f"max_attempts = {self.max_attempts}.")
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):  # CHECK: config-tasks
            raise ConfigError("tasks", "A session has at least one task, each with its own name.")
        self._check_capacity()

    def _check_capacity(self) -> None:
        """Prove that no sum can wrap, whatever honest silos hold."""
        if self.protection.seals != (self.suite is not None):  # CHECK: config-suite
            raise ConfigError(
                "suite",
                f"protection = {self.protection} with suite = {self.suite}.",
                f"Give suite = {Suite.CKKS_54} with ckks and ckks+masked, and none with masked.",
            )
        for task in self.tasks:
            if (task.ring_bits is None) != self.protection.seals:  # CHECK: config-ring
                raise ConfigError(
                    "ring",
                    f"Task {task.name} has ring_bits = {task.ring_bits} under protection "
                    f"{self.protection}.",
                    "Give 16, 32 or 64 under masked, and none where a suite brings its ring.",
                )
            if task.ring_bits is not None:
                fraction_bits(task.ring_bits, len(self.silos))  # CHECK: config-ring-capacity
        if self.suite is not None:
            self.suite.parameters.slot_limit(len(self.silos))  # CHECK: config-suite-capacity

    def task(self, name: str) -> TaskConfig:
        """Return a task by name.

        Raises:
            ConfigError: the session has no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise ConfigError(
            "task-unknown",
            f"Session {self.name} has no task {name!r}.",
            f"It has: {', '.join(task.name for task in self.tasks)}.",
        )

    def threshold_for(self, n: int) -> int:
        """t for a cohort of n."""
        return self.threshold.threshold(n, self.colluders)


@dataclass(frozen=True, slots=True)
class Policy:
    """A silo's own floors. The coordinator cannot lower them, and no key leaves below them.

    Args:
        colluders: n_c that this silo assumes; a session with fewer is refused.
        min_cohort: least cohort and least number of survivors.
        min_threshold: least t.
        protections: protections that it takes part in.
        ring_bits: word sizes of masked sums that it takes part in.
        clips: clip rules that it takes part in.
        max_weight_cap: greatest weight cap, hence greatest lead of one silo over another.
        repeat_sessions: names under which the operator consents to a second session, and to going
            on with one whose memory this silo has lost (``ledger-rolled-back``).
        key_directory: where keys of homomorphic encryption may be kept, so that a restart needs no
            peer; relative to the policy's own. None keeps them in memory alone.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    colluders: int
    min_cohort: int
    min_threshold: int
    protections: tuple[Protection, ...]
    ring_bits: tuple[RingBits, ...]
    clips: tuple[Clip, ...]
    max_weight_cap: float
    repeat_sessions: tuple[str, ...] = ()
    key_directory: str | None = None

    def __post_init__(self) -> None:
        if self.colluders < 1 or self.min_cohort < COHORT_FLOOR:  # CHECK: policy-floors
            raise ConfigError(
                "policy",
                f"colluders = {self.colluders}, min_cohort = {self.min_cohort}: "
                f"at least 1 and {COHORT_FLOOR}.",
            )
        if self.min_threshold < self.colluders + 2:  # CHECK: policy-min-threshold
            raise ConfigError(
                "policy",
                f"min_threshold = {self.min_threshold}: at least colluders + 2.",
            )
        _check_number("max_weight_cap", self.max_weight_cap)  # CHECK: policy-max-weight-cap

    def check_session(self, session: SessionConfig) -> None:
        """Return if this silo may take part in a session.

        Raises:
            PolicyRefused: a number of the session is below this silo's floor.
        """
        floors: list[tuple[str, bool, object]] = [
            ("protection", session.protection in self.protections, session.protection),
            ("colluders", session.colluders >= self.colluders, session.colluders),
            ("min-cohort", session.min_cohort >= self.min_cohort, session.min_cohort),
        ]
        for task in session.tasks:
            floors += [
                ("ring", task.ring_bits in (None, *self.ring_bits), task.ring_bits),
                ("clip", task.clip in self.clips, task.clip),
                ("weight-cap", task.weight_cap <= self.max_weight_cap, task.weight_cap),
            ]
        for what, allowed, value in floors:
            if not allowed:  # CHECK: policy-session
                raise PolicyRefused(
                    f"policy-{what}",
                    f"Session {session.name} has {what} = {value}, below this silo's policy.",
                    "Have the session's admin change it, or the silo's operator the policy file.",
                )

    def check_cohort(self, n: int, t: int) -> None:
        """Return if this silo may take part in a round of n silos with threshold t.

        Raises:
            PolicyRefused: n or t is below this silo's floor, whatever the session says.
        """
        if n < self.min_cohort:  # CHECK: policy-cohort
            raise PolicyRefused(
                "policy-cohort", f"A cohort of {n}; this silo's policy asks for {self.min_cohort}."
            )
        # CHECK: policy-threshold
        if t < self.min_threshold or 2 * t <= n + self.colluders or t < self.colluders + 2:
            raise PolicyRefused(
                "policy-threshold",
                f"Threshold {t} of {n} does not hold against {self.colluders} colluders.",
            )


def parse_table(kind: type[_T], table: dict[str, Any], source: str) -> _T:
    """Build a configuration from a TOML or JSON table, strictly.

    Args:
        kind: a dataclass of this module's making.
        table: what the file holds.
        source: the file's name, for the error.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type, or the values cannot be right.
    """
    try:
        text = json.dumps(table)
    except (TypeError, ValueError):  # TOML's dates; integers of thousands of digits
        raise ConfigError(
            "config-file", f"{source} holds a date, a time or an endless number.", "Quote a name."
        ) from None
    try:
        return adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError("config-file", f"{source}: {place}: {first['msg']}.") from None


def adapter(kind: type[_T]) -> TypeAdapter[_T]:
    """Return what reads and writes a type; building one costs more than all its uses."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


_ADAPTERS: Final[dict[type[Any], TypeAdapter[Any]]] = {}


def parse_toml(kind: type[_T], text: str, source: str) -> _T:
    """Build a configuration from TOML text, strictly (see ``parse_table``)."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; endless numbers and nesting
        raise ConfigError("config-file", f"{source} is not TOML: {error}.") from None
    return parse_table(kind, table, source)
