"""Hand-made samples of a benchmark."""

from ppsd_cli.bench_records import Contender, Counts, Difference, Key, Sample

PLAIN = Contender("ar", "ar", True)
CHAIN = Contender("ppsd", "ppsd", True)
BURST = Contender("eesd-4", "eesd", False)


def counts(**changes) -> Counts:
    """Ten ticks of two stages, six guesses of which four were right."""
    values = {
        "ticks": 10, "verified": 6, "accepted": 4, "void_drafts": 3, "flushes": 2,
        "runs": ((1, 2), (2, 1)), "stage_busy": ((0.7, 0.2, 0.1), (0.6, 0.2, 0.2)),
        "stage_seconds": (0.01, 0.02), "tick_seconds": 0.03, "wait_seconds": 0.004,
        "draft_seconds": 0.005, "layers_seconds": 0.006,
    }  # fmt: skip
    return Counts(**{**values, **changes})


def sample(question: int, contender: str, rate: float, **changes) -> Sample:
    """An answer of eleven tokens, ten of them at ``rate`` a second; first token after 0.1 s."""
    category = "odd" if question % 2 else "even"
    repetition, turn = changes.pop("repetition", 1), changes.pop("turn", 1)
    values = {
        "key": Key("task", str(question), category, turn, repetition),
        "contender": contender,
        "prompt_tokens": 5,
        "token_ids": tuple(range(11)),
        "finish_reason": "length",
        "first_token_seconds": 0.1,
        "decode_seconds": 10 / rate,
    }
    return Sample(**{**values, **changes})


def difference(gap: float | None = 0.5, **changes) -> Difference:
    """A difference at the third token with a tolerance of 0.1."""
    values = {"index": 2, "expected_id": 2, "found_id": 9, "logit_gap": gap, "tolerance": 0.1}
    return Difference(**{**values, **changes})
