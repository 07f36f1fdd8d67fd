"""The runner that gives every stage its own process on this host; the driver is none of them."""

import contextlib
import os
import selectors
import sys
from collections import deque
from collections.abc import Callable
from time import monotonic

from ppsd_cli.core.plan import Plan, TickResult
from ppsd_cli.errors import PpsdError, StageError
from ppsd_cli.runtime import children
from ppsd_cli.runtime.children import Child
from ppsd_cli.runtime.control import BEAT, FAILED, PLAN, READY, RESULT
from ppsd_cli.runtime.failures import PeerLost, unpack_failure
from ppsd_cli.runtime.heartbeat import SILENCE_SECONDS
from ppsd_cli.runtime.messages import pack_plan, unpack_result
from ppsd_cli.runtime.pipeline import PipelineConfig

_READY_SECONDS = 1800.0
_LOOK_SECONDS = 0.25
_CAUSE_SECONDS = 1.0
"""How long to look for the cause when stages report only that they lost each other."""


class Watch:
    """Listens to all children and tells what ended or silenced one of them."""

    def __init__(self, stages: list[Child]) -> None:
        self._stages = stages
        self._selector = selectors.DefaultSelector()
        self._heard = [monotonic()] * len(stages)
        self._reports: dict[int, PpsdError] = {}
        self._ended: set[int] = set()
        for child in stages:
            self._selector.register(child.channel, selectors.EVENT_READ, child)

    def messages(self, since: float) -> list[tuple[int, int, bytes]]:
        """Wait a moment for messages (stage, tag, body).

        Raises the error of a stage that has failed, died, or been silent since ``since`` (a time
        from which on somebody listens) for too long.
        """
        found = self._take_in(_LOOK_SECONDS)
        if not found:
            for child in self._stages:
                if child.process.poll() is not None:
                    self._ended.add(child.stage)
        if self._reports or self._ended:
            raise self._cause()
        now = monotonic()
        for child, heard in zip(self._stages, self._heard, strict=True):
            if now - max(heard, since) > SILENCE_SECONDS:
                raise StageError(
                    f"{child.name} has given no sign of life for {SILENCE_SECONDS:.0f} s"
                )
        return found

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        self._selector.close()

    def _take_in(self, timeout: float) -> list[tuple[int, int, bytes]]:
        found = []
        for key, _ in self._selector.select(timeout):
            child: Child = key.data
            child.channel.take_in()
            self._heard[child.stage] = monotonic()
            for tag, body in child.channel.messages():
                if tag == FAILED:
                    self._reports[child.stage] = unpack_failure(body, child.name)
                elif tag != BEAT:
                    found.append((child.stage, tag, body))
            if child.channel.ended:
                self._ended.add(child.stage)
                self._selector.unregister(child.channel)
        return found

    def _cause(self) -> PpsdError:
        """The failure behind the failures: peers of a dead stage fail as well."""
        deadline = monotonic() + _CAUSE_SECONDS
        while True:
            for error in self._reports.values():
                if not isinstance(error, PeerLost):
                    return error
            for child in self._stages:
                if child.stage not in self._reports and child.process.poll() is not None:
                    return StageError(_death(child))
            if monotonic() > deadline:
                break
            self._take_in(0.05)
        for stage, error in self._reports.items():
            return StageError(f"{self._stages[stage].name}: {error}")
        return StageError(f"{self._stages[min(self._ended)].name} closed its control channel")


class SpawnedRunner:
    """Answers plans by a process for each stage (``core.plan.Runner``)."""

    def __init__(self, stages: list[Child]) -> None:
        self._children = stages
        self._watch = Watch(stages)
        self._results: deque[TickResult] = deque()
        self._asked = 0
        self._failure: PpsdError | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self._children)

    @property
    def lookahead(self) -> int:
        """Two, so that stage 0 always has its next plan at hand."""
        return 2

    @property
    def pending(self) -> int:
        """Plans sent and not collected."""
        return self._asked

    @property
    def pids(self) -> list[int]:
        """Process ids by stage."""
        return [child.process.pid for child in self._children]

    def wait_ready(self, on_ready: Callable[[int], None] | None) -> None:
        """Until every stage has loaded and joined; ``on_ready`` gets each stage as it does."""
        begin = monotonic()
        waiting = set(range(self.stages))
        while waiting:
            for stage, tag, _ in self._hear(begin):
                assert tag == READY
                waiting.remove(stage)
                if on_ready is not None:
                    on_ready(stage)
            if monotonic() - begin > _READY_SECONDS:
                late = self._children[min(waiting)].name
                raise StageError(f"{late} was not ready after {_READY_SECONDS:.0f} s")

    def submit(self, plan: Plan) -> None:
        """Send one plan to stage 0."""
        if self._failure is not None:
            raise self._failure
        # Where stage 0 is gone, collecting finds out why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._children[0].channel.send(PLAN, pack_plan(plan))
        self._asked += 1

    def collect(self) -> TickResult:
        """The oldest result; the error of whichever stage failed, after ending all of them."""
        assert self._asked, "nothing was submitted"
        begin = monotonic()
        while not self._results:
            for _, tag, body in self._hear(begin):
                assert tag == RESULT
                self._results.append(unpack_result(body))
        self._asked -= 1
        return self._results.popleft()

    def close(self) -> None:
        """End all stage processes. Safe to call twice."""
        if self._failure is None:
            self._failure = StageError("the runner is closed")
        self._asked = 0
        self._watch.close()
        children.stop(self._children)

    def _hear(self, since: float) -> list[tuple[int, int, bytes]]:
        if self._failure is not None:
            raise self._failure
        try:
            return self._watch.messages(since)
        except PpsdError as error:
            self._failure = error
            if os.environ.get("PPSD_DEBUG") == "1":
                for child in self._children:
                    sys.stderr.write(child.printed())
            self.close()
            raise


def spawn_runner(
    config: PipelineConfig,
    *,
    port: int | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> SpawnedRunner:
    """Start a process for each stage and wait until all are ready.

    ``port``: for the rendezvous on 127.0.0.1; None takes a free one. Errors of a loading stage
    come back as they were raised there; ResourceError when the port is taken.
    """
    runner = SpawnedRunner(children.start(config, port=port))
    try:
        runner.wait_ready(on_ready)
    except BaseException:
        runner.close()
        raise
    return runner


def _death(child: Child) -> str:
    """How a process ended that could not say so itself."""
    code = child.process.returncode
    if code < 0:
        hint = " (out of memory?)" if code == -9 else ""
        return f"{child.name} was killed by signal {-code}{hint}"
    lines = child.printed().strip().splitlines()
    return f"{child.name} ended with status {code}" + (f": {lines[-1]}" if lines else "")
