"""Runs candidates as ``ppsd bench`` does: in turn, prompt by prompt, answers held against plain
decoding's. The sweep of ``docs/benchmarks/calibrate_sweep.py`` uses the same function."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ppsd_cli.bench_records import Contender, Row, Sample
from ppsd_cli.calibration_records import Candidate, Checked
from ppsd_cli.config import DEFAULT_TREE_SCALE
from ppsd_cli.errors import GateError
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.tasks.bench.contenders import Rival
from ppsd_cli.tasks.bench.decoders import EngineDecoder
from ppsd_cli.tasks.bench.gates import identity_failures
from ppsd_cli.tasks.bench.journal import Journal
from ppsd_cli.tasks.bench.measure import Course, Measurement
from ppsd_cli.tasks.bench.pool import Pool, Shape
from ppsd_cli.tasks.bench.report import make_rows
from ppsd_cli.tasks.bench.talk import Talk


@dataclass(frozen=True, slots=True)
class Track:
    """What candidates run on and answer; ``step`` is called after each answer."""

    config: PipelineConfig
    talk: Talk
    course: Course
    step: Callable[[], None]


def run_candidates(
    plain: Candidate, candidates: Sequence[Candidate], track: Track
) -> list[Checked]:
    """Measure plain decoding and the candidates in one run; plain decoding comes first.

    GateError where an answer differs from plain decoding's and must not.
    """
    pool = Pool(Path(track.config.folder))
    try:
        everyone = (plain, *candidates)
        rivals = [_rival(each, name, pool, track) for name, each in _named(everyone).items()]
        rows, samples = _measure(rivals, track)
    finally:
        pool.close()
    failures = identity_failures(rows, samples, context=track.course.limits.context)
    if failures:
        raise GateError("; ".join(failure.message for failure in failures))
    return [_checked(each, row) for each, row in zip(everyone, rows, strict=True)]


def _measure(rivals: Sequence[Rival], track: Track) -> tuple[tuple[Row, ...], tuple[Sample, ...]]:
    contenders = tuple(rival.contender for rival in rivals)
    with tempfile.TemporaryDirectory(prefix="ppsd-calibrate-") as folder:
        journal = Journal(Path(folder) / "samples.jsonl", {}, contenders)
        measurement = Measurement(
            rivals, track.talk, track.course, journal, lambda _sample, _restored: track.step()
        )
        measurement.run()
    samples = tuple(measurement.judged)
    rows = make_rows(contenders, samples, ideal={}, memory={}, seed=track.course.seed)
    return rows, samples


def _named(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Each with a name of its own; the first is ``ar``."""
    named = {"ar": candidates[0]}
    for number, each in enumerate(candidates[1:], 1):
        split = ",".join(map(str, each.split))
        shape = f"width {each.width} depth {each.depth}"
        named[f"{number}: {each.decoder} {split} {shape}"] = each
    return named


def _rival(candidate: Candidate, name: str, pool: Pool, track: Track) -> Rival:
    config = replace(
        track.config,
        split=candidate.split,
        devices=candidate.devices,
        head=candidate.head,
        draft_vocab=None,
        threads=candidate.threads,
        width=candidate.width,
        depth=candidate.depth,
    )
    shape = Shape(config, candidate.processes, candidate.head)
    loaded = pool.engine(shape)
    contender = Contender(
        name,
        candidate.decoder,
        exact=candidate.width == 1,
        head=candidate.head,
        split=candidate.split,
        devices=candidate.devices,
        threads=candidate.threads if shape.on_cpu else None,
        width=candidate.width,
        depth=candidate.depth,
    )
    plain = EngineDecoder(loaded.thing, drafting=False)
    decoder = EngineDecoder(
        loaded.thing,
        drafting=candidate.head is not None,
        width=candidate.width,
        tree_scale=DEFAULT_TREE_SCALE,
        depth=candidate.depth,
    )
    return Rival(contender, decoder, loaded, plain)


def _checked(candidate: Candidate, row: Row) -> Checked:
    figures = row.overall
    speed, first = figures.tokens_per_second, figures.first_token_seconds
    whole = figures.end_to_end_tokens_per_second
    assert speed is not None, "an answer of one token has no speed"
    return Checked(
        candidate=candidate,
        speed=speed.median,
        low=speed.low,
        high=speed.high,
        acceptance=figures.acceptance_rate,
        tokens_per_tick=figures.tokens_per_tick,
        first_token=None if first is None else first.median,
        end_to_end=None if whole is None else whole.median,
    )
