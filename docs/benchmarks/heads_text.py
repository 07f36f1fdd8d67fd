"""What more training text brings to a draft head, part 1 of 2: nested shares of one text.

Writes the model's own text once and cuts nested random shares from it, with the same held-out
texts beside each. Every share becomes a cache folder WORK/cache-SHARE, in which
``ppsd train-head --text-tokens ROUND`` finds one finished round: the share, with the held-out
texts just where train-head takes them out. ROUND must be the ``--round`` given here, and the
device's memory must hold such a round (2,097,152 tokens of the demo model: 75 GB; on a CPU, 16384).

    M=smollm2-135m
    python docs/benchmarks/heads_text.py -m $M WORK
    for SHARE in 1500000 5000000 all; do
      PPSD_CACHE=WORK/cache-$SHARE ppsd train-head -m $M -o WORK/head-$SHARE \
        --spec name=text-$SHARE,exit=16,stages=2,kind=deep,blocks=2,vocab=16384,lr=3e-3 \
        --text-tokens 2097152 --context 2048 --batch-tokens 16384 --steps 1500 --warmup 100 \
        --held-out 256 --log-every 50 --eval-every 300 --checkpoint-every 100000
    done
    python docs/benchmarks/heads_text_score.py -m $M WORK -o heads-text.json
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ppsd_cli.assets import ModelFiles, cache_folder
from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.session import ModelChoice, find_model, find_profile
from ppsd_cli.errors import ConfigError, PpsdError, ResourceError
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone, Pieces
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.tasks.chat import read_glue
from ppsd_cli.tasks.dataset import Sample, held_out
from ppsd_cli.tasks.text_store import TextSettings, TextWish, read_text, round_tokens, write_text

ALL = "all"
_BEGAN = time.monotonic()


@dataclass(frozen=True, slots=True)
class Line:
    """One text as its line of the store, and its tokens."""

    raw: bytes
    tokens: int


def say(text: str) -> None:
    """A line of progress on stderr."""
    sys.stderr.write(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}\n")


def model_files(model: str, *, offline: bool) -> ModelFiles:
    """The model as ``ppsd train-head -m`` finds it."""
    choice = ModelChoice(model, None, None, offline)
    return find_model(choice, find_profile(choice), say)


def write(files: ModelFiles, options: argparse.Namespace) -> TextSettings:
    """Write the whole text into the cache, as train-head would; its settings."""
    spec = read_spec(files.folder)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    backbone = Backbone.load(Loader(Checkpoint(files.folder), spec, dtype, device))
    glue = read_glue(load_tokenizer(files.folder), files.folder)
    fits = round_tokens(backbone, options.round)
    if fits != options.round:
        raise ResourceError(f"--round {options.round}: here a round has {fits} tokens; give that")
    settings = TextSettings(
        model_hash=files.model_hash,
        context=options.context,
        seed=0,
        round_tokens=options.round,
        dtype=str(dtype).removeprefix("torch."),
        chat=glue.chat,
    )
    say(f"model on {device}")
    last = -1

    def progress(there: int, wanted: int) -> bool:
        nonlocal last
        if there // options.round != last:
            last = there // options.round
            say(f"{there:,} of {wanted:,} tokens")
        return True

    wish = TextWish(options.text_tokens, options.text_seconds)
    pieces = Pieces.compiled() if gpu else Pieces()
    write_text(backbone, glue, settings, wish, pieces=pieces, progress=progress)
    return settings


def usable_lines(settings: TextSettings, wanted: int) -> list[Line]:
    """The lines of the rounds up to ``wanted`` tokens that ``read_text`` makes texts of."""
    found: list[Line] = []
    seen: set[tuple[int, ...]] = set()
    there = 0
    for path in sorted(settings.folder().glob("round-*.jsonl")):
        if there >= wanted:
            break
        for raw in path.read_bytes().splitlines(keepends=True):
            record = json.loads(raw)
            ids, answers = record["ids"], record["answers"]
            there += len(ids)
            if not answers:
                continue
            question = tuple(ids[: answers[0][0]] if settings.chat else ids)
            if question not in seen:
                seen.add(question)
                found.append(Line(raw, len(ids)))
    return found


def place(share: Sequence[bytes], kept: Sequence[bytes]) -> list[bytes]:
    """``share`` with ``kept`` at the indices that ``dataset.held_out`` holds out."""
    total, count = len(share) + len(kept), len(kept)
    if count > total // 5:
        raise ConfigError(f"--held-out {count}: at most a fifth of {total} texts; give fewer")
    step = total // count
    at = {step - 1 + step * i: raw for i, raw in enumerate(kept)}
    rest = iter(share)
    return [at[i] if i in at else next(rest) for i in range(total)]


@contextlib.contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Let ``folder`` be the cache meanwhile."""
    before = os.environ.get("PPSD_CACHE")
    os.environ["PPSD_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PPSD_CACHE"]
        else:
            os.environ["PPSD_CACHE"] = before


