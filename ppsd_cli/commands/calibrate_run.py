"""One calibration from flags to a profile: set up, measure, write, show."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ppsd_cli.assets import ModelFiles
from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.calibration_records import Calibration
from ppsd_cli.commands.calibrate_profile import (
    check_place,
    default_place,
    profile_text,
    read_calibration,
)
from ppsd_cli.commands.find_head import describe_head, find_head, shipped_name
from ppsd_cli.commands.follow_profile import machine_facts
from ppsd_cli.commands.session import (
    ModelChoice,
    context_of,
    find_model,
    find_profile,
    profile_folders,
)
from ppsd_cli.commands.signals import Interrupted, Signals
from ppsd_cli.config import Profile, Settings, check, load_profile
from ppsd_cli.errors import ConfigError
from ppsd_cli.files import check_writable, make_folder, replace_bytes
from ppsd_cli.model.head_files import check_fit
from ppsd_cli.model.places import spec_of
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.spec_reader import read_eos_ids
from ppsd_cli.runtime.engine import choose_dtype
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.runtime.timing import tap_split
from ppsd_cli.runtime.torchrun import is_torchrun
from ppsd_cli.tasks.bench.measure import Asked
from ppsd_cli.tasks.bench.prompts import load_prompt_file, load_task, spread
from ppsd_cli.tasks.bench.talk import TokenizerTalk, user
from ppsd_cli.tasks.calibrate.export import calibration_data
from ppsd_cli.tasks.calibrate.layouts import make_layout, plain_threads
from ppsd_cli.tasks.calibrate.run import GivenHead, Job, calibrate
from ppsd_cli.tasks.progress import Steps
from ppsd_cli.ui.calibration_svg import curve_svg
from ppsd_cli.ui.calibration_table import calibration_view

_FEWEST_TOKENS = 8
_OWN_PROMPTS = "smoke"


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Flags of ``calibrate`` beside model and devices. ``heads`` None: the profile's."""

    heads: tuple[str, ...] | None
    prompts: Path | None
    limit: int | None
    tokens: int
    chat: bool
    output: Path | None
    json: bool
    plot: Path | None
    quiet: bool


def run_calibrate(choice: ModelChoice, flags: Settings, options: CalibrateOptions) -> int:
    """The whole command; returns the exit code. Nothing is written before everything is known."""
    if is_torchrun():
        raise ConfigError("ppsd calibrate measures one host; start it without torchrun")
    if options.tokens < _FEWEST_TOKENS:
        raise ConfigError(f"--max-new-tokens {options.tokens}: at least {_FEWEST_TOKENS}")
    check(flags)
    with Signals():
        try:
            _run(choice, flags, options)
        except Interrupted as signal:
            return signal.exit_code
    return 0


def _run(choice: ModelChoice, flags: Settings, options: CalibrateOptions) -> None:
    profile = find_profile(choice)
    place = options.output or default_place(profile_folders()[0], profile.name)
    check_place(place, profile_folders()[1:])
    if options.output is None:
        make_folder(place.parent)
    for path in (place, *([options.plot] if options.plot else [])):
        check_writable(path)
    steps = Steps(quiet=options.quiet)
    with contextlib.closing(steps):
        files = find_model(choice, profile, steps.say)
        job = prepare_job(files, profile, flags, options)
        calibration = calibrate(job, steps)
    text = profile_text(calibration, profile, flags, name=place.stem)
    if options.plot is not None:
        replace_bytes(options.plot, curve_svg(calibration).encode())
    replace_bytes(place, text.encode())
    _print(calibration, json_output=options.json)
    steps.say(f"ppsd: profile written to {place}")
    steps.say(f"ppsd: use it: ppsd generate --profile {_spoken(options.output, place)}")


def show_profile(name: str, *, json_output: bool, plot: Path | None) -> None:
    """A profile that was calibrated before, on stdout."""
    profile = load_profile(name, profile_folders())
    calibration = read_calibration(profile)
    if plot is not None:
        check_writable(plot)
        replace_bytes(plot, curve_svg(calibration).encode())
    _print(calibration, json_output=json_output)


def prepare_job(
    files: ModelFiles, profile: Profile, flags: Settings, options: CalibrateOptions
) -> Job:
    """Everything that can be decided before weights load."""
    spec = spec_of(files.folder)
    if spec.layers < 2:
        raise ConfigError("calibrate needs a model of two layers or more")
    layout = make_layout(flags.devices, layers=spec.layers, threads=flags.threads)
    device = layout.devices[min(layout.devices)][0]
    talk = TokenizerTalk(load_tokenizer(files.folder), options.chat)
    config = PipelineConfig(
        folder=str(files.folder),
        model_hash=files.model_hash,
        split=(spec.layers,),
        devices=(device,),
        dtype=choose_dtype(flags.dtype, (device,)),
        slots=context_of(flags, spec),
        threads=plain_threads(flags.threads)[0],
    )
    asked, source = _prompts(options)
    room = config.slots - options.tokens
    fitting = tuple(a for a in asked if len(talk.encode([user(a.question.turns[0])])) <= room)
    if not fitting:
        raise ConfigError(
            f"no prompt and its answer fit into the context of {config.slots} tokens; "
            "raise --context or lower --max-new-tokens"
        )
    return Job(
        model=profile.model or profile.name or files.name,
        spec=spec,
        config=config,
        layout=layout,
        heads=_heads(options, profile, config, spec),
        talk=talk,
        asked=fitting,
        tokens=options.tokens,
        end_ids=tuple(read_eos_ids(files.folder)),
        threads=plain_threads(flags.threads) if device == "cpu" else (1,),
        machine=machine_facts(layout.devices[max(layout.devices)]),
        prompts=source,
    )


def _prompts(options: CalibrateOptions) -> tuple[tuple[Asked, ...], str]:
    if options.prompts is not None:
        info, questions = load_prompt_file(options.prompts)
    else:
        info, questions = load_task(_OWN_PROMPTS, offline=True)
    return tuple(Asked(info.name, q) for q in spread(questions, options.limit)), info.name


def _heads(
    options: CalibrateOptions, profile: Profile, config: PipelineConfig, spec: ModelSpec
) -> tuple[GivenHead, ...]:
    """Trained heads; a raw exit competes in any case. AssetError where one does not fit."""
    names = profile.heads if options.heads is None else options.heads
    found = {}
    for name in names:
        folder = find_head(Settings(head=name), profile)
        info = describe_head(folder)
        if folder is None or info is None:
            if name != RAW_EXIT:
                raise ConfigError(f"--head {name}: give a trained head, or raw for none")
            continue
        split = tap_split(info, spec.layers)
        check_fit(info, model_hash=config.model_hash, hidden=spec.hidden, split=split)
        found[folder] = GivenHead(folder, shipped_name(folder), info)
    return tuple(found.values())


def _print(calibration: Calibration, *, json_output: bool) -> None:
    if json_output:
        sys.stdout.write(json.dumps(calibration_data(calibration), ensure_ascii=False) + "\n")
        sys.stdout.flush()
        return
    Console().print(calibration_view(calibration))


def _spoken(output: Path | None, place: Path) -> str:
    """How a person names the profile: by name in the own folder, by path elsewhere."""
    if output is None:
        return place.stem
    return str(output) if "/" in str(output) or output.suffix else f"./{output}"
