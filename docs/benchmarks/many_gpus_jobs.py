"""Parts of ``many_gpus.py`` as processes of their own: started, watched, and ended in time.

A worker gets a ``Job`` as JSON in a file, and writes what it found, line by line, into another;
so whatever was measured before a part ended in any way is kept.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from many_gpus_plan import LINKS, Link, Part, Setup

from ppsd_cli.errors import PpsdError

HERE = Path(__file__).parent
WORKERS = {"ppsd": "many_gpus_ppsd.py", "one": "many_gpus_ppsd.py", "tp": "many_gpus_tp.py"}
_GRACE = 20.0
"""Seconds that the other ranks may go on when one has ended well."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one worker is to do. ``links``: those that are still wanted. ``out``: its lines."""

    setup: Setup
    part: Part
    links: tuple[Link, ...]
    out: Path

    def save(self, path: Path) -> None:
        """For the worker."""
        data = {
            "setup": self.setup.to_json(),
            "part": asdict(self.part),
            "links": [link.name for link in self.links],
            "out": str(self.out),
        }
        path.write_text(json.dumps(data))

    @classmethod
    def load(cls, path: Path) -> "Job":
        """The inverse of ``save``."""
        data = json.loads(path.read_text())
        part = Part(**data["part"] | {"links": tuple(data["part"]["links"])})
        links = tuple(LINKS[name] for name in data["links"])
        return cls(Setup.from_json(data["setup"]), part, links, Path(data["out"]))

    def tell(self, **line: Any) -> None:
        """Write a line at once."""
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def link(self, link: Link, figures: dict[str, Any]) -> None:
        """A link's figures."""
        self.tell(link=link.name, figures=figures)
        say(f"{self.part.name} {link.name}: {json.dumps(figures)}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended: ``done``, ``refused``, ``failed`` or ``timed out``, and why."""

    state: str
    why: str | None
    seconds: float
    links: dict[str, Any]
    facts: dict[str, Any]


def say(text: str) -> None:
    """Progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def worker(work: Callable[[Job], None]) -> None:
    """Run a worker's job; whatever ends it stands in its lines."""
    job = Job.load(Path(sys.argv[1]))
    try:
        work(job)
    except PpsdError as error:
        job.tell(refused=str(error))
    except BaseException as error:
        job.tell(failed=f"{type(error).__name__}: {error}".splitlines()[0])
        raise


def run_part(part: Part, setup: Setup, links: Sequence[str], *, seconds: float) -> Outcome:
    """Measure the wanted links of a part, for at most so long."""
    begin = monotonic()
    ended, lines = "", []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for group in _groups(part, [LINKS[link] for link in links]):
            job = Job(setup, part, group, folder / f"{group[0].name}.jsonl")
            job.save(folder / "job.json")
            left = seconds - (monotonic() - begin)
            ended = _watch(_start(job, folder), seconds=left) or ended
            lines += _lines(job.out)
    return _outcome(lines, links, ended, monotonic() - begin)


def _groups(part: Part, links: Sequence[Link]) -> list[tuple[Link, ...]]:
    """Links that one group of processes can measure: NCCL chooses its way when it starts."""
    if part.kind != "tp":
        return [tuple(links)]
    ways = [tuple(k for k in links if k.through_host == host) for host in (False, True)]
    return [way for way in ways if way]


def _start(job: Job, folder: Path) -> list[subprocess.Popen[bytes]]:
    """The job's processes, each in a group of its own."""
    count = job.part.count if job.part.kind == "tp" else 1
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if job.setup.devices == 0:
        environment |= {"TRITON_INTERPRET": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if job.part.kind == "tp":
        # Multicast is not used; without this its memory is set up all the same.
        environment["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        if job.links[0].through_host:
            environment["NCCL_P2P_DISABLE"] = "1"
    meeting = folder / f"{job.out.stem}.meeting"
    script = [sys.executable, str(HERE / WORKERS[job.part.kind]), str(folder / "job.json")]
    return [
        subprocess.Popen(
            script,
            env=environment | {"RANK": str(rank), "MEETING": str(meeting)},
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        for rank in range(count)
    ]


def _watch(processes: list[subprocess.Popen[bytes]], *, seconds: float) -> str:
    """Wait; then end what is left. Says what was wrong: nothing, ``failed`` or ``timed out``."""
    deadline, wrong = monotonic() + seconds, ""
    try:
        while any(p.poll() is None for p in processes):
            codes = [p.poll() for p in processes]
            if any(code for code in codes):
                wrong = "failed"
                deadline = min(deadline, monotonic() + 2)
            elif any(code == 0 for code in codes):
                deadline = min(deadline, monotonic() + _GRACE)
            if monotonic() > deadline:
                return wrong or "timed out"
            sleep(0.05)
        return "failed" if any(p.returncode for p in processes) else ""
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(path: Path) -> list[dict[str, Any]]:
    """What was written, whole lines only."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _outcome(
    lines: list[dict[str, Any]], wanted: Sequence[str], ended: str, seconds: float
) -> Outcome:
    links = {line["link"]: line["figures"] for line in lines if "link" in line}
    facts: dict[str, Any] = {}
    for line in lines:
        facts |= line.get("facts", {})
    refused = next((line["refused"] for line in lines if "refused" in line), None)
    failed = next((line["failed"] for line in lines if "failed" in line), None)
    if refused is not None:
        return Outcome("refused", refused, seconds, links, facts)
    if all(name in links for name in wanted):
        return Outcome("done", failed, seconds, links, facts)
    why = failed or f"ended after {seconds:.0f} s"
    return Outcome(ended or "failed", why, seconds, links, facts)
