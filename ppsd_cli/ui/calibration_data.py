"""What a calibration shows, as tables and points. Pure."""

from dataclasses import dataclass
from math import ceil

from ppsd_cli.calibration_records import Calibration, Candidate, Checked
from ppsd_cli.ui.bench_data import Column, TableData
from ppsd_cli.ui.bench_words import NOTHING, milliseconds, number, percent, size

SHOWN = 8
"""Candidates of the table; those that were run are always among them."""


@dataclass(frozen=True, slots=True)
class ExitPoint:
    """One exit layer on the curve: what a raw exit guesses, and the best predicted speed-up."""

    layer: int
    acceptance: float
    agreement: float
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Mark:
    """A candidate on the curve: with a trained head, or one that was run (``measured``)."""

    layer: int
    label: str
    acceptance: float
    predicted: float
    measured: float | None


def exit_points(calibration: Calibration) -> list[ExitPoint]:
    """One point for each exit layer."""
    plain = calibration.plain.tokens_per_second
    best: dict[int, float] = {}
    for each in calibration.candidates:
        if each.head == "raw" and each.exit_layer is not None:
            speedup = each.tokens_per_second / plain
            best[each.exit_layer] = max(speedup, best.get(each.exit_layer, 0.0))
    return [
        ExitPoint(score.layer, score.top[0], score.agreement, best.get(score.layer))
        for score in calibration.layers
    ]


def marks(calibration: Calibration) -> list[Mark]:
    """The best chain and the best tree of each depth of each trained head, and everything that was
    run."""
    plain = calibration.plain.tokens_per_second
    speeds = {each.candidate: each for each in calibration.checked}
    measured_plain = speeds[calibration.plain].speed
    shown: dict[tuple[object, ...], Candidate] = {}
    for each in (*(c.candidate for c in calibration.checked), *calibration.candidates):
        if each.head is not None and (each in speeds or each.head != "raw"):
            sort = each.head, each.exit_layer, each.stages, each.width > 1, each.depth
            shown.setdefault(sort, each)
    found = []
    for each in shown.values():
        run = speeds.get(each)
        assert each.exit_layer is not None
        found.append(
            Mark(
                each.exit_layer,
                f"{each.head}, {_split(each)}{_width(each)}",
                each.acceptance or 0.0,
                each.tokens_per_second / plain,
                None if run is None else run.speed / measured_plain,
            )
        )
    return sorted(found, key=lambda mark: (mark.layer, -mark.predicted))


def candidate_table(calibration: Calibration) -> TableData:
    """What was predicted and what was measured, fastest first."""
    runs = {each.candidate: each for each in calibration.checked}
    others = [each for each in calibration.candidates if each not in runs]
    ahead = [each.candidate for each in calibration.checked[1:]]
    shown = [*ahead, *others[: max(0, SHOWN - len(ahead))]]
    ranked = sorted(shown, key=lambda each: -each.tokens_per_second)
    plain = calibration.plain
    rows = [_row(each, runs.get(each), plain, runs[plain]) for each in (plain, *ranked)]
    names = [
        "exit", "width", "acceptance", "tokens/tick", "tick", "predicted tokens/s",
        "predicted speed-up",
        "measured tokens/s", "measured speed-up", "predicted/ measured", "needed acceptance",
    ]  # fmt: skip
    left = len(calibration.candidates) - len(shown)
    return TableData(
        "Candidates",
        (Column("decoder"), *(Column(name, numeric=True) for name in names), Column("limit")),
        tuple(rows),
        f"{left} slower ones are left out." if left > 0 else "",
    )


def times_table(calibration: Calibration) -> TableData | None:
    """What the parts of a stage take; None where only whole ticks were measured."""
    if not calibration.parts:
        return None
    heads = [name for name, _ in calibration.parts[0].heads]  # of a chain: all of them
    deep = list(dict.fromkeys(name for part in calibration.parts for name, _ in part.second))
    rows = []
    busiest = max(part.busy for part in calibration.parts)
    for part in calibration.parts:
        if part.width > 1 and part.busy < busiest:
            continue
        at_length = part.layer + part.slot * calibration.length
        own = dict(part.heads)
        rows.append(
            (
                f"{part.device}, {part.threads} thread{'s' * (part.threads > 1)}, "
                f"{part.busy} of the stages at work"
                + (f", width {part.width}" if part.width > 1 else ""),
                milliseconds(at_length),
                milliseconds(part.fixed),
                milliseconds(part.lm),
                *(milliseconds(own.get(name)) for name in heads),
                *(milliseconds(dict(part.second).get(name)) for name in deep),
            )
        )
    columns = ["layer", "every stage", "LM matrix", *(_head_name(name) for name in heads)]
    columns += [f"{_head_name(name)}, second depth" for name in deep]
    note = ""
    if calibration.boundary is not None:
        edge = calibration.boundary
        note = (
            f"From a stage to the next {milliseconds(edge.hop)}; a stage at work takes "
            f"{milliseconds(edge.turn_alone)} more than its parts alone, "
            f"{milliseconds(edge.turn_busy)} beside others. Cache length {calibration.length:.0f}."
        )
        if edge.shared_alone > 1 or edge.shared_busy > 1:
            note += (
                f" Stages that share a core take {edge.shared_alone:.2f} times their work of it, "
                f"{edge.shared_busy:.2f} times with every core busy."
            )
    return TableData(
        "Times",
        (Column("stages"), *(Column(name, numeric=True) for name in columns)),
        tuple(rows),
        note,
    )


