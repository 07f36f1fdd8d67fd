"""Every kernel of the CUDA engine compiles for a Hopper GPU, on a machine that has none.

The interpreter takes code that the compiler refuses; so the launches of real pipelines are
caught (see cuda_compile_script.py) and compiled, with the shapes and formats of real models.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ppsd_cli.runtime.cuda

SHARED_MEMORY = 227 * 1024
"""Bytes that one program may have on compute capability 9.0."""
SCRIPT = Path(__file__).parent / "cuda_compile_script.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("shape", "dtype", "extent"),
    [
        ("smollm2-135m", "bfloat16", "all"),
        ("qwen3-4b", "bfloat16", "longest"),  # norms of heads, and tiles of large matrices
    ],
)
def test_every_kernel_compiles(shape, dtype, extent, tmp_path):
    compiled = compile_kernels(tmp_path, shape, dtype, extent)
    names = {kernel["kernel"] for kernel in compiled}
    if extent == "all":
        assert names == kernels_of_the_engine()
    else:
        assert {"linear_kernel", "qkv_kernel", "attend_kernel", "tree_boundary_kernel"} <= names
    for kernel in compiled:
        assert kernel["machine_code"] > 0
        assert kernel["shared"] <= SHARED_MEMORY, kernel


def compile_kernels(cache, *settings):
    """What the script says, in a process without the interpreter and with an empty cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *settings],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels_of_the_engine():
    """Names of all functions that are launched, by the rule that they end in ``_kernel``."""
    names = set()
    for file in Path(ppsd_cli.runtime.cuda.__file__).parent.glob("*.py"):
        found = re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", file.read_text())
        names.update(found)
    return names
