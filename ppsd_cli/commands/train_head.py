"""``ppsd train-head``: train draft heads for a model."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppsd_cli.commands import options

if TYPE_CHECKING:
    import torch

    from ppsd_cli.tasks.evaluate import Acceptance
    from ppsd_cli.tasks.head_plan import HeadWish


def train_head(  # noqa: PLR0913
    *,
    model: options.Model = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the head (or one below for each).")
    ],
    exit_layer: Annotated[
        list[str] | None,
        typer.Option("--exit-layer", help="Layer to draft from; repeat or list with commas."),
    ] = None,
    stages: Annotated[
        int | None, typer.Option(help="Pipeline stages that the head is for.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Layers of each stage, such as 10,10,10.")
    ] = None,
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            help="One of several heads: name=a,exit=10,stages=3,kind=deep,blocks=2,"
            "vocab=16384,lr=1e-3 (or split=10-10-10).",
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="Kind of head: mlp, block or deep.")] = "deep",
    blocks: Annotated[int, typer.Option(help="Decoder layers (or MLPs) of the head.")] = 2,
    depth: Annotated[
        int,
        typer.Option(
            help="Depths of guesses per tick that the head is for: 2 adds a second level, which "
            "goes on from the head's own state."
        ),
    ] = 1,
    draft_vocab: Annotated[
        int | None,
        typer.Option("--draft-vocab", help="Draft only the N most frequent answer tokens."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="JSONL with messages, prompt and completion, or text; "
            "default: the model writes its own.",
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count bad lines of --data instead of stopping.")
    ] = False,
    text_tokens: Annotated[
        int, typer.Option("--text-tokens", help="Tokens of self-written text.")
    ] = 8_000_000,
    text_seconds: Annotated[
        float | None,
        typer.Option("--text-seconds", help="Write no further round of text after this time."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Longest training text in tokens.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", help="Tokens of one batch (each process).")
    ] = 32768,
    accumulate: Annotated[int, typer.Option(help="Batches for each step.")] = 1,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 100,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.01,
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", help="Seconds after which the schedule is finished."),
    ] = None,
    held_out: Annotated[
        int, typer.Option("--held-out", help="Texts kept for measuring acceptance.")
    ] = 64,
    log_every: Annotated[int, typer.Option("--log-every", help="Steps between reports.")] = 50,
    eval_every: Annotated[
        int, typer.Option("--eval-every", help="Steps between held-out measurements.")
    ] = 500,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", help="Steps between checkpoints.")
    ] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16, of the model.")
    ] = "auto",
    save_dtype: Annotated[
        str, typer.Option("--save-dtype", help="Number format of the head file.")
    ] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; default: the accelerator, if any.")
    ] = None,
    compile_parts: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Fuse with torch.compile (default on GPUs)."),
    ] = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of text and data order.")] = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train draft heads for a model, with text that it writes itself unless --data is given."""
    del debug  # read by cli.main
    _check_numbers(
        positive={
            "--text-tokens": text_tokens,
            "--context": context,
            "--steps": steps,
            "--batch-tokens": batch_tokens,
            "--accumulate": accumulate,
            "--held-out": held_out,
            "--log-every": log_every,
            "--eval-every": eval_every,
            "--checkpoint-every": checkpoint_every,
            "--threads": threads,
            "--time-limit": time_limit,
        },
        others={
            "--text-seconds": text_seconds,
            "--warmup": warmup,
            "--weight-decay": weight_decay,
            "--seed": seed,
        },
    )
    from ppsd_cli.tasks.head_plan import HeadWish

    base = HeadWish(kind=kind, blocks=blocks, vocab=draft_vocab, lr=lr, depth=depth)
    wishes = _wishes(base, exit_layer, (stages, split), spec)
    import torch

    from ppsd_cli.commands.session import ModelChoice, find_model, find_profile
    from ppsd_cli.commands.signals import Signals
    from ppsd_cli.config import check_threads
    from ppsd_cli.model.spec_reader import read_spec
    from ppsd_cli.tasks.progress import Bars
    from ppsd_cli.tasks.text_store import TextWish
    from ppsd_cli.tasks.train import TrainSettings
    from ppsd_cli.tasks.train_head import HeadRun, TextSource, train_heads

    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    bars = Bars(quiet=quiet or os.environ.get("RANK", "0") != "0")
    place = _device(device)
    number = _dtype("--dtype", dtype, place)
    choice = ModelChoice(model, None, revision, offline)
    files = find_model(choice, find_profile(choice), bars.say)
    own_context = read_spec(files.folder).context
    run = HeadRun(
        model=files,
        wishes=tuple(wishes),
        output=output,
        text=TextSource(
            data=data,
            skip_bad=skip_bad,
            wish=TextWish(text_tokens, text_seconds),
            context=min(2048, own_context) if context is None else context,
            held_out=held_out,
        ),
        train=TrainSettings(
            steps=steps,
            accumulate=accumulate,
            warmup=warmup,
            weight_decay=weight_decay,
            time_limit=time_limit,
            log_every=log_every,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            compile=place.type != "cpu" if compile_parts is None else compile_parts,
        ),
        batch_tokens=batch_tokens,
        seed=seed,
        dtype=number,
        save_dtype=_dtype("--save-dtype", save_dtype, place),
        device=place,
        resume=resume,
        command=shlex.join(["ppsd", *sys.argv[1:]]),
    )
    with contextlib.closing(bars), Signals(raising=False) as signals:
        result = train_heads(run, bars=bars, stop=lambda: signals.number is not None)
    for folder, score in zip(result.folders, result.scores, strict=False):
        typer.echo(f"{folder}: held-out acceptance {_tops(score.whole)}")
        if score.second is not None:
            typer.echo(f"{folder}: second level {_tops(score.second)}")
        bars.say(
            f"use it: ppsd generate --model {shlex.quote(model or files.name)} --head {folder}"
        )
    if not result.finished:
        bars.say(
            f"stopped; continue with --resume --output {output}"
            if result.folders
            else "stopped while writing text; the same command goes on after its last whole round"
        )
        raise typer.Exit(128 + (signals.number or signal.SIGTERM))


