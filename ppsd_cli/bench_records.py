"""What a benchmark run holds: raw samples, and the figures that follow from them.

Everything that ``ppsd bench`` prints, draws or compares is computed from these records, which its
JSON keeps whole. Times in seconds, sizes in bytes, rates as shares from 0 to 1.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of a task; ``turns`` are what the user says, one answer each."""

    question_id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """Where the prompts of a task come from. ``source`` and ``licence`` as a person reads them."""

    name: str
    about: str
    source: str
    licence: str
    questions: int
    size: int | None
    """Bytes of the file that is fetched; None where that is not known before."""
    sha256: str | None
    """Of that file; for ``--prompts FILE``, of what was read."""


@dataclass(frozen=True, slots=True)
class Key:
    """What one answer answers. The same key for every decoder."""

    task: str
    question_id: str
    category: str
    turn: int
    repetition: int


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table: a decoder with its settings.

    ``name`` is unique in a run (``ppsd``, ``ppsd-w4``, ``ppsd-w4-d2``, ``eesd-4``,
    ``eesd-4 block``, ``ppsd@0.8``); ``decoder`` is what ``--decoders`` calls it. ``acceptance``:
    drafts are right with this probability in place of the head's own (the head runs
    nevertheless). ``exact``: token ids must equal AR's. ``width``: guesses per tick, above 1 a
    tree, in which the right token is among the guesses behind a node with probability ``among``
    where ``acceptance`` is fixed; ``depth``: depths of them per tick.
    """

    name: str
    decoder: str
    exact: bool
    acceptance: float | None = None
    draft_length: int | None = None
    head: str | None = None
    split: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    threads: int | None = None
    """CPU threads of each stage; None where all work is on a GPU."""
    width: int = 1
    among: float | None = None
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Counts:
    """What the pipeline of one answer did; see ``core.stats.RunStats`` for each count."""

    ticks: int
    verified: int
    accepted: int
    void_drafts: int
    flushes: int
    runs: tuple[tuple[int, int], ...]
    """``(length, how often)`` of runs of accepted tokens."""
    stage_busy: tuple[tuple[float, float, float], ...]
    """Useful, void and bubble share of each stage's ticks."""
    stage_seconds: tuple[float, ...]
    """Median time of each stage for a one-token node; empty where the runner has no spans."""
    tick_seconds: float | None
    wait_seconds: float | None
    """Median wait of stage 0 for the boundary: transfers, and slower stages."""
    draft_seconds: float | None
    """Median of deciding and running the draft head."""
    layers_seconds: float | None
    """Median of stage 0's own layers."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer first differs from AR's.

    ``logit_gap``: AR's own logit of AR's token minus that of this answer's token, at the first
    difference; None where it could not be computed (one of the answers ended there).
    """

    index: int
    expected_id: int | None
    found_id: int | None
    logit_gap: float | None
    tolerance: float | None = None
    """The largest gap that rounding explains (docs/bench.md says how it is set)."""
    same_threads_equal: bool = False
    """Plain decoding with this contender's own threads and split gave the contender's answer: AR
    ran with another number of threads, which decides rounding."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of one contender."""

    key: Key
    contender: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    finish_reason: str
    first_token_seconds: float
    """From submission to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    counts: Counts | None = None
    """None where the decoder has no ticks of ours (transformers)."""
    difference: Difference | None = None
    """None where the token ids equal AR's."""
    first_tokens: int = 1
    """Tokens that came at the moment of the first: several where they come in bursts."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first over the time since it; None for one token."""
        later = len(self.token_ids) - self.first_tokens
        return later / self.decode_seconds if later > 0 and self.decode_seconds > 0 else None

    @property
    def total_seconds(self) -> float:
        """End to end."""
        return self.first_token_seconds + self.decode_seconds


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95% bootstrap interval over prompts."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What one contender reached, over all prompts or one category. None: cannot be said."""

    answers: int
    tokens: int
    tokens_per_second: Interval | None
    end_to_end_tokens_per_second: Interval | None
    first_token_seconds: Interval | None
    speedup: Interval | None
    """Over AR, paired prompt by prompt."""
    ideal_speedup: float | None
    """What the paper's formula gives for the fixed acceptance of this contender."""
    acceptance_rate: float | None
    tokens_per_tick: float | None
    runs: tuple[tuple[int, int], ...]
    flushes: int
    void_drafts: int
    stage_busy: tuple[tuple[float, float, float], ...]
    stage_seconds: tuple[float, ...]
    tick_seconds: float | None
    wait_seconds: float | None
    draft_seconds: float | None
    layers_seconds: float | None
    identical: int
    """Answers whose token ids equal AR's."""
    largest_logit_gap: float | None
    peak_memory: int | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the final table."""

    contender: Contender
    overall: Figures
    categories: tuple[tuple[str, Figures], ...]
    printed: bool = True
    """False: only in the JSON, because a variant of the same decoder was faster."""


@dataclass(frozen=True, slots=True)
class Movement:
    """One figure of one contender against an earlier run (``--baseline``).

    ``ratio``: new over old, paired by answer, with its interval. ``verdict``: ``faster``,
    ``slower`` or ``same``; anything but ``same`` is beyond the noise of both runs.
    """

    contender: str
    figure: str
    before: float
    after: float
    ratio: Interval
    verdict: str


@dataclass(frozen=True, slots=True)
class GateFailure:
    """Why the run fails with exit code 6, in one line."""

    gate: str
    message: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A whole run. ``environment`` and ``settings`` are flat name-value pairs for people."""

    schema_version: int
    tasks: tuple[TaskInfo, ...]
    prompt_checksum: str
    """sha256 over the token ids of all turns, each asked alone, in order."""
    model: str
    model_hash: str
    environment: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    samples: tuple[Sample, ...]
    failures: tuple[GateFailure, ...]
    incomplete: bool
    grid_events: tuple[object, ...] = ()
    """Core events of one PPSD answer, for the stage-by-tick grid; not part of the JSON."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Contenders that were asked for and could not run, each with the reason."""
    notes: tuple[str, ...] = ()
    """Lines that a reader of the figures should know."""
    baseline: tuple[Movement, ...] = ()
