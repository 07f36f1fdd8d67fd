"""What loading and answering may raise, as errors that a person can act on."""

import contextlib
from collections.abc import Iterator

import torch

from ppsd_cli.errors import PpsdError, ResourceError

_REMEDY = "name fewer --decoders or other --devices"


@contextlib.contextmanager
def memory_errors(doing: str, *, remedy: str = _REMEDY) -> Iterator[None]:
    """ResourceError in place of torch's own where a device has no memory left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{doing}: not enough device memory; {remedy} ({first_line(error)})"
        ) from error


@contextlib.contextmanager
def foreign_errors(doing: str) -> Iterator[None]:
    """A PpsdError of one line in place of whatever another project's code raises."""
    try:
        with memory_errors(doing):
            yield
    except PpsdError:
        raise
    except Exception as error:
        raise PpsdError(f"{doing}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or what it is where it has none."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
