"""Short runs of a real pipeline, for what the parts' times do not show."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from ppsd_cli.calibration_records import Boundary, PartTimes
from ppsd_cli.core.events import Event, Verified
from ppsd_cli.core.schedule import Limits
from ppsd_cli.runtime.engine import open_engine
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.tasks.bench.decoders import Answered, EngineDecoder

TOKENS = 40
_WARM = 6


def probe_boundary(
    config: PipelineConfig, prompt: tuple[int, ...], alone: PartTimes, busy: PartTimes
) -> Boundary:
    """Run the stages of ``config`` in turn and then all at once, with guesses that are right.

    ``config`` drafts with the raw exit, whose guesses the answer replaces.
    """
    assert config.head == RAW_EXIT
    limits = Limits(TOKENS, config.slots)
    with open_engine(config, processes=True) as engine:
        plain, drafting = EngineDecoder(engine, False), EngineDecoder(engine, True)
        plain.answer(prompt, replace(limits, max_new_tokens=_WARM))
        one_by_one = _better(plain, prompt, limits, None)
        ids = one_by_one.token_ids
        drafting.answer(prompt, replace(limits, max_new_tokens=_WARM), ids)
        together = _better(drafting, prompt, limits, ids)
    length = len(prompt) + TOKENS / 2
    token = one_by_one.decode_seconds / max(1, len(ids) - 1)
    spans, crowded = _spans(one_by_one, config.stages), _spans(together, config.stages)
    return Boundary(
        hop=max(0.0, token - sum(map(median, spans))) / config.stages,
        turn_alone=_beyond(spans, config.split, alone, length),
        turn_busy=_beyond(crowded, config.split, busy, length),
        spread=tuple(
            round(each / median(stage), 4) for stage in crowded for each in stage[config.stages :]
        ),
        split=config.split,
    )


def _better(
    decoder: EngineDecoder,
    prompt: tuple[int, ...],
    limits: Limits,
    forced: tuple[int, ...] | None,
) -> Answered:
    """The faster of two runs, because other programs only slow one down."""
    runs = [decoder.answer(prompt, limits, forced) for _ in range(2)]
    return min(runs, key=lambda run: run.decode_seconds)


def _spans(answered: Answered, stages: int) -> list[list[float]]:
    """Seconds of each stage's work on each token."""
    events: Sequence[Event] = answered.events
    tokens = [e for e in events if isinstance(e, Verified) and len(e.spans) == stages][1:]
    return [[e.spans[s].end - e.spans[s].begin for e in tokens] for s in range(stages)]


def _beyond(
    spans: Sequence[Sequence[float]], split: Sequence[int], parts: PartTimes, length: float
) -> float:
    """Mean over the stages of what their work took beyond their parts; below 0 it took less."""
    last = len(split) - 1
    return fmean(
        median(each) - parts.turn(split[s], length, lm=s == last) for s, each in enumerate(spans)
    )
