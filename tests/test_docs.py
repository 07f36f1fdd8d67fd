"""Documents that are made from the code, and links between documents."""

import re
import runpy
from collections import defaultdict
from pathlib import Path

import pytest
import typer

from ppsd_cli.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_cli_md_is_what_the_command_line_says():
    made = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))["render"]()
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == made, "stale: run `python docs/generate_cli.py`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_a_flag_says_the_same_in_every_command():
    """But for its default, and for flags that are something else in another command."""
    own = {"--output", "--head", "--seed", "--width"}
    commands = typer.main.get_command(app).commands
    texts = defaultdict(set)
    for name in ("generate", "bench", "calibrate"):
        for parameter in commands[name].params:
            if parameter.param_type_name == "option" and parameter.opts[0] not in own:
                said = parameter.help.partition("Default: ")[0].strip()
                texts[parameter.opts[0]].add((said, parameter.rich_help_panel))
    assert len(texts) > 40
    assert {flag: said for flag, said in texts.items() if len(said) > 1} == {}
