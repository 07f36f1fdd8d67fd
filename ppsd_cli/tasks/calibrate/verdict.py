"""Which of the checked candidates is taken, and why. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ppsd_cli.calibration_records import Candidate, Checked
from ppsd_cli.tasks.calibrate.forecast import needed_acceptance, tokens_per_tick


@dataclass(frozen=True, slots=True)
class Verdict:
    """The choice, and the reason in one line."""

    chosen: Candidate
    reason: str


def decide(checked: Sequence[Checked], *, names: Mapping[str, str]) -> Verdict:
    """The fastest as measured; plain decoding, which comes first, unless something beats it.

    ``names``: of heads, by their folder.
    """
    plain, *others = checked
    best = max(others, key=lambda each: each.speed)
    what = describe(best.candidate, names)
    ratio = best.speed / plain.speed
    if ratio > 1:
        return Verdict(
            best.candidate,
            f"{what} gave {best.speed:.1f} tokens/s, {ratio:.2f} times ar's {plain.speed:.1f}; "
            f"{limits(best.candidate)}",
        )
    return Verdict(
        plain.candidate,
        f"nothing beats ar's {plain.speed:.1f} tokens/s: {what} gave {best.speed:.1f}, "
        f"{ratio:.2f} times that, {_needed(best, plain)}",
    )


def describe(candidate: Candidate, names: Mapping[str, str] | None = None) -> str:
    """A pipeline in a few words."""
    split = ",".join(map(str, candidate.split))
    if candidate.head is None:
        return f"split {split}"
    head = (names or {}).get(candidate.head, candidate.head)
    width = f", width {candidate.width}" if candidate.width > 1 else ""
    depth = f", depth {candidate.depth}" if candidate.depth > 1 else ""
    return f"split {split} with {'a raw exit' if head == 'raw' else head}{width}{depth}"


def limits(candidate: Candidate) -> str:
    """What holds a candidate back."""
    if candidate.limit in (None, "stages"):
        return "no part stands out as its limit"
    return f"{candidate.limit} limits it"


def _needed(best: Checked, plain: Checked) -> str:
    """Acceptance that would have reached plain decoding, from the measured tick; of two depths,
    for which there is no formula, what it was."""
    acceptance = best.acceptance or 0.0
    had = f"with {acceptance:.0%} of its guesses right"
    if best.candidate.depth > 1:
        return had
    stages = best.candidate.stages
    tick = tokens_per_tick(stages, acceptance) / best.speed
    needed = needed_acceptance(stages, tick, 1 / plain.speed)
    if needed >= 1:
        return f"{had}; its tick takes too long for any share"
    return f"{had}; it would need {needed:.0%}"
