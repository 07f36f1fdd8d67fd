"""The README's own commands run as they stand, on the demo model, with few and short answers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
README = Path(__file__).parent.parent / "README.md"
DEMO = "smollm2-135m"


def commands() -> list[str]:
    """Every `$` line of a console block that uses the demo model."""
    blocks = re.findall(r"```console\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if DEMO in line]


def test_there_are_commands() -> None:
    assert len(commands()) >= 4


@pytest.mark.parametrize("command", commands())
def test_command_of_the_readme(command: str) -> None:
    """Only a filter after ``ppsd`` that the machine lacks is left out."""
    parts = [part.strip() for part in command.split(" | ")]
    if parts[-1].startswith("jq"):
        parts.pop()
    parts[-1] += " --max-new-tokens 12"
    if parts[-1].startswith("ppsd bench"):
        parts[-1] += " --limit 1"
    folder = Path(sys.executable).parent
    script = " | ".join(
        re.sub(r"^(ppsd|torchrun)\b", lambda m: shlex.quote(str(folder / m[1])), part)
        for part in parts
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
