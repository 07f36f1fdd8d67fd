"""Writes docs/cli.md from the command line itself: python docs/generate_cli.py"""

from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from ppsd_cli.cli import app

EXIT_CODES = """
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | internal error (a bug; `--debug` shows where) |
| 2 | usage or configuration |
| 3 | a file, model, head or data set is missing or bad |
| 4 | devices, memory, disk or a port are not available |
| 5 | a stage failed |
| 6 | a gate of `bench` failed, or outputs that must be equal differ |
| 130, 143, 141 | ended by Ctrl-C, SIGTERM, or because the reader of stdout went away |
"""


def render() -> str:
    """The text of docs/cli.md."""
    command = typer.main.get_command(app)
    context = command.make_context("ppsd", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="ppsd", title="Command line")
    return text.rstrip() + "\n" + EXIT_CODES


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(render(), encoding="utf-8")
