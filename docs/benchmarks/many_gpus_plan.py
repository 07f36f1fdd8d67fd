"""What a run of ``many_gpus.py`` consists of, and what its figures mean. Pure: needs no torch.

A *part* is one process (or one group of processes) with weights of its own: PPSD over so many
devices, tensor parallelism over as many, or plain decoding on one. A part measures every *link*:
what boundaries (all-reduces for tensor parallelism) go over.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.tasks.bench.forced import chain_speedup

COUNTS = (2, 4, 8)
KINDS = ("chain", "tree", "two_depths")
"""What PPSD is asked for."""
BETWEEN = (3, 6)
"""Stage counts that are run for the fixed cost of a tick only."""
MISSED_AMONG_FOUR = 0.45
"""Share of first guesses' misses that the best four miss, too: shipped 3-stage head, MT-Bench."""


@dataclass(frozen=True, slots=True)
class Link:
    """``through_host``: copies through host memory. ``delay``: seconds added at each boundary."""

    name: str
    through_host: bool
    delay: float


LINKS = {
    link.name: link
    for link in (
        Link("peer", False, 0.0),
        Link("host", True, 0.0),
        Link("host+50us", True, 50e-6),
        Link("host+200us", True, 200e-6),
        Link("host+1000us", True, 1000e-6),
    )
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured. A report is continued only with the same one.

    ``devices``: GPUs of this host, 0 for its CPU (kernels in Triton's interpreter). ``layers``: of
    each shape, None for all. ``acceptance`` on the first link, in so many ``answers`` of so many
    ``tokens``; ``slow_acceptance`` on the others, in one. ``missed``: share of the best guesses'
    misses that the best four miss, too. ``depth`` 2: also trees of two depths a tick, and a head
    that goes on from its own state.
    """

    shapes: tuple[str, ...]
    counts: tuple[int, ...]
    devices: int
    layers: int | None = None
    tokens: int = 128
    answers: int = 2
    prompt: int = 32
    acceptance: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0)
    slow_acceptance: tuple[float, ...] = (0.6, 0.8, 1.0)
    width: int = 4
    missed: float = MISSED_AMONG_FOUR
    depth: int = 1
    links: tuple[str, ...] = tuple(LINKS)
    variants: tuple[str, ...] = ("eager", "compiled", "one-shot")

    def to_json(self) -> dict[str, Any]:
        """Plain data; tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Setup":
        """The inverse of ``to_json``."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


@dataclass(frozen=True, slots=True)
class Part:
    """``kind``: ``ppsd``, ``tp`` or ``one``. ``played``: one device plays several."""

    kind: str
    shape: str
    count: int
    links: tuple[str, ...]
    played: bool = False

    @property
    def name(self) -> str:
        """For ``--parts`` and the report."""
        return f"{self.shape}/{self.kind}/{self.count}"


def counts_for(devices: int) -> tuple[int, ...]:
    """Numbers of GPUs to compare on a host with so many: all of 2, 4, 8, and those that it has.

    A host with fewer than two plays two.
    """
    if devices < 2:
        return (2,)
    return tuple(sorted({n for n in COUNTS if n <= devices} | {devices}))


def parts_of(setup: Setup) -> list[Part]:
    """All parts, the largest first: what matters most comes before a budget ends."""
    found = []
    for shape in setup.shapes:
        for count in sorted(setup.counts, reverse=True):
            played = count > setup.devices
            found.append(Part("ppsd", shape, count, setup.links, played))
            ranks = count if setup.devices == 0 else min(count, setup.devices)
            found.append(Part("tp", shape, ranks, setup.links, played and setup.devices == 0))
        found.append(Part("one", shape, 1, setup.links[:1]))
        found += [
            Part("ppsd", shape, n, setup.links[:1])
            for n in BETWEEN
            if n <= setup.devices and n not in setup.counts
        ]
    return list(dict.fromkeys(found))


def chosen(parts: Sequence[Part], patterns: Sequence[str]) -> list[Part]:
    """The parts that any of the patterns names (``*`` as in file names); all without patterns."""
    return [p for p in parts if not patterns or any(fnmatchcase(p.name, x) for x in patterns)]


def missing(part: Part, record: dict[str, Any] | None) -> tuple[str, ...]:
    """Links of a part that are not in the report yet; none of a part that cannot run here."""
    if record is None:
        return part.links
    if record["state"] == "refused":
        return ()
    return tuple(name for name in part.links if name not in record["links"])


def spec_for(shape: str, layers: int | None) -> ModelSpec:
    """A named shape, or its first layers."""
    spec = SHAPES[shape]
    count = min(layers or spec.layers, spec.layers)
    return replace(spec, layers=count, windows=spec.windows[:count])


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where PPSD passes a rival. ``kind``: ``at`` an acceptance, ``always`` or ``never`` within
    what was measured, whose ends are ``low`` and ``high``.
    """

    kind: str
    acceptance: float | None
    low: float
    high: float


def crossing(points: Sequence[tuple[float, float]], rival: float) -> Crossing | None:
    """The acceptance from which on PPSD is no slower than ``rival`` (times per token, any unit).

    ``points``: measured acceptance and time per token. Between two of them the time is taken as
    straight, which for chains it is: ticks per token fall in proportion to the acceptance.
    """
    if not points:
        return None
    line = sorted(points)
    low, high = line[0][0], line[-1][0]
    if line[-1][1] > rival:
        return Crossing("never", None, low, high)
    for (a, slow), (b, fast) in zip(line[-2::-1], line[:0:-1], strict=True):
        if slow > rival:
            return Crossing("at", a + (b - a) * (slow - rival) / (slow - fast), low, high)
    return Crossing("always", None, low, high)


def among_of(acceptance: float, missed: float = MISSED_AMONG_FOUR) -> float:
    """How often the right token is among the best four where the best is right so often."""
    return 1 - (1 - acceptance) * missed


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Speed-ups, crossings and fixed costs, by shape, devices and link, of what was measured."""
    parts, found = report["parts"], {}
    for shape in report["setup"]["shapes"]:
        mine = {k: p for k, p in parts.items() if p["shape"] == shape and p["links"]}
        pipelines = sorted((p for p in mine.values() if p["kind"] == "ppsd"), key=_count)
        if not pipelines:
            continue
        one = _plain(mine.get(f"{shape}/one/1"))
        found[shape] = {
            "one_gpu_ms": one,
            "fixed_ms": {
                str(p["count"]): figures["fixed_ms"]
                for p in pipelines
                for figures in (next(iter(p["links"].values())),)
            },
            "pipelines": {
                str(p["count"]): {
                    name: _against(figures, _rival(mine, p, name), one, p["count"])
                    for name, figures in p["links"].items()
                }
                for p in pipelines
            },
        }
    return found


def _count(part: dict[str, Any]) -> int:
    return int(part["count"])


def _plain(part: dict[str, Any] | None) -> float | None:
    links = {} if part is None else part["links"]
    return next((float(figures["naive"]["token_ms"]) for figures in links.values()), None)


def _rival(mine: dict[str, Any], part: dict[str, Any], link: str) -> float | None:
    """Milliseconds per token of tensor parallelism over as many devices and the same link."""
    for other in mine.values():
        if other["kind"] == "tp" and other["count"] == part["count"] and link in other["links"]:
            return float(other["links"][link]["token_ms"])
    return None


def _against(
    figures: dict[str, Any], rival: float | None, one: float | None, count: int
) -> dict[str, Any]:
    """One pipeline over one link: its rows with ratios, and where it passes the rival."""
    naive = figures["naive"]["token_ms"]
    found: dict[str, Any] = {"naive_ms": naive, "tensor_parallel_ms": rival}
    for kind in KINDS:
        rows = figures.get(kind)
        if not isinstance(rows, list):
            found[kind] = rows
            continue
        found[kind] = [_row(row, (naive, one, rival), count, kind) for row in rows]
        if rival is not None:
            passed = crossing([(r["realised"], r["token_ms"]) for r in rows], rival)
            found[f"{kind}_passes_tensor_parallel"] = passed and asdict(passed)
    return found


def _row(
    row: dict[str, Any],
    others: tuple[float, float | None, float | None],
    count: int,
    kind: str,
) -> dict[str, Any]:
    """Ratios of one row; ``others``: naive split, one GPU, tensor parallelism, ms per token."""
    ms = row["token_ms"]
    naive, one, rival = (None if other is None else other / ms for other in others)
    found = {
        "acceptance": row["acceptance"],
        "realised": row["realised"],
        "tokens_per_second": 1e3 / ms,
        "over_naive_split": naive,
        "over_one_gpu": one,
        "over_tensor_parallel": rival,
    }
    if kind == "chain" and naive is not None:
        found["share_of_ideal"] = naive / chain_speedup(count, row["realised"])
    return found
