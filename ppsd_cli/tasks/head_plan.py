"""Which heads to train: the command's options and ``--spec`` forms as checked plans."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ppsd_cli.config import parse_split
from ppsd_cli.errors import ConfigError
from ppsd_cli.model.heads import Tap, lagged_taps
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.runtime.placement import check_split, choose_split, costs_of, default_stages

TRAINABLE = ("mlp", "block", "deep")
DEPTHS = (1, 2)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """One head: where it drafts from, for which split, and of what kind and size.

    ``depth``: depths of guesses that enter in one tick.
    """

    name: str
    split: tuple[int, ...]
    kind: str
    blocks: int
    draft_vocab: int | None
    lr: float
    depth: int = 1

    @property
    def exit_layer(self) -> int:
        """The depth that the head drafts from."""
        return self.split[0]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """A deep head reads the end of every stage; see ``lagged_taps``."""
        if self.kind != "deep":
            return (Tap(self.split[0], 0),)
        return lagged_taps(self.split, depth=self.depth)


@dataclass(frozen=True, slots=True)
class HeadWish:
    """A head as asked for; None means "as the other settings imply"."""

    name: str | None = None
    exit: int | None = None
    stages: int | None = None
    split: tuple[int, ...] | None = None
    kind: str = "deep"
    blocks: int = 2
    vocab: int | None = None
    lr: float = 1e-3
    depth: int = 1


def parse_spec(text: str, base: HeadWish) -> HeadWish:
    """``name=deep17,exit=17,stages=2,kind=deep,blocks=2,vocab=16384,lr=1e-3`` over ``base``.

    ``split=10-10-10`` may stand for exit and stages. ConfigError names what cannot be read.
    """
    known = {field.name for field in fields(HeadWish)}
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in known:
            raise ConfigError(f"--spec {text}: {part!r} is none of {', '.join(sorted(known))}=...")
        if key in found:
            raise ConfigError(f"--spec {text}: {key} is given twice")
        try:
            found[key] = _READERS[key](value)
        except ValueError as error:
            raise ConfigError(f"--spec {text}: {key}={value} cannot be read") from error
    if "split" in found and "exit" not in found:
        found["exit"] = None
        found.setdefault("stages", None)
    return replace(base, **found)


_READERS: dict[str, Any] = {
    "name": str,
    "exit": int,
    "stages": int,
    "split": lambda text: parse_split(text.replace("-", ",")),
    "kind": str,
    "blocks": int,
    "vocab": lambda text: None if text == "full" else int(text),
    "lr": float,
    "depth": int,
}


def plan_heads(wishes: Sequence[HeadWish], spec: ModelSpec) -> list[HeadPlan]:
    """Checked plans; ConfigError where one cannot be trained or two have the same name."""
    if not wishes:
        raise ConfigError("which head? give --exit-layer, --split or --spec")
    plans = [_plan(wish, spec) for wish in wishes]
    names = [plan.name for plan in plans]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"head name {name!r}: use letters, digits, '.', '_' and '-'")
        if names.count(name) > 1:
            raise ConfigError(f"two heads are called {name}; give each --spec its own name=")
    return plans


def _plan(wish: HeadWish, spec: ModelSpec) -> HeadPlan:
    if wish.kind not in TRAINABLE:
        raise ConfigError(f"--kind {wish.kind}: choose {', '.join(TRAINABLE)}")
    if not 1 <= wish.blocks <= min(_MOST_BLOCKS, spec.layers):
        raise ConfigError(f"--blocks {wish.blocks}: choose 1 to {min(_MOST_BLOCKS, spec.layers)}")
    if wish.vocab is not None and not 1 <= wish.vocab < spec.vocabulary:
        raise ConfigError(
            f"--draft-vocab {wish.vocab}: choose 1 to {spec.vocabulary - 1}, "
            f"or leave it out for all {spec.vocabulary} tokens"
        )
    if not 0 < wish.lr < float("inf"):
        raise ConfigError(f"--lr {wish.lr}: must be a positive number")
    _check_depth(wish)
    split = _split(wish, spec)
    suffix = "" if wish.depth == 1 else f"-depth{wish.depth}"
    name = wish.name or f"{wish.kind}-exit{split[0]}-stages{len(split)}{suffix}"
    return HeadPlan(name, split, wish.kind, wish.blocks, wish.vocab, wish.lr, wish.depth)


def _check_depth(wish: HeadWish) -> None:
    """The second level reads the keys of a last block that sees exit states."""
    if wish.depth not in DEPTHS:
        raise ConfigError(f"--depth {wish.depth}: choose {' or '.join(map(str, DEPTHS))}")
    if wish.depth > 1 and wish.kind == "mlp":
        raise ConfigError(f"--depth {wish.depth} needs --kind block or deep; mlp has no attention")
    if wish.depth > 1 and wish.kind == "deep" and wish.blocks == 1:
        raise ConfigError(f"--depth {wish.depth} with --kind deep needs --blocks 2 or more")


def _split(wish: HeadWish, spec: ModelSpec) -> tuple[int, ...]:
    """The split as ``generate`` will choose it for this head, or the one that was asked for."""
    if wish.split is not None:
        check_split(wish.split, spec.layers, wish.exit)
        if wish.stages not in (None, len(wish.split)):
            raise ConfigError(f"--stages {wish.stages} is not the split's {len(wish.split)}")
        if len(wish.split) < 2:
            raise ConfigError("--split needs two stages or more")
        return wish.split
    if wish.exit is None:
        raise ConfigError("which exit layer? give --exit-layer, --split or exit= in --spec")
    if wish.exit < 1:
        raise ConfigError(f"--exit-layer {wish.exit}: choose 1 to {spec.layers - 1}")
    stages = default_stages(spec.layers, wish.exit) if wish.stages is None else wish.stages
    if stages < 2:
        raise ConfigError(f"--stages {stages}: a draft head needs two stages or more")
    costs = costs_of(
        spec, blocks=wish.blocks, draft_vocab=wish.vocab, drafting=True, depth=wish.depth
    )
    return choose_split(spec.layers, stages=stages, exit_layer=wish.exit, costs=costs)
