"""What the flags of ``ppsd generate`` say of one answer and its output."""

from dataclasses import dataclass
from pathlib import Path

from ppsd_cli.errors import ConfigError
from ppsd_cli.files import check_writable


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Flags of ``generate`` that concern one answer and its output."""

    seed: int = 0
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    json: bool = False
    timeline: bool | None = None
    trace: Path | None = None
    output: Path | None = None
    quiet: bool = False
    raw: bool = False
    port: int | None = None


def check_options(options: AnswerOptions) -> None:
    """ConfigError for flags that cannot be meant; AssetError for files that cannot be written."""
    for path in (options.output, options.trace):
        if path is not None:
            check_writable(path)
    if options.json and options.raw:
        raise ConfigError("--json and --raw: JSON is always escaped; drop --raw")
