"""A run against an earlier one: what moved beyond the noise of both."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd_cli.bench_records import GateFailure, Interval, Movement, Sample
from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.tasks.bench.export import SCHEMA_VERSION, sample_from
from ppsd_cli.tasks.bench.figures import (
    Values,
    bootstrap,
    by_prompt,
    decode_rate,
    first_token,
    paired,
)

NOISE = 0.03
"""Movements of less than this share are noise whatever the intervals say."""
_SETTINGS = ("max_new_tokens", "ignore_eos")
_SHOWN = ("dtype", "split", "devices", "head", "threads")


@dataclass(frozen=True, slots=True)
class Baseline:
    """What an earlier run's JSON says, as far as a comparison needs it."""

    path: Path
    model_hash: str
    model: str
    tasks: tuple[str, ...]
    prompt_checksum: str
    environment: dict[str, str]
    settings: dict[str, str]
    samples: tuple[Sample, ...]
    incomplete: bool = False


def read_baseline(path: Path) -> Baseline:
    """The JSON of an earlier run; AssetError where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AssetError(f"--baseline {path}: {error.strerror}") from error
    except ValueError as error:
        raise AssetError(f"--baseline {path}: no JSON of `ppsd bench --json` ({error})") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or "samples" not in data:
        raise AssetError(
            f"--baseline {path}: no JSON of `ppsd bench --json` with schema version "
            f"{SCHEMA_VERSION} (it says {version})"
        )
    try:
        return _parse(path, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AssetError(f"--baseline {path}: a field is missing or wrong ({error!r})") from error


def check_same(
    old: Baseline, *, model: tuple[str, str], tasks: Sequence[str], checksum: str
) -> None:
    """ConfigError where the earlier run answered other prompts or with another model.

    ``model``: name and hash of this run's.
    """
    if old.model_hash != model[1]:
        raise ConfigError(
            f"--baseline {old.path}: it measured {old.model} ({old.model_hash[:19]}), "
            f"this run measures {model[0]} ({model[1][:19]})"
        )
    if old.tasks != tuple(tasks):
        raise ConfigError(
            f"--baseline {old.path}: it ran {','.join(old.tasks)}, this run {','.join(tasks)}"
        )
    if old.prompt_checksum != checksum:
        raise ConfigError(
            f"--baseline {old.path}: its prompts are {old.prompt_checksum[:19]}, those of this "
            f"run {checksum[:19]}; use the same --limit and files"
        )


def check_settings(
    old: Baseline, settings: dict[str, str], environment: dict[str, str]
) -> list[str]:
    """Notes on what else differs; ConfigError for settings that make figures incomparable."""
    for name in _SETTINGS:
        if old.settings.get(name) != settings.get(name):
            raise ConfigError(
                f"--baseline {old.path}: {name} was {old.settings.get(name)}, "
                f"in this run {settings.get(name)}"
            )
    pairs = [(name, old.settings.get(name), settings.get(name)) for name in _SHOWN]
    names = [n for n in {**old.environment, **environment} if n in _MACHINE or n in _VERSIONS]
    pairs += [(name, old.environment.get(name), environment.get(name)) for name in names]
    notes = [f"baseline: {n} was {a}, in this run {b}" for n, a, b in pairs if a != b]
    if old.incomplete:
        notes.append("baseline: that run was stopped, so only what it measured is compared")
    return notes


_MACHINE = ("machine", "cpu", "cores", "gpus")
_VERSIONS = ("ppsd", "torch", "transformers")


def movements(
    old: Sequence[Sample], new: Sequence[Sample], *, seed: int, noise: float = NOISE
) -> list[Movement]:
    """Decode speed, time to the first token and speed-up of every contender of both runs.

    EESD with another draft length is the same contender.
    """
    names = list(dict.fromkeys(s.contender for s in new))
    found: list[Movement] = []
    for name in names:
        before = [s for s in old if _kind(s.contender) == _kind(name)]
        after = [s for s in new if s.contender == name]
        if not before or not after:
            continue
        for figure, values, higher_is_better in _COMPARED:
            move = _compare(values(before, old), values(after, new), seed=seed)
            if move is not None:
                verdict = _verdict(move[2], noise, higher_is_better=higher_is_better)
                found.append(Movement(name, figure, *move, verdict))
    return found


def missing(old: Sequence[Sample], new: Sequence[Sample]) -> list[GateFailure]:
    """A gate failure for every contender of the old run that this one did not measure."""
    here = {_kind(s.contender) for s in new}
    gone = dict.fromkeys(s.contender for s in old if _kind(s.contender) not in here)
    return [
        GateFailure(f"baseline:missing@{name}", f"{name} is in the baseline and was not run")
        for name in gone
    ]


def _kind(contender: str) -> str:
    """A contender's name without EESD's draft length, which trials choose anew in every run."""
    return re.sub(r"^eesd-\d+", "eesd", contender)


def slowdowns(moves: Sequence[Movement]) -> list[GateFailure]:
    """A gate failure for everything that got slower beyond the noise.

    A speed-up that fell is no failure by itself: plain decoding may have become faster.
    """
    return [
        GateFailure(
            f"baseline:{move.figure}@{move.contender}",
            f"{move.contender} got slower: {move.figure} {move.before:.4g} -> {move.after:.4g} "
            f"({move.ratio.median:.3f} times, 95% interval {move.ratio.low:.3f} to "
            f"{move.ratio.high:.3f})",
        )
        for move in moves
        if move.verdict == "slower" and move.figure != "speedup"
    ]


def _rates(samples: Sequence[Sample], _run: Sequence[Sample]) -> Values:
    return by_prompt(samples, decode_rate)


def _firsts(samples: Sequence[Sample], _run: Sequence[Sample]) -> Values:
    return by_prompt(samples, first_token)


def _speedups(samples: Sequence[Sample], run: Sequence[Sample]) -> Values:
    if samples[0].contender == "ar":
        return {}
    plain = by_prompt((s for s in run if s.contender == "ar"), decode_rate)
    return paired(by_prompt(samples, decode_rate), plain)


_Figure = Callable[[Sequence[Sample], Sequence[Sample]], Values]
_COMPARED: tuple[tuple[str, _Figure, bool], ...] = (
    ("tokens_per_second", _rates, True),
    ("first_token_seconds", _firsts, False),
    ("speedup", _speedups, True),
)


def _compare(old: Values, new: Values, *, seed: int) -> tuple[float, float, Interval] | None:
    """Medians before and after over the prompts of both, and the interval of their ratios."""
    ratios = paired(new, old)
    ratio = bootstrap(list(ratios.values()), seed=seed)
    before = bootstrap([old[p] for p in ratios], seed=seed)
    after = bootstrap([new[p] for p in ratios], seed=seed)
    if ratio is None or before is None or after is None:
        return None
    return before.median, after.median, ratio


def _verdict(ratio: Interval, noise: float, *, higher_is_better: bool) -> str:
    if ratio.low > 1 + noise:
        return "faster" if higher_is_better else "slower"
    if ratio.high < 1 - noise:
        return "slower" if higher_is_better else "faster"
    return "same"


def _parse(path: Path, data: dict[str, Any]) -> Baseline:
    return Baseline(
        path=path,
        model_hash=data["model_hash"],
        model=data["model"],
        tasks=tuple(task["name"] for task in data["tasks"]),
        prompt_checksum=data["prompt_checksum"],
        environment=dict(data["environment"]),
        settings=dict(data["settings"]),
        samples=tuple(sample_from(each) for each in data["samples"]),
        incomplete=bool(data["incomplete"]),
    )
