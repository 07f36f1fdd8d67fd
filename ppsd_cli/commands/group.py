"""The top command: keeps Typer from turning Ctrl-C and a broken pipe into exit code 1."""

import signal
import sys
from typing import Any

from typer.core import TyperGroup


class ReaderGone(Exception):
    """Whoever read our output has closed it."""


class Group(TyperGroup):
    """Runs a command; what Typer would report by itself leaves as ``ReaderGone`` or exit 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone from error
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