def head_table(calibration: Calibration) -> TableData | None:
    """How often the target is among the best guesses of each head."""
    if not calibration.heads:
        return None
    return TableData(
        "Heads: target among the best guesses",
        (Column("head"), *(Column(n, numeric=True) for n in ("exit", "1", "2", "4", "8"))),
        tuple(
            (name, str(head.exit_layer), *map(percent, top))
            for head in calibration.heads
            for name, top in ((head.name, head.top), (f"{head.name}, second depth", head.second))
            if top is not None
        ),
    )


def whole_table(calibration: Calibration) -> TableData | None:
    """Whole answers as they were run, the time to the first token counted."""
    runs = [each for each in calibration.checked if each.first_token and each.end_to_end]
    if len(runs) < 2 or runs[0].candidate.head is not None:
        return None
    plain = runs[0]
    assert plain.first_token is not None
    assert plain.end_to_end is not None
    rows = []
    for each in runs:
        assert each.end_to_end is not None
        name = _name(each.candidate) + _width(each.candidate)
        rows.append(
            (
                name,
                milliseconds(each.first_token),
                number(each.end_to_end),
                number(each.end_to_end / plain.end_to_end, 2),
                NOTHING if each is plain else _overtakes(each, plain),
            )
        )
    prompt = calibration.length - calibration.answer_tokens / calibration.answers / 2
    names = ("first token", "tokens/s from end to end", "speed-up", "faster from")
    return TableData(
        "Whole answers, as run",
        (Column("decoder"), *(Column(name, numeric=True) for name in names)),
        tuple(rows),
        f"Prompts of {prompt:.0f} tokens, answers of "
        f"{calibration.answer_tokens / calibration.answers:.0f} (means).",
    )


def _overtakes(run: Checked, plain: Checked) -> str:
    """The answer length from which a whole answer comes sooner than plain decoding's."""
    assert run.first_token is not None
    assert plain.first_token is not None
    late, gain = run.first_token - plain.first_token, 1 / plain.speed - 1 / run.speed
    if gain <= 0:
        return "never" if late >= 0 else NOTHING
    return f"{max(1, ceil(1 + late / gain))} tokens"


def remarks(calibration: Calibration) -> list[str]:
    """Where a head would pay, and what the chosen setting needs in memory."""
    lines = []
    found = calibration.suggestion
    if found is not None:
        where = f"exit {found.exit_layer}, split {_layers(found.split)}"
        lines.append(
            f"A head is most worth training at {where}: {percent(found.needed, 0)} of its guesses "
            f"must be right to reach ar (raw exit: target in the best 8 {percent(found.raw, 0)}; "
            f"agreement with the next layer {percent(found.agreement, 0)})."
        )
    else:
        lines.append("No exit layer's tick is short enough for any head to reach ar here.")
    for each in calibration.memory:
        lines.append(
            f"Memory on {each.device}: {size(each.needed)} needed, {size(each.available)} free."
        )
    return lines


def _row(
    candidate: Candidate, run: Checked | None, plain: Candidate, plain_run: Checked
) -> tuple[str, ...]:
    measured = NOTHING
    if run is not None:
        measured = f"{number(run.speed)} ({number(run.low)}-{number(run.high)})"
    speedup = candidate.tokens_per_second / plain.tokens_per_second
    needed = candidate.needed
    return (
        _name(candidate),
        number(candidate.exit_layer, 0),
        NOTHING if candidate.head is None else _shape(candidate),
        percent(candidate.acceptance),
        number(candidate.tokens_per_tick, 2),
        milliseconds(candidate.tick_seconds),
        number(candidate.tokens_per_second),
        number(speedup, 2),
        measured,
        NOTHING if run is None else number(run.speed / plain_run.speed, 2),
        NOTHING if run is None else number(1 + run.error, 2),
        NOTHING if needed is None else "none is enough" if needed >= 1 else percent(max(0, needed)),
        candidate.limit or NOTHING,
    )


def _name(candidate: Candidate) -> str:
    threads = f", {candidate.threads} threads" if candidate.threads > 1 else ""
    if candidate.head is None:
        return f"{candidate.decoder}{threads}"
    split = _layers(candidate.split)
    return f"{candidate.decoder} {split} {_head_name(candidate.head)}{threads}"


def _width(candidate: Candidate) -> str:
    depth = f", depth {candidate.depth}" if candidate.depth > 1 else ""
    return f", width {candidate.width}{depth}" if candidate.width > 1 else ""


def _shape(candidate: Candidate) -> str:
    """Width, and the depth where it is another than 1."""
    depth = f", depth {candidate.depth}" if candidate.depth > 1 else ""
    return f"{candidate.width}{depth}"


def _split(candidate: Candidate) -> str:
    return _layers(candidate.split)


def _layers(split: tuple[int, ...]) -> str:
    return ",".join(map(str, split))


def _head_name(name: str) -> str:
    stand_ins = {"raw": "raw exit", "random:deep": "stand-in head"}
    return stand_ins.get(name, name.rsplit("/", 1)[-1])
