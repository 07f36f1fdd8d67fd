"""``ppsd calibrate``: find the exit layer, the split and the decoder that suit this machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ppsd_cli.commands import options
from ppsd_cli.commands.options import OUTPUT
from ppsd_cli.config import Settings, parse_devices

_TOKENS = 48
_WITH_SHOW = ("--json", "--plot", "--quiet", "--debug")


def calibrate(  # noqa: PLR0913 (one parameter a flag)
    ctx: typer.Context,
    model: options.Model = None,
    show: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=OUTPUT,
            help="Print a calibrated profile (name or file) and end; measures nothing.",
        ),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel="Measuring",
            help="Draft head to try: folder, shipped name, or raw for none (repeatable). "
            "Default: those of the model's profile.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, options.prompt_file("Default: the twelve of the task smoke.")
    ] = None,
    limit: options.Limit = None,
    max_new_tokens: Annotated[int | None, options.max_new_tokens(_TOKENS)] = None,
    no_chat_template: options.NoChatTemplate = False,
    devices: options.Devices = None,
    threads: options.Threads = None,
    profile: options.ProfileName = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    context: options.Context = None,
    offline: options.Offline = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", rich_help_panel=OUTPUT,
            help="The profile's file. Default: MODEL-calibrated.yaml in your profiles folder.",
        ),
    ] = None,
    json_output: options.JsonOutput = False,
    plot: Annotated[
        Path | None,
        typer.Option(rich_help_panel=OUTPUT, help="Also draw the curve into an SVG file."),
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Measure this machine and write a profile with the settings that are fastest on it."""
    del debug  # read by cli.main
    from ppsd_cli.commands.calibrate_run import CalibrateOptions, run_calibrate, show_profile
    from ppsd_cli.commands.session import ModelChoice

    if show is not None:
        options.refuse_beside(ctx, "--show", _WITH_SHOW)
        show_profile(show, json_output=json_output, plot=plot)
        return
    code = run_calibrate(
        ModelChoice(model, profile, revision, offline),
        Settings(
            devices=None if devices is None else parse_devices(devices),
            threads=threads,
            dtype=dtype,
            context=context,
        ),
        CalibrateOptions(
            heads=None if not head else tuple(head),
            prompts=prompts,
            limit=limit,
            tokens=_TOKENS if max_new_tokens is None else max_new_tokens,
            chat=not no_chat_template,
            output=output,
            json=json_output,
            plot=plot,
            quiet=quiet,
        ),
    )
    if code:
        sys.exit(code)
