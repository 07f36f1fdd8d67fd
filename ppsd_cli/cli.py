"""The command line: options to commands, errors to exit codes. Importing this loads no torch."""

import os
import signal
import sys
import traceback
from typing import Annotated, TextIO

import typer

from ppsd_cli import __version__
from ppsd_cli.commands.bench import bench
from ppsd_cli.commands.calibrate import calibrate
from ppsd_cli.commands.generate import generate
from ppsd_cli.commands.group import Group, ReaderGone
from ppsd_cli.commands.train_head import train_head
from ppsd_cli.errors import PpsdError

app = typer.Typer(
    name="ppsd",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Exact, faster answers from a language model whose layers are spread over devices.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ppsd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


app.command()(generate)
app.command()(bench)
app.command()(calibrate)
app.command("train-head")(train_head)


def main(arguments: list[str] | None = None) -> None:
    """Run ``ppsd`` and exit with a code of docs/cli.md."""
    args = sys.argv[1:] if arguments is None else arguments
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    try:
        app(args=args, prog_name="ppsd")
    except PpsdError as error:
        _fail(error, str(error), error.exit_code, args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (BrokenPipeError, ReaderGone):
        _leave_quietly()
    except Exception as error:  # noqa: BLE001 (the last resort, with its own exit code)
        detail = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
        _fail(error, detail, 1, args)


def _fail(error: BaseException, message: str, code: int, args: list[str]) -> None:
    if "--debug" in args:
        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"ppsd: {message}\n")
    sys.exit(code)


def _nowhere() -> TextIO:
    """In place of a stream that was closed before we were started."""
    return open(os.devnull, "w", encoding="utf-8")


def _leave_quietly() -> None:
    """The reader of our output has gone: end like any Unix tool, without a message."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
