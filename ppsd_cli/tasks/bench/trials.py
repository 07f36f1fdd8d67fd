"""Short trials before a run, for settings that were left open."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from ppsd_cli.bench_records import Contender
from ppsd_cli.core.schedule import Limits
from ppsd_cli.tasks.bench.decoders import Decoder
from ppsd_cli.tasks.bench.pool import settle

_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Probe:
    """What short trials answer: a few prompts, and the limits of the run."""

    prompts: tuple[tuple[int, ...], ...]
    limits: Limits


def trial(decoders: Sequence[Decoder], probe: Probe) -> list[float]:
    """Median tokens per second of each decoder over the prompts, which all answer in turn."""
    speeds: list[list[float]] = [[] for _ in decoders]
    limits = replace(probe.limits, max_new_tokens=min(_TOKENS, probe.limits.max_new_tokens))
    for decoder in decoders:
        decoder.answer(probe.prompts[0], replace(limits, max_new_tokens=4))
    for prompt in probe.prompts:
        for decoder, found in zip(decoders, speeds, strict=True):
            settle()
            answer = decoder.answer(prompt, limits)
            later = len(answer.token_ids) - answer.first_tokens
            if later > 0 and answer.decode_seconds > 0:
                found.append(later / answer.decode_seconds)
    return [median(found) if found else 0.0 for found in speeds]


def outcome(tried: list[Contender], rates: list[float], best: int) -> str:
    """What a trial found, in one line."""
    by_length = len({each.draft_length for each in tried}) > 1
    kind = "draft length" if by_length else "threads"
    values = [each.draft_length if by_length else each.threads for each in tried]
    found = ", ".join(f"{v}: {rate:.1f}" for v, rate in zip(values, rates, strict=True))
    head = f" with {tried[0].head}" if tried[0].decoder == "eesd" else ""
    return f"trial of {tried[0].decoder}{head}: {kind} {values[best]} (tokens/s by {kind} {found})"
