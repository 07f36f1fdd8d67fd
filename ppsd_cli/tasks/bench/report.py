"""From the samples of a run to its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ppsd_cli.bench_records import BenchReport, Contender, GateFailure, Movement, Row, Sample
from ppsd_cli.tasks.bench.baseline import Baseline, missing, movements, slowdowns
from ppsd_cli.tasks.bench.figures import make_row
from ppsd_cli.tasks.bench.gates import Gate, identity_failures, threshold_failures


@dataclass(frozen=True, slots=True)
class Demands:
    """What a run is held to."""

    gates: tuple[Gate, ...] = ()
    baseline: Baseline | None = None


def make_rows(
    contenders: Sequence[Contender],
    samples: Sequence[Sample],
    *,
    ideal: Mapping[str, float | None],
    memory: Mapping[str, int],
    seed: int,
) -> tuple[Row, ...]:
    """One row for each contender; the first is plain decoding. Of EESD's heads one is printed."""
    plain = [s for s in samples if s.contender == contenders[0].name]
    rows = [
        make_row(
            contender,
            [s for s in samples if s.contender == contender.name],
            plain,
            ideal=ideal.get(contender.name),
            peak_memory=memory.get(contender.name),
            seed=seed,
        )
        for contender in contenders
    ]
    return _only_best_burst(rows)


def judge(report: BenchReport, demands: Demands, *, seed: int) -> BenchReport:
    """The report with what moved since the baseline and everything that fails."""
    moves: tuple[Movement, ...] = ()
    gone: list[GateFailure] = []
    if demands.baseline is not None:
        moves = tuple(movements(demands.baseline.samples, report.samples, seed=seed))
        gone = missing(demands.baseline.samples, report.samples)
    context = dict(report.settings).get("context")
    failures: list[GateFailure] = identity_failures(
        report.rows, report.samples, context=None if context is None else int(context)
    )
    failures += threshold_failures(report.rows, demands.gates)
    failures += slowdowns(moves) + gone
    return replace(report, baseline=moves, failures=tuple(failures))


def _only_best_burst(rows: Sequence[Row]) -> tuple[Row, ...]:
    bursts = [r for r in rows if r.contender.decoder == "eesd" and r.contender.acceptance is None]
    if len(bursts) < 2:
        return tuple(rows)
    best = max(bursts, key=lambda r: r.overall.speedup.median if r.overall.speedup else 0.0)
    return tuple(replace(r, printed=False) if r in bursts and r is not best else r for r in rows)
