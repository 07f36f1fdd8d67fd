"""The in-process runner: all stages in this process, one after the other within a tick.

It shows the schedule rather than its speed on a CPU; on a GPU it is the base of the graph runner.
"""

from collections import deque

from ppsd_cli.core.plan import Plan, TickResult
from ppsd_cli.runtime.frames import Frame, Return
from ppsd_cli.runtime.front import Front
from ppsd_cli.runtime.worker import StageWorker


class LocalLink:
    """Registers between stages of one process; ``advance`` is one tick of stages 1 to n-1."""

    def __init__(self, workers: list[StageWorker]) -> None:
        self._workers = workers
        self._registers: list[Frame | None] = [None] * (len(workers) + 1)
        self._sent: Frame | None = None
        self._returns: list[deque[Return]] = [deque() for _ in workers]

    def send(self, frame: Frame) -> None:
        """Stage 1 gets the frame at the next boundary."""
        self._sent = frame

    def advance(self) -> None:
        """Stages 1 to n-1 do the work of the tick that has ended, then everything moves on."""
        for index in reversed(range(len(self._workers))):
            frame = self._registers[index]
            if frame is None:
                self._registers[index + 1] = None
                continue
            ahead, back = self._workers[index].process(frame)
            self._registers[index + 1] = ahead
            self._returns[index].append(back)
        self._registers[0], self._sent = self._sent, None

    def receive(self, stage: int) -> Return:
        """What ``stage`` returned first of what has not been taken."""
        return self._returns[stage - 1].popleft()


class LocalRunner:
    """Answers plans in step, in the calling thread. Also drives stages of other processes."""

    def __init__(self, front: Front, *, stages: int) -> None:
        self._front, self._stages = front, stages
        self._plans: deque[Plan] = deque()

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self._stages

    @property
    def lookahead(self) -> int:
        """In step: a tick runs when its result is asked for."""
        return 0

    @property
    def pending(self) -> int:
        """Plans not yet run."""
        return len(self._plans)

    def submit(self, plan: Plan) -> None:
        """Queue one tick."""
        self._plans.append(plan)

    def collect(self) -> TickResult:
        """Run the oldest queued tick."""
        return self._front.tick(self._plans.popleft())

    def close(self) -> None:
        """Nothing to release."""
