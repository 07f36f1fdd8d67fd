"""``ppsd generate``: answer one prompt."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ppsd_cli.commands import options
from ppsd_cli.commands.options import OUTPUT, PROMPTS
from ppsd_cli.config import (
    DEFAULT_DRAFT_LENGTH,
    DEFAULT_MAX_NEW_TOKENS,
    Settings,
    parse_devices,
    parse_split,
)


def generate(  # noqa: PLR0913 (one parameter a flag)
    model: options.Model = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", rich_help_panel=PROMPTS, help="The prompt; - is stdin."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", "-f", rich_help_panel=PROMPTS, help="UTF-8 text."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(rich_help_panel=PROMPTS, help="System message of the chat.")
    ] = None,
    no_chat_template: options.NoChatTemplate = False,
    max_new_tokens: Annotated[int | None, options.max_new_tokens(DEFAULT_MAX_NEW_TOKENS)] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=PROMPTS, help="End before this text (repeatable)."),
    ] = None,
    ignore_eos: options.IgnoreEos = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = 0,
    decoder: options.Decoder = None,
    exit_layer: options.ExitLayer = None,
    stages: options.Stages = None,
    split: options.Split = None,
    devices: options.Devices = None,
    head: options.Head = None,
    draft_vocab: options.DraftVocab = None,
    draft_length: Annotated[int | None, options.draft_length(str(DEFAULT_DRAFT_LENGTH))] = None,
    width: options.Width = None,
    depth: options.Depth = None,
    threads: options.Threads = None,
    port: options.Port = None,
    profile: options.ProfileName = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    context: options.Context = None,
    offline: options.Offline = False,
    json_output: options.JsonOutput = False,
    timeline: Annotated[
        bool | None,
        typer.Option(
            "--timeline/--no-timeline",
            rich_help_panel=OUTPUT,
            help="Stages by ticks as they run. Default: on a terminal.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(rich_help_panel=OUTPUT, help="Write a Chrome trace (opens in Perfetto)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", rich_help_panel=OUTPUT, help="Write the answer to a file."),
    ] = None,
    quiet: options.Quiet = False,
    raw: Annotated[
        bool,
        typer.Option("--raw", rich_help_panel=OUTPUT, help="Pass control characters through."),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Answer one prompt: exactly the model's own tokens, from all stages at once."""
    del debug  # read by cli.main
    from ppsd_cli.commands.answer import run_generate
    from ppsd_cli.commands.answer_options import AnswerOptions
    from ppsd_cli.commands.prompts import PromptSource
    from ppsd_cli.commands.session import ModelChoice

    flags = Settings(
        decoder=decoder,
        exit_layer=exit_layer,
        stages=stages,
        split=None if split is None else parse_split(split),
        devices=None if devices is None else parse_devices(devices),
        head=head,
        draft_vocab=draft_vocab,
        draft_length=draft_length,
        width=width,
        depth=depth,
        dtype=dtype,
        context=context,
        threads=threads,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    code = run_generate(
        ModelChoice(model, profile, revision, offline),
        flags,
        PromptSource(prompt, prompt_file, system, not no_chat_template),
        AnswerOptions(
            seed=seed,
            stops=tuple(stop or ()),
            ignore_eos=ignore_eos,
            json=json_output,
            timeline=timeline,
            trace=trace,
            output=output,
            quiet=quiet,
            raw=raw,
            port=port,
        ),
    )
    if code:
        sys.exit(code)