def write_share(cache: Path, settings: TextSettings, lines: Sequence[bytes]) -> None:
    """A cache with ``lines`` as its only round, and links to all else of the present cache."""
    cache.mkdir(parents=True)
    for folder in cache_folder().iterdir():
        if folder.is_dir() and folder.name != "texts":
            (cache / folder.name).symlink_to(folder.resolve())
    with cache_at(cache.absolute()):
        settings.folder().mkdir(parents=True)
        (settings.folder() / "round-0000.jsonl").write_bytes(b"".join(lines))


def check_held_out(cache: Path, settings: TextSettings, kept: Sequence[bytes]) -> None:
    """Assert that train-head would hold out just ``kept`` in this cache."""
    with cache_at(cache.absolute()):
        texts = read_text(settings, TextWish(settings.round_tokens))
    _, chosen = held_out(texts, len(kept))
    for sample, raw in zip(chosen, kept, strict=True):
        record = json.loads(raw)
        wanted = Sample.of(record["ids"], record["answers"], greedy=record["greedy"])
        assert np.array_equal(sample.ids, wanted.ids)
        assert np.array_equal(sample.answers, wanted.answers)


def cut(lines: Sequence[Line], settings: TextSettings, options: argparse.Namespace) -> None:
    """Held-out texts and shares: ``held.jsonl``, ``shares.json`` and a cache for each share."""
    work, count = options.work, options.held_out
    order = np.random.default_rng(0).permutation(len(lines))
    kept = [lines[i].raw for i in order[:count]]
    rest = [lines[i] for i in order[count:]]
    sizes = np.cumsum([line.tokens for line in rest])
    (work / "held.jsonl").write_bytes(b"".join(kept))
    shares: dict[str, dict[str, int]] = {}
    for name in options.shares.split(","):
        wanted = len(rest) if name == ALL else int(np.searchsorted(sizes, int(name)) + 1)
        texts = min(wanted, len(rest))
        if texts in [share["texts"] for share in shares.values()]:
            say(f"{name}: no further text, left out")
            continue
        cache = work / f"cache-{name}"
        write_share(cache, settings, place([line.raw for line in rest[:texts]], kept))
        check_held_out(cache, settings, kept)
        shares[name] = {"texts": texts, "tokens": int(sizes[texts - 1])}
        say(f"{name}: {texts} texts, {sizes[texts - 1]:,} tokens")
    (work / "shares.json").write_text(json.dumps(shares) + "\n")


def main() -> int:
    """Write the text, cut it."""
    options = _options()
    try:
        if options.work.exists() and any(options.work.iterdir()):
            raise ConfigError(f"{options.work} is not empty; choose a new folder")
        options.work.mkdir(parents=True, exist_ok=True)
        settings = write(model_files(options.model, offline=options.offline), options)
        lines = usable_lines(settings, options.text_tokens)
        say(f"{len(lines)} texts, {sum(line.tokens for line in lines):,} tokens")
        cut(lines, settings, options)
    except PpsdError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, metavar="WORK", help="a new folder for the shares")
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--shares", default=f"1500000,5000000,{ALL}", help="tokens, ascending")
    parser.add_argument("--text-tokens", type=int, default=7 << 21)
    parser.add_argument("--text-seconds", type=float, help="no new round after this time")
    parser.add_argument("--round", type=int, default=1 << 21, help="tokens, a power of two")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--offline", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
