"""What a benchmark was asked to compare."""

from dataclasses import dataclass

from ppsd_cli.config import check_width
from ppsd_cli.errors import ConfigError

DECODERS = ("ar", "ppsd", "naive-split", "eesd", "hf", "hf-early-exit")


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for. ``draft_length`` None: look for the best.

    ``widths``: of trees, beside the chain. ``among``: for each of ``acceptance``, how often the
    right token is among the guesses behind a node of a tree.
    """

    decoders: tuple[str, ...]
    acceptance: tuple[float, ...] = ()
    draft_length: int | None = None
    widths: tuple[int, ...] = ()
    among: tuple[float, ...] = ()


def check_wish(wish: Wish) -> None:
    """ConfigError for contenders that do not exist or contradict each other."""
    for name in wish.decoders:
        if name not in DECODERS:
            raise ConfigError(f"--decoders {name}: choose of {', '.join(DECODERS)}")
    for acceptance in wish.acceptance:
        if not 0 <= acceptance <= 1:
            raise ConfigError(f"--acceptance {acceptance:g}: give shares between 0 and 1")
    if len(set(wish.acceptance)) < len(wish.acceptance):
        raise ConfigError("--acceptance: a value is given twice")
    if wish.draft_length is not None and "eesd" not in wish.decoders:
        raise ConfigError("--draft-length is for eesd, which --decoders does not name")
    _check_trees(wish)


def check_shares(wish: Wish) -> None:
    """ConfigError for shares of trees without a tree, once the profile's width is known."""
    if wish.among and not wish.widths:
        raise ConfigError("--acceptance with two shares is for trees; add --width, such as 4")


def _check_trees(wish: Wish) -> None:
    for acceptance, among in zip(wish.acceptance, wish.among, strict=False):
        if not acceptance <= among <= 1:
            raise ConfigError(
                f"--acceptance {acceptance:g}/{among:g}: the second share counts the first in; "
                f"give {acceptance:g} to 1"
            )
    for width in wish.widths:
        check_width(width)
    if wish.widths and "ppsd" not in wish.decoders:
        raise ConfigError("--width is for ppsd, which --decoders does not name")
