"""The decode loop: one for every runner, device and number of stages."""

from collections.abc import Iterator

from ppsd_cli.core.events import Event
from ppsd_cli.core.plan import Runner
from ppsd_cli.core.schedule import Schedule


def decode(runner: Runner, schedule: Schedule) -> Iterator[Event]:
    """Run one answer and yield what happened. Closing the generator ends the answer early.

    Plans go out up to ``runner.lookahead`` ahead of the results. On leaving, what was asked for
    is collected, so that the next answer starts with no result of this one outstanding; nodes
    that are still between stages are void by their serial numbers.
    """
    try:
        while not schedule.done:
            while runner.pending <= runner.lookahead:
                runner.submit(schedule.next_plan())
            yield from schedule.apply(runner.collect())
    finally:
        while runner.pending:
            runner.collect()
