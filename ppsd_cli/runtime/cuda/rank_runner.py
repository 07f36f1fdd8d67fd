"""The graph runner over ranks: rank 0 decides and reads, and every rank launches the same ticks.

Rank 0 tells the others each plan when it launches it itself, some ticks ahead of the results. So
their hosts follow without waiting for any device, and what the devices do is paired by order.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, cast

import torch

from ppsd_cli.core.plan import Plan, Request
from ppsd_cli.errors import StageError
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.crew import Fetched
from ppsd_cli.runtime.cuda.prefill import Prefill
from ppsd_cli.runtime.cuda.rank_crew import RankCrew
from ppsd_cli.runtime.cuda.rank_prefill import RankPrefill
from ppsd_cli.runtime.cuda.runner import GraphRunner
from ppsd_cli.runtime.pipeline import PipelineConfig


class RankRunner(GraphRunner):
    """One rank's runner. At rank 0 it answers plans; others only follow them."""

    def __init__(
        self,
        config: PipelineConfig,
        stage: Stage,
        head: DraftHead | None,
        crew: RankCrew,
        *,
        tell: Callable[[Plan], None],
    ) -> None:
        """``tell``: has the other ranks follow a plan.

        ``broken`` says afterwards that a tick was not launched whole.
        """
        vocabulary = stage.spec.vocabulary
        part = RankPrefill(config, crew, head, vocabulary=vocabulary)
        super().__init__([stage], head, crew, chunk=config.chunk, prefill=cast(Prefill, part))
        self._part, self._links, self._ranks_crew = part, crew.links, crew
        self._ranks, self._tell_others = config.stages, tell
        self.broken = False

    @property
    def stages(self) -> int:
        """Number of stages, one a rank."""
        return self._ranks

    def submit(self, plan: Plan) -> None:
        """Launch one tick here and everywhere."""
        with _Held():
            try:
                self._tell_others(plan)
                super().submit(plan)
            except BaseException as error:
                self.broken = True
                self._links.abort()  # others may never send what is awaited
                if isinstance(error, StageError):
                    self._ranks_crew.look()
                raise
        if self._part.failure is not None:
            raise self._part.failure


class Follower(RankRunner):
    """The runner of a rank after 0."""

    @torch.inference_mode()
    def follow(self, plan: Plan) -> None:
        """Launch what rank 0 launches."""
        GraphRunner.submit(self, plan)
        self._asked.clear()

    def _fetch(self, request: Request) -> tuple[Fetched, tuple[torch.Tensor, ...]]:
        """Nobody reads results here."""
        del request
        return Fetched([], []), ()


class _Held:
    """Ctrl-C and SIGTERM wait until all ranks have been told and the tick is launched.

    Otherwise some would wait for a tick that others never launch. A second one ends the process.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._noted: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None and self._noted:
            signal.raise_signal(self._noted[0][0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            os._exit(128 + number)
        self._noted.append((number, frame))
