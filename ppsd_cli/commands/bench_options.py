"""What the flags of ``ppsd bench`` say, and whether they can be meant together."""

from dataclasses import dataclass
from pathlib import Path

from ppsd_cli.core.plan import MAX_DRAFT_LENGTH
from ppsd_cli.errors import ConfigError
from ppsd_cli.files import check_writable

FORMATS = ("table", "json", "csv", "markdown")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Flags of ``bench`` that do not concern model and pipeline. No decoders: the default ones."""

    tasks: tuple[str, ...]
    prompts: Path | None
    limit: int | None
    ignore_eos: bool
    chat: bool
    decoders: tuple[str, ...]
    acceptance: tuple[float, ...]
    draft_length: int | None
    repetitions: int
    warmup: int
    seed: int
    resume: Path | None
    format: str
    json: bool
    output: Path | None
    report: Path | None
    quiet: bool
    fail_under: tuple[str, ...]
    baseline: Path | None
    widths: tuple[int, ...] = ()
    among: tuple[float, ...] = ()


def parse_list(text: str | None) -> tuple[str, ...]:
    """``a,b`` as its parts, each once; nothing for None."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if text is not None and not all(parts):
        raise ConfigError(f"{text!r}: a name is missing between commas")
    return tuple(dict.fromkeys(parts))


def parse_shares(text: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``0.5,0.8`` as numbers, and nothing; ``0.5/0.7,0.8/0.9`` as (0.5, 0.8) and (0.7, 0.9)."""
    parts = [part.split("/") for part in parse_list(text)]
    sizes = {len(part) for part in parts}
    if not sizes:
        return (), ()
    try:
        if not (sizes == {1} or sizes == {2}):
            raise ValueError
        columns = [tuple(float(value) for value in each) for each in zip(*parts, strict=True)]
    except ValueError as error:
        raise ConfigError(
            f"--acceptance {text}: give shares between 0 and 1 separated by commas, such as "
            "0.5,0.8, or for trees all with a second one, such as 0.5/0.7,0.8/0.9"
        ) from error
    return columns[0], columns[1] if len(columns) > 1 else ()


def parse_widths(text: str | None) -> tuple[int, ...]:
    """``2,4`` as numbers."""
    try:
        return tuple(int(part) for part in parse_list(text))
    except ValueError as error:
        raise ConfigError(
            f"--width {text}: give widths of trees separated by commas, such as 2,4"
        ) from error


def check_options(options: BenchOptions) -> None:
    """ConfigError for flags that cannot be meant; AssetError for files that cannot be written."""
    if options.prompts is not None and options.tasks:
        raise ConfigError("give a task or --prompts, not both")
    if options.prompts is None and not options.tasks:
        raise ConfigError("no task: name one (`ppsd bench --list` shows them), or give --prompts")
    if options.format not in FORMATS:
        raise ConfigError(f"--format {options.format}: choose one of {', '.join(FORMATS)}")
    if options.json and options.format != "json":
        raise ConfigError(f"--json and --format {options.format} disagree; drop one")
    for name, value, least in (
        ("repetitions", options.repetitions, 1),
        ("warmup", options.warmup, 0),
        ("seed", options.seed, 0),
        ("limit", options.limit, 1),
        ("draft-length", options.draft_length, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: must be {least} or more")
    if options.draft_length is not None and options.draft_length > MAX_DRAFT_LENGTH:
        raise ConfigError(f"--draft-length {options.draft_length}: at most {MAX_DRAFT_LENGTH}")
    written = [p for p in (options.output, options.report, options.resume) if p is not None]
    if len({path.absolute() for path in written}) < len(written):
        raise ConfigError("--output, --report and --resume name the same file; give each its own")
    for path in written:
        check_writable(path)
