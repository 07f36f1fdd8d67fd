"""Samples on disk as they are measured, so that an interrupted run can go on.

One JSON object a line: a header (settings, and what was decided before measuring), then samples,
differences that were found later, and peak memory.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ppsd_cli.bench_records import Contender, Difference, Key, Sample
from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.files import append_line, replace_bytes
from ppsd_cli.tasks.bench.export import (
    SCHEMA_VERSION,
    contender_data,
    contender_from,
    sample_data,
    sample_from,
)

Place = tuple[str, Key]


@dataclass(slots=True)
class Journal:
    """What was measured so far, in memory and in a file, which the first sample makes."""

    path: Path
    settings: dict[str, str]
    contenders: tuple[Contender, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    samples: dict[Place, Sample] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    begun: bool = False

    def _begin(self) -> None:
        """Write the header of a new file."""
        header = {
            "kind": "header",
            "schema_version": SCHEMA_VERSION,
            "settings": self.settings,
            "contenders": [contender_data(each) for each in self.contenders],
            "skipped": [list(pair) for pair in self.skipped],
        }
        replace_bytes(self.path, (json.dumps(header) + "\n").encode())
        self.begun = True

    def add(self, sample: Sample) -> None:
        """Keep one sample."""
        self.samples[sample.contender, sample.key] = sample
        self._write({"kind": "sample", **sample_data(sample)})

    def judge(self, sample: Sample, difference: Difference) -> Sample:
        """Add to a kept sample how it differs from AR's; the sample as it is now."""
        place = sample.contender, sample.key
        self.samples[place] = replace(self.samples[place], difference=difference)
        entry = {"contender": sample.contender, "key": asdict(sample.key)}
        self._write({"kind": "difference", **entry, "difference": asdict(difference)})
        return self.samples[place]

    def remember_memory(self, contender: str, size: int) -> None:
        """Peak memory of a contender in bytes; the largest counts. Nothing before a sample."""
        if self.samples and size > self.memory.get(contender, 0):
            self.memory[contender] = size
            self._write({"kind": "memory", "contender": contender, "bytes": size})

    def of(self, contender: str) -> list[Sample]:
        """All samples of one contender, in the order in which they were taken."""
        return [s for (name, _), s in self.samples.items() if name == contender]

    def _write(self, entry: Mapping[str, Any]) -> None:
        if not self.begun:
            self._begin()
        append_line(self.path, json.dumps(entry))


def read_journal(path: Path) -> Journal:
    """A journal from its file; AssetError where that is none. A last line cut short is dropped."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AssetError(f"--resume {path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise AssetError(f"--resume {path}: {error.strerror}") from error
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        whole = text[: len(text) - len(lines.pop())]
        replace_bytes(path, whole.encode())
    try:
        return _parse(path, [json.loads(line) for line in lines])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise AssetError(
            f"--resume {path}: no journal of `ppsd bench`; name another file for a new one"
        ) from error


def check_journal(journal: Journal, settings: Mapping[str, str]) -> None:
    """ConfigError that names the first setting in which a journal differs from this run."""
    for name in {**journal.settings, **settings}:
        before, now = journal.settings.get(name), settings.get(name)
        if before != now:
            raise ConfigError(
                f"--resume {journal.path}: it was begun with {name} = {before}, this run has "
                f"{name} = {now}; use the same settings, or another file"
            )


def _parse(path: Path, entries: Sequence[Mapping[str, Any]]) -> Journal:
    header = entries[0]
    if header["kind"] != "header" or header["schema_version"] != SCHEMA_VERSION:
        raise ValueError("no header")
    journal = Journal(
        path,
        dict(header["settings"]),
        tuple(contender_from(each) for each in header["contenders"]),
        tuple((name, reason) for name, reason in header["skipped"]),
        begun=True,
    )
    for entry in entries[1:]:
        kind = entry["kind"]
        if kind == "sample":
            sample = sample_from({n: v for n, v in entry.items() if n != "kind"})
            journal.samples[sample.contender, sample.key] = sample
        elif kind == "difference":
            place = entry["contender"], Key(**entry["key"])
            judged = replace(journal.samples[place], difference=Difference(**entry["difference"]))
            journal.samples[place] = judged
        elif kind == "memory":
            journal.memory[entry["contender"]] = entry["bytes"]
    return journal
