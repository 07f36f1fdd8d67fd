"""What importing costs: the command line needs no torch, a stage process no transformers."""

import subprocess
import sys
import time

import pytest


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded by ``code`` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    return set(done.stdout.split())


def test_the_command_line_loads_no_torch():
    heavy = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "yaml", "gguf"}
    assert not heavy & modules_after("import ppsd_cli.cli")


def test_stages_load_no_transformers():
    modules = ("runtime.engine", "runtime.stage_main", "runtime.pipeline", "model.head_files")
    loaded = modules_after("\n".join(f"import ppsd_cli.{module}" for module in modules))
    assert "torch" in loaded
    assert not {"transformers", "tokenizers", "typer", "rich", "yaml"} & loaded


@pytest.mark.parametrize("module", ["config", "core.schedule", "core.stats", "ui.live", "errors"])
def test_pure_parts_load_no_torch(module):
    assert not {"torch", "transformers"} & modules_after(f"import ppsd_cli.{module}")


def test_help_is_fast():
    """Half a second on an idle machine; the best of five, twice that where cores are shared."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "ppsd_cli", "--help"], capture_output=True, check=True
        )
        times.append(time.perf_counter() - begin)
    assert min(times) < 1.0
