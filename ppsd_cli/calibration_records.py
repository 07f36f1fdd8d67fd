"""What a calibration measured, and what it predicts and chose from that.

``tasks/calibrate`` fills these records, ``ui/`` shows them, and a profile keeps them as its
evidence. Times in seconds, sizes in bytes, rates as shares from 0 to 1.
"""

from dataclasses import dataclass

SCHEMA_VERSION = 1
TOP = (1, 2, 4, 8)
"""Guesses that count as right among so many best ones."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured turn of a stage: ``layers`` of them, with the draft ``head`` and the LM matrix
    where named.

    ``busy``: stages at work at the same time on this machine; ``length``: cache slots seen;
    ``width``: rows; ``depth``: of its guesses, 2 where the head goes on behind them; ``threads``:
    CPU threads of a stage, 0 on a GPU; ``turns``: how many were timed; ``seconds``: their median.
    """

    device: str
    threads: int
    busy: int
    layers: int
    length: int
    seconds: float
    turns: int
    width: int = 1
    lm: bool = False
    head: str | None = None
    depth: int = 1


@dataclass(frozen=True, slots=True)
class PartTimes:
    """What the parts of a stage take, fitted to timings of one device, threads, load and width.

    A turn of m layers that sees s slots takes ``fixed + m * (layer + s * slot)``, and ``lm`` and
    the head's time more where it has them. Above width 1 a head drafts behind that many nodes;
    ``second``: what heads that go on behind their own guesses take more for that.
    """

    device: str
    threads: int
    busy: int
    fixed: float
    layer: float
    slot: float
    lm: float
    heads: tuple[tuple[str, float], ...] = ()
    width: int = 1
    second: tuple[tuple[str, float], ...] = ()

    def turn(self, layers: int, length: float, *, lm: bool = False) -> float:
        """Seconds of a stage's work on one token, without a draft."""
        return self.fixed + layers * (self.layer + length * self.slot) + (self.lm if lm else 0.0)

    def head(self, name: str) -> float:
        """Seconds of one draft."""
        return dict(self.heads)[name]

    def going_on(self, name: str) -> float:
        """Seconds of a second depth behind a draft."""
        return dict(self.second)[name]


@dataclass(frozen=True, slots=True)
class Boundary:
    """What the real runners add, from one short run of a pipeline.

    ``hop``: from the end of a stage's work to the start of the next stage's. ``turn``: what a
    stage's work takes beyond its parts, alone and with every stage busy. ``spread``: durations of
    a stage's work over their median. ``split``: the layers of the stages that were run.
    ``shared``: where several stages share a core, what a stage's work takes of it, over what the
    same work takes on a core of its own; alone and with every core busy (1 where none share).
    """

    hop: float
    turn_alone: float
    turn_busy: float
    spread: tuple[float, ...]
    split: tuple[int, ...]
    shared_alone: float = 1.0
    shared_busy: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerScore:
    """What the model says behind one layer: final norm and LM matrix on its state.

    ``top``: share of answer tokens among its best 1, 2, 4, 8. ``agreement``: share of tokens at
    which its first choice is also that of the next layer.
    """

    layer: int
    top: tuple[float, ...]
    agreement: float


@dataclass(frozen=True, slots=True)
class HeadScore:
    """Acceptance of one draft head. ``second``: how often it is right where it goes on behind a
    guess that was right; None for a head that does not go on."""

    name: str
    exit_layer: int
    stages: int
    kind: str
    top: tuple[float, ...]
    second: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to decode with what is predicted for it; ``head`` None is plain decoding.

    ``limit``: what holds it back most: ``acceptance``, ``stage 0``, ``last stage``, ``boundary``
    or, where none of them stands out, ``stages``.
    ``needed``: acceptance at which it would be as fast as plain decoding; above 1 none is enough
    (None for two depths, for which there is no formula).
    ``width``: guesses of a tick, ``depth``: depths of them; ``acceptance``: share of tokens that
    are among them.
    """

    decoder: str
    split: tuple[int, ...]
    devices: tuple[str, ...]
    processes: bool
    threads: int
    head: str | None
    width: int
    acceptance: float | None
    tokens_per_tick: float
    tick_seconds: float
    tokens_per_second: float
    limit: str | None = None
    needed: float | None = None
    depth: int = 1

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.split)

    @property
    def exit_layer(self) -> int | None:
        """Layers before the draft head."""
        return self.split[0] if self.head is not None else None


@dataclass(frozen=True, slots=True)
class Checked:
    """A candidate that was run. ``speed`` in tokens/s with its 95% interval over the prompts.

    ``first_token``: median seconds from the prompt to the first token; ``end_to_end``: median
    tokens/s with that time counted.
    """

    candidate: Candidate
    speed: float
    low: float
    high: float
    acceptance: float | None
    tokens_per_tick: float | None
    first_token: float | None = None
    end_to_end: float | None = None

    @property
    def error(self) -> float:
        """Predicted over measured speed, less 1."""
        return self.candidate.tokens_per_second / self.speed - 1


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What one device needs for its layers, caches, head and LM matrix, and has (None: unknown)."""

    device: str
    needed: int
    available: int | None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Where a trained head would be worth it: an exit layer, a split, and the acceptance that
    would reach plain decoding's speed there."""

    exit_layer: int
    split: tuple[int, ...]
    needed: float
    raw: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A whole calibration."""

    model: str
    model_hash: str
    machine: tuple[tuple[str, str], ...]
    date: str
    dtype: str
    context: int
    prompts: str
    answers: int
    answer_tokens: int
    length: float
    """Mean cache length at which speeds are predicted."""
    timings: tuple[Timing, ...]
    parts: tuple[PartTimes, ...]
    boundary: Boundary | None
    layers: tuple[LayerScore, ...]
    heads: tuple[HeadScore, ...]
    memory: tuple[DeviceMemory, ...]
    plain: Candidate
    candidates: tuple[Candidate, ...]
    checked: tuple[Checked, ...]
    chosen: Candidate
    reason: str
    suggestion: Suggestion | None
    seconds: float
