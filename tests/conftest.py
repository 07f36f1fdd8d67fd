"""Fixtures that several test files share."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import triton_cpu
from models import Tiny, save_tiny

triton_cpu.claim()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The thread count decides rounding and, on two shared cores, how steady times are.

    An engine sets its own, so each test begins with one.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Tiny models by kind, each made once."""
    return cache(lambda kind: save_tiny(tmp_path_factory.mktemp(kind), kind))
