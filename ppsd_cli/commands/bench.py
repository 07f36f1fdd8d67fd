"""``ppsd bench``: measure whether and how much speculation pays."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ppsd_cli.commands import options
from ppsd_cli.commands.options import OUTPUT, PROMPTS
from ppsd_cli.config import DEFAULT_BENCH_TOKENS, Settings, parse_devices, parse_split

_HOW, _GATES = "Measuring", "Gates"


def bench(  # noqa: PLR0913 (one parameter a flag)
    task: Annotated[
        str | None, typer.Argument(help="Task, or several with commas; --list shows them.")
    ] = None,
    model: options.Model = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PROMPTS,
            help="In place of a model: random weights of a shape, such as llama-8b (SHAPE:SEED). "
            "For --acceptance, which then alone decides how many guesses are right.",
        ),
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list", rich_help_panel=PROMPTS, help="Show the tasks and end.")
    ] = False,
    prompts: Annotated[Path | None, options.prompt_file()] = None,
    limit: options.Limit = None,
    max_new_tokens: Annotated[int | None, options.max_new_tokens(DEFAULT_BENCH_TOKENS)] = None,
    ignore_eos: options.IgnoreEos = False,
    no_chat_template: options.NoChatTemplate = False,
    decoders: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_HOW,
            help="Of ar, ppsd, naive-split, eesd, hf, hf-early-exit. Default: ar,ppsd, and "
            "naive-split where there are several devices. ar always runs.",
        ),
    ] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_HOW,
            help="Also with drafts that are right with these probabilities, such as 0.5,0.8. "
            "For trees 0.7/0.9: the best guess 0.7, one of the width 0.9.",
        ),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_HOW,
            help="Also ppsd as a tree of these widths, such as 2,4. Default: the profile's.",
        ),
    ] = None,
    depth: options.Depth = None,
    draft_length: Annotated[int | None, options.draft_length("the fastest")] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", rich_help_panel=_HOW, help="Of every prompt.")
    ] = 1,
    warmup: Annotated[
        int, typer.Option(rich_help_panel=_HOW, help="Short answers of each decoder before.")
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", "-s", rich_help_panel=_HOW, help="Of --acceptance and of the intervals."
        ),
    ] = 0,
    resume: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_HOW,
            help="Journal of samples: go on with it, or start it here if it is not there.",
        ),
    ] = None,
    exit_layer: options.ExitLayer = None,
    stages: options.Stages = None,
    split: options.Split = None,
    devices: options.Devices = None,
    head: options.Head = None,
    draft_vocab: options.DraftVocab = None,
    threads: options.Threads = None,
    profile: options.ProfileName = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    context: options.Context = None,
    offline: options.Offline = False,
    json_output: options.JsonOutput = False,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format", rich_help_panel=OUTPUT, help="table (default), json, csv or markdown."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", rich_help_panel=OUTPUT, help="Write it to a file."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(rich_help_panel=OUTPUT, help="Also write one self-contained HTML page."),
    ] = None,
    quiet: options.Quiet = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_GATES,
            help="FIGURE=VALUE or FIGURE@DECODER=VALUE (repeatable): exit code 6 below it. "
            "Figures: speedup, acceptance, tokens_per_second, tokens_per_tick, identical.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_GATES,
            help="JSON of an earlier run: exit code 6 for what got slower beyond the noise.",
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Measure speculation against honest rivals, prompt by prompt in one run."""
    del debug  # read by cli.main
    from ppsd_cli.commands.bench_options import (
        BenchOptions,
        parse_list,
        parse_shares,
        parse_widths,
    )
    from ppsd_cli.commands.bench_run import run_bench, show_tasks
    from ppsd_cli.commands.session import ModelChoice

    if list_tasks:
        show_tasks()
        return
    flags = Settings(
        exit_layer=exit_layer,
        stages=stages,
        split=None if split is None else parse_split(split),
        devices=None if devices is None else parse_devices(devices),
        head=head,
        draft_vocab=draft_vocab,
        depth=depth,
        dtype=dtype,
        context=context,
        threads=threads,
        max_new_tokens=max_new_tokens,
    )
    shares, among = parse_shares(acceptance)
    code = run_bench(
        ModelChoice(model, profile, revision, offline, random_weights),
        flags,
        BenchOptions(
            tasks=parse_list(task),
            prompts=prompts,
            limit=limit,
            ignore_eos=ignore_eos,
            chat=not no_chat_template,
            decoders=parse_list(decoders),
            acceptance=shares,
            draft_length=draft_length,
            repetitions=repetitions,
            warmup=warmup,
            seed=seed,
            resume=resume,
            format="json" if json_output and output_format is None else output_format or "table",
            json=json_output,
            output=output,
            report=report,
            quiet=quiet,
            fail_under=tuple(fail_under or ()),
            baseline=baseline,
            widths=parse_widths(width),
            among=among,
        ),
    )
    if code:
        sys.exit(code)
