"""A report and its samples as plain data for JSON, and samples back from it.

docs/json.md describes the fields; data/schema/bench.json checks them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ppsd_cli.bench_records import (
    BenchReport,
    Contender,
    Counts,
    Difference,
    Figures,
    Key,
    Row,
    Sample,
)

SCHEMA_VERSION = 1


def report_data(report: BenchReport) -> dict[str, Any]:
    """The JSON object of a run."""
    return {
        "schema_version": report.schema_version,
        "task": ",".join(task.name for task in report.tasks),
        "tasks": [asdict(task) for task in report.tasks],
        "prompt_checksum": report.prompt_checksum,
        "model": report.model,
        "model_hash": report.model_hash,
        "incomplete": report.incomplete,
        "environment": dict(report.environment),
        "settings": dict(report.settings),
        "decoders": {row.contender.name: _row(row) for row in report.rows},
        "skipped": dict(report.skipped),
        "notes": list(report.notes),
        "failures": [asdict(failure) for failure in report.failures],
        "baseline": [asdict(move) for move in report.baseline],
        "samples": [sample_data(sample) for sample in report.samples],
    }


def contender_data(contender: Contender) -> dict[str, Any]:
    """A contender's settings as plain data."""
    data: dict[str, Any] = _plain(asdict(contender))
    return data


def contender_from(data: Mapping[str, Any]) -> Contender:
    """The inverse of ``contender_data``."""
    split, devices = tuple(data["split"]), tuple(data["devices"])
    return Contender(**{**data, "split": split, "devices": devices})


def sample_data(sample: Sample) -> dict[str, Any]:
    """A sample as plain data, with the parts of its key as fields of their own."""
    data = asdict(sample)
    flat: dict[str, Any] = _plain({**data.pop("key"), **data})
    return flat


def sample_from(data: Mapping[str, Any]) -> Sample:
    """The inverse of ``sample_data``; KeyError, TypeError or ValueError for anything else."""
    values = dict(data)
    names = ("task", "question_id", "category", "turn", "repetition")
    key = Key(**{name: values.pop(name) for name in names})
    counts, difference = values.pop("counts"), values.pop("difference")
    values["token_ids"] = tuple(values["token_ids"])
    return Sample(
        key=key,
        counts=None if counts is None else _counts(counts),
        difference=None if difference is None else Difference(**difference),
        **values,
    )


def _counts(data: Mapping[str, Any]) -> Counts:
    pairs = {name: tuple(map(tuple, data[name])) for name in ("runs", "stage_busy")}
    return Counts(**{**data, **pairs, "stage_seconds": tuple(data["stage_seconds"])})


def _row(row: Row) -> dict[str, Any]:
    settings = contender_data(row.contender)
    del settings["name"]
    return {
        **settings,
        "printed": row.printed,
        **_figures(row.overall),
        "categories": {name: _figures(figures) for name, figures in row.categories},
    }


def _figures(figures: Figures) -> dict[str, Any]:
    data: dict[str, Any] = _plain(asdict(figures))
    return data


def _plain(value: Any) -> Any:
    """Tuples as lists, at every depth."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
