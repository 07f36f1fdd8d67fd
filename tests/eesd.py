"""What bursts an answer took, and what they should have been."""

from collections.abc import Sequence

from ppsd_cli.core.events import Committed, Entered, Event, Outcome


def expected_bursts(right: Sequence[bool], draft_length: int) -> list[int]:
    """Accepted guesses of each burst, if the guess for token i of the answer is ``right[i]``.

    The prompt gives token 0. A burst after ``done`` tokens guesses the next ones, but the last
    token of the answer is never fed, so it is never guessed; it commits what was accepted and one
    token more.
    """
    bursts, done, count = [], 1, len(right)
    while done < count:
        guessed = right[done : min(done + draft_length, count - 1)]
        bursts.append(next((i for i, each in enumerate(guessed) if not each), len(guessed)))
        done += bursts[-1] + 1
    return bursts


def bursts_of(run_or_events) -> list[int]:
    """Accepted guesses of each burst of an answer, from its events."""
    events: list[Event] = getattr(run_or_events, "events", run_or_events)
    bursts: list[int] = []
    fed = set()
    for event in events:
        match event:
            case Entered(token_id=int()) if event.tick not in fed:
                fed.add(event.tick)
                bursts.append(0)
            case Committed(outcome=Outcome.ACCEPTED):
                bursts[-1] += 1
    return bursts
