"""Processes that time parts of a stage side by side, each on its share of the cores."""

import json
from dataclasses import asdict
from types import TracebackType
from typing import Self

from ppsd_cli.runtime import children
from ppsd_cli.runtime.children import Child
from ppsd_cli.runtime.control import PLAN, READY, RESULT
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.processes import Watch
from ppsd_cli.runtime.timing import Window, Work


class TimingGroup:
    """One process for each stage of ``config``; all work in the same windows of time."""

    def __init__(self, config: PipelineConfig, heads: tuple[str, ...]) -> None:
        """Start them and wait until all have loaded; the first also loads ``heads``."""
        shares = children.core_shares(config.stages)
        self._children: list[Child] = []
        self._watch: Watch | None = None
        try:
            for stage in range(config.stages):
                own = {"heads": list(heads) if stage == 0 else []}
                setup = children.place(stage, shares) | own
                self._children.append(children.launch("timing_main", config, setup))
            self._watch = Watch(self._children)
            self._gather(READY)
        except BaseException:
            self.close()
            raise

    def run(self, work: dict[int, Work], *, warm: float, seconds: float) -> dict[int, list[float]]:
        """Times of each turn by process; processes without work are idle.

        Errors of a process come back as they were raised there.
        """
        window = Window.soon(warm=warm, seconds=seconds)
        for child in self._children:
            own = work.get(child.stage)
            asked = {"work": None if own is None else asdict(own), "window": asdict(window)}
            child.channel.send(PLAN, json.dumps(asked).encode())
        found = self._gather(RESULT)
        return {stage: json.loads(found[stage]) for stage in work}

    def close(self) -> None:
        """End all processes. Safe to call twice."""
        if self._watch is not None:
            self._watch.close()
        children.stop(self._children)

    def _gather(self, wanted: int) -> dict[int, bytes]:
        """One message of that kind from every process."""
        assert self._watch is not None
        found: dict[int, bytes] = {}
        since = 0.0
        while len(found) < len(self._children):
            for stage, tag, body in self._watch.messages(since):
                assert tag == wanted
                found[stage] = body
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
