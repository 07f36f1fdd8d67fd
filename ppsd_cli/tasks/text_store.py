"""Self-written text on disk: a folder for each set of settings, a JSONL file for each round.

A later run with the same settings reuses the rounds that are there and adds what it lacks.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ppsd_cli.assets import cache_folder
from ppsd_cli.assets.cache import make_folder
from ppsd_cli.errors import AssetError
from ppsd_cli.files import replace_bytes
from ppsd_cli.model.one_pass import PLAIN, Backbone, Pieces
from ppsd_cli.tasks.chat import ChatGlue
from ppsd_cli.tasks.dataset import Sample
from ppsd_cli.tasks.text import Round, RoundPlan, write_round

FORMAT_VERSION = 2
_MOST_TOKENS = 1 << 21
_CPU_BYTES = 1 << 30
_CACHE_SHARE = 0.65
_SHORTEST_ROW = 64
_PARTS = (8, 4, 8, 2, 8, 4, 8, 1)


@dataclass(frozen=True, slots=True)
class TextSettings:
    """What self-written text depends on. ``round_tokens``: rows times length of one round."""

    model_hash: str
    context: int
    seed: int
    round_tokens: int
    dtype: str
    chat: bool
    format_version: int = FORMAT_VERSION

    def plan(self, index: int) -> RoundPlan:
        """Round ``index``: half of the rounds go to an eighth of the context, others further, one
        in eight to its end.

        So most tokens lie where answers begin, where drafts are right least often, and short
        rows are written faster, as each token reads the keys and values before it.
        """
        part = _PARTS[index % len(_PARTS)]
        length = min(self.context, max(self.context // part, _SHORTEST_ROW))
        return RoundPlan(
            rows=max(1, self.round_tokens // length), length=length, seed=self.seed * 1000 + index
        )

    def folder(self) -> Path:
        """Where the rounds of these settings lie."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return cache_folder() / "texts" / hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class TextWish:
    """How much text is wanted: ``tokens``, but no new round after ``seconds`` of writing."""

    tokens: int
    seconds: float | None = None


Progress = Callable[[int, int], bool]
"""Called with tokens there and tokens wanted; False stops the writing."""


def round_tokens(backbone: Backbone, wanted: int) -> int:
    """Tokens of one round: what the device's memory holds as keys and values, a power of two."""
    spec, device = backbone.spec, backbone.device
    each = 2 * spec.layers * spec.kv_heads * spec.head_dim * backbone.dtype.itemsize
    budget = float(_CPU_BYTES)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        budget = _CACHE_SHARE * module.get_device_properties(device).total_memory
    fits = int(max(1024, min(budget / each, _MOST_TOKENS, wanted)))
    return 1 << (fits.bit_length() - 1)


def write_text(
    backbone: Backbone,
    glue: ChatGlue,
    settings: TextSettings,
    wish: TextWish,
    *,
    pieces: Pieces = PLAIN,
    progress: Progress | None = None,
) -> bool:
    """Write rounds until ``wish`` is met; False where ``progress`` stopped it.

    Complete rounds stay on disk whatever happens.
    """
    folder = make_folder(settings.folder())
    described = json.dumps(dataclasses.asdict(settings), indent=2)
    replace_bytes(folder / "settings.json", (described + "\n").encode())
    there, index, start = 0, 0, time.monotonic()
    while there < wish.tokens:
        plan = settings.plan(index)
        place = folder / f"round-{index:04d}.jsonl"
        if not place.exists():
            late = wish.seconds is not None and time.monotonic() - start > wish.seconds
            if late and there > 0:
                break
            counter = _Counter(there, wish.tokens, progress)
            written = write_round(backbone, glue, plan, pieces=pieces, progress=counter)
            if written is None:
                return False
            replace_bytes(place, b"".join(_lines(written)))
        there += plan.rows * plan.length
        index += 1
        if progress is not None and not progress(there, wish.tokens):
            return False
    return True


class _Counter:
    """Turns a round's steps into progress over all rounds."""

    def __init__(self, there: int, wanted: int, progress: Progress | None) -> None:
        self._there, self._wanted, self._progress = there, wanted, progress

    def __call__(self, tokens: int) -> bool:
        self._there += tokens
        return self._progress is None or self._progress(
            min(self._there, self._wanted), self._wanted
        )


def read_text(settings: TextSettings, wish: TextWish) -> list[Sample]:
    """The rounds on disk up to the wished number of tokens, without repeated questions."""
    samples: list[Sample] = []
    seen: set[bytes] = set()
    there = 0
    for path in sorted(settings.folder().glob("round-*.jsonl")):
        if there >= wish.tokens:
            break
        for sample in _read_round(path):
            there += len(sample.ids)
            first = int(sample.answers.argmax())
            question = (sample.ids[:first] if settings.chat else sample.ids).tobytes()
            if sample.answers.any() and question not in seen:
                seen.add(question)
                samples.append(sample)
    return samples


def _lines(written: Round) -> Iterator[bytes]:
    """One JSON line a text: its ids, the [start, end) spans that answer, whether greedily."""
    rows = zip(
        written.token_ids.tolist(), written.answers.tolist(), written.greedy.tolist(), strict=True
    )
    for ids, answers, greedy in rows:
        record = {"ids": ids, "answers": spans(answers), "greedy": greedy}
        yield json.dumps(record, separators=(",", ":")).encode() + b"\n"


def spans(flags: list[bool]) -> list[list[int]]:
    """The [start, end) runs of true flags."""
    runs, start = [], None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            runs.append([start, index])
            start = None
    return runs


def _read_round(path: Path) -> Iterator[Sample]:
    try:
        with path.open("rb") as file:
            for line in file:
                record = json.loads(line)
                yield Sample.of(record["ids"], record["answers"], greedy=record["greedy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{path} is damaged ({error}); delete it, it is written again") from error
