"""One benchmark: set up, measure, judge, show."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from ppsd_cli.assets.cache import cache_folder
from ppsd_cli.bench_records import BenchReport, Sample
from ppsd_cli.commands.bench_options import BenchOptions, check_options
from ppsd_cli.commands.bench_output import write_report
from ppsd_cli.commands.bench_setup import Setup, prepare
from ppsd_cli.commands.session import ModelChoice
from ppsd_cli.commands.signals import Interrupted, Signals
from ppsd_cli.config import Settings
from ppsd_cli.errors import ConfigError, GateError, PpsdError
from ppsd_cli.files import make_folder
from ppsd_cli.runtime.torchrun import is_torchrun
from ppsd_cli.tasks.bench.baseline import check_same, check_settings, read_baseline
from ppsd_cli.tasks.bench.catalog import list_tasks
from ppsd_cli.tasks.bench.contenders import Stable
from ppsd_cli.tasks.bench.export import SCHEMA_VERSION
from ppsd_cli.tasks.bench.gates import parse_gate
from ppsd_cli.tasks.bench.journal import Journal, check_journal, read_journal
from ppsd_cli.tasks.bench.measure import Measurement
from ppsd_cli.tasks.bench.pool import Pool
from ppsd_cli.tasks.bench.report import Demands, judge, make_rows
from ppsd_cli.tasks.bench.talk import user
from ppsd_cli.tasks.bench.trials import Probe
from ppsd_cli.ui.bench_live import LiveTable
from ppsd_cli.ui.bench_table import task_list

_PROBE_PROMPTS = 3
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """How measuring ended. ``stopped``: by a signal or an error, with samples missing."""

    measurement: Measurement
    stopped: Interrupted | PpsdError | None


def show_tasks() -> None:
    """The tasks on stdout."""
    Console().print(task_list(list_tasks()))


def run_bench(choice: ModelChoice, flags: Settings, options: BenchOptions) -> int:
    """The whole command; returns the exit code."""
    if is_torchrun():
        raise ConfigError("ppsd bench runs its contenders on one host; start it without torchrun")
    check_options(options)
    say = _teller(quiet=options.quiet)
    with Signals():
        try:
            return _run(choice, flags, options, say)
        except Interrupted as signal:
            return signal.exit_code


def _run(choice: ModelChoice, flags: Settings, options: BenchOptions, say: Say) -> int:
    gates = tuple(map(parse_gate, options.fail_under))
    baseline = None if options.baseline is None else read_baseline(options.baseline)
    setup = prepare(choice, flags, options, say)
    notes = list(setup.notes)
    if baseline is not None:
        model = setup.plan.files.name, setup.plan.files.model_hash
        names = [task.name for task in setup.tasks]
        check_same(baseline, model=model, tasks=names, checksum=setup.checksum)
        notes += check_settings(baseline, dict(setup.settings), dict(setup.environment))
    earlier = _earlier_journal(setup, options)
    for note in notes:
        say(note)
    with contextlib.closing(Pool(Path(setup.plan.files.folder))) as pool:
        stable = Stable(setup.shapes, pool, say)
        journal = earlier or _new_journal(setup, options, stable, notes, say)
        measured = _measure(setup, journal, stable, options)
        report = _report(setup, journal, stable, measured, notes)
    report = judge(report, Demands(gates, baseline), seed=options.seed)
    if measured.stopped is not None:
        # Thresholds are for whole runs; answers that differ are wrong at any time.
        report = replace(
            report, failures=tuple(f for f in report.failures if f.gate.startswith("identical@"))
        )
    write_report(report, options)
    return _finish(report, journal, options, measured)


def _measure(setup: Setup, journal: Journal, stable: Stable, options: BenchOptions) -> Measured:
    """Take the missing samples, with a table that fills in on stderr."""
    stopped: Interrupted | PpsdError | None = None
    course = setup.course
    try:
        rivals = [stable.open(contender) for contender in journal.contenders]
    except PpsdError as error:
        measurement = Measurement((), setup.talk, course, journal, lambda _sample, _restored: None)
        measurement.restore()
        return Measured(measurement, error)
    prompts = sum(len(each.question.turns) for each in course.asked) * course.repetitions
    with _table(journal, prompts * len(journal.contenders), options) as show:
        measurement = Measurement(rivals, setup.talk, course, journal, show)
        try:
            measurement.run()
        except (Interrupted, PpsdError) as error:
            stopped = error
    return Measured(measurement, stopped)


@contextlib.contextmanager
def _table(
    journal: Journal, total: int, options: BenchOptions
) -> Iterator[Callable[[Sample, bool], None]]:
    if options.quiet:
        yield lambda _sample, _restored: None
        return
    with contextlib.closing(LiveTable(Console(stderr=True), journal.contenders, total)) as table:
        yield lambda sample, restored: table.update(sample, restored=restored)


def _earlier_journal(setup: Setup, options: BenchOptions) -> Journal | None:
    """The journal to go on with, where there is one."""
    if options.resume is None or not options.resume.exists():
        return None
    journal = read_journal(options.resume)
    check_journal(journal, _journal_settings(setup))
    return journal


def _new_journal(
    setup: Setup, options: BenchOptions, stable: Stable, notes: list[str], say: Say
) -> Journal:
    """Decide by short trials what was left open, and begin a journal with it."""
    say("loading, and trying what was left open")
    prompts = [
        setup.talk.encode([user(each.question.turns[0])])
        for each in setup.course.asked[:_PROBE_PROMPTS]
    ]
    decision = stable.decide(setup.wish, Probe(tuple(prompts), setup.course.limits))
    stable.keep(decision.contenders)
    notes += decision.notes
    for line in (*decision.notes, *(f"{name}: {reason}" for name, reason in decision.skipped)):
        say(line)
    return Journal(
        options.resume or _own_place(),
        _journal_settings(setup),
        tuple(decision.contenders),
        tuple(decision.skipped),
    )


def _own_place() -> Path:
    """A new file for samples in the cache folder."""
    folder = make_folder(cache_folder() / "bench")
    return folder / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.jsonl"


def _journal_settings(setup: Setup) -> dict[str, str]:
    """What must be the same for samples of two runs to stand beside each other."""
    same = ("cpu", "cores", "gpus", "ppsd", "torch", "transformers")
    known = dict(setup.environment)
    return {
        "task": ",".join(task.name for task in setup.tasks),
        "prompts": setup.checksum,
        "model": setup.plan.files.name,
        "model_hash": setup.plan.files.model_hash,
        **dict(setup.settings),
        **{name: known[name] for name in same if name in known},
    }


def _report(
    setup: Setup, journal: Journal, stable: Stable, measured: Measured, notes: list[str]
) -> BenchReport:
    measurement = measured.measurement
    samples = tuple(measurement.judged)
    contenders = journal.contenders
    rows = make_rows(
        contenders,
        samples,
        ideal={c.name: stable.ideal_speedup(c) for c in contenders},
        memory=journal.memory,
        seed=setup.course.seed,
    )
    left_out = [
        f"left out, the prompt is beyond the context: {each}" for each in measurement.left_out
    ]
    decided = (("ar_threads", str(contenders[0].threads)),) if contenders[0].threads else ()
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        tasks=setup.tasks,
        prompt_checksum=setup.checksum,
        model=setup.plan.files.name,
        model_hash=setup.plan.files.model_hash,
        environment=setup.environment,
        settings=(*setup.settings, *decided),
        rows=rows,
        samples=samples,
        failures=(),
        incomplete=measured.stopped is not None,
        grid_events=measurement.grid_events,
        skipped=journal.skipped,
        notes=(*notes, *left_out),
    )


def _finish(
    report: BenchReport, journal: Journal, options: BenchOptions, measured: Measured
) -> int:
    """The exit code; a run that was stopped says how to go on."""
    if measured.stopped is not None:
        if journal.samples:
            sys.stderr.write(_how_to_go_on(journal))
        if isinstance(measured.stopped, PpsdError):
            raise measured.stopped
        return measured.stopped.exit_code
    if options.resume is None:
        journal.path.unlink(missing_ok=True)
    if report.failures:
        lines = "; ".join(failure.message for failure in report.failures)
        raise GateError(f"{len(report.failures)} gate(s) failed: {lines}")
    return 0


def _how_to_go_on(journal: Journal) -> str:
    return (
        f"ppsd: {len(journal.samples)} answers are kept; the same command with "
        f"--resume {journal.path} goes on\n"
    )


def _teller(*, quiet: bool) -> Say:
    """Notes on stderr, unless quiet."""

    def say(line: str) -> None:
        if not quiet:
            sys.stderr.write(f"ppsd: {line}\n")

    return say