def _tops(acceptance: "Acceptance") -> str:
    pairs = zip((1, 2, 4, 8), acceptance.top, strict=True)
    return " ".join(f"top-{k} {share:.3f}" for k, share in pairs)


def _check_numbers(
    positive: dict[str, float | int | None], others: dict[str, float | int | None]
) -> None:
    """ConfigError unless all are above 0, or (``others``) 0 or more; NaN is neither."""
    from ppsd_cli.errors import ConfigError

    for flag, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{flag} {value}: must be positive")
    for flag, value in others.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"{flag} {value}: must be 0 or more")


def _wishes(
    base: "HeadWish",
    exits: list[str] | None,
    shape: tuple[int | None, str | None],
    specs: list[str] | None,
) -> list["HeadWish"]:
    """The heads asked for by --exit-layer and --split, or by --spec."""
    from dataclasses import replace

    from ppsd_cli.config import parse_split
    from ppsd_cli.errors import ConfigError
    from ppsd_cli.tasks.head_plan import parse_spec

    stages, split = shape
    if specs and (exits or split):
        raise ConfigError("--spec names its own exit; leave out --exit-layer and --split")
    if specs:
        return [parse_spec(text, replace(base, stages=stages)) for text in specs]
    numbers = _layers(exits) if exits else []
    if split is not None:
        parts = parse_split(split)
        if len(numbers) > 1:
            raise ConfigError("--split fixes one exit layer; give several heads as --spec")
        return [replace(base, exit=numbers[0] if numbers else None, stages=stages, split=parts)]
    return [replace(base, exit=number, stages=stages) for number in numbers]


def _layers(texts: list[str]) -> list[int]:
    from ppsd_cli.errors import ConfigError

    try:
        return [int(part) for text in texts for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--exit-layer {','.join(texts)}: give whole numbers separated by commas"
        ) from error


def _device(name: str | None) -> "torch.device":
    """The wanted device, or the accelerator that torch finds, or the CPU."""
    import torch

    from ppsd_cli.errors import ConfigError, ResourceError

    found = None
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
    if name is None:
        device = found if found is not None and found.type != "mps" else torch.device("cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"--device {name}: no such kind of device") from error
    if device.type != "cpu":
        if found is None or found.type != device.type:
            raise ResourceError(f"--device {name}: torch finds no such device here")
        index = device.index if name and device.index is not None else _local_rank(os.environ)
        if index >= torch.accelerator.device_count():
            raise ResourceError(
                f"{device.type}:{index}: there are only {torch.accelerator.device_count()}"
            )
        device = torch.device(device.type, index)
        torch.accelerator.set_device_index(index)
    return device


def _local_rank(environment: Mapping[str, str]) -> int:
    return int(environment.get("LOCAL_RANK", "0"))


def _dtype(flag: str, name: str, device: "torch.device") -> "torch.dtype":
    """``auto`` is bfloat16 on accelerators and float32 on the CPU."""
    from ppsd_cli.errors import ConfigError
    from ppsd_cli.tasks.train_head import DTYPES

    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ConfigError(f"{flag} {name}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]
