"""Fixtures of the tests that compare the graph runner's answers: models, and plain decoding.

Without a GPU the kernels run in Triton's interpreter; with one, compiled, in two formats.
"""

from functools import cache
from typing import Any

import cuda_cases
import pytest
import torch
import triton_cpu
from cuda_cases import Small, ask, prompt

_MISSING = triton_cpu.missing()
_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PLACES = [
    pytest.param(
        ("cpu", "float32"), marks=pytest.mark.skipif(bool(_MISSING), reason=str(_MISSING)), id="cpu"
    ),
    pytest.param(("cuda:0", "float32"), marks=_GPU, id="gpu-float32"),
    pytest.param(("cuda:0", "bfloat16"), marks=_GPU, id="gpu-bfloat16"),
]


def small_models() -> Any:
    """The fixture ``small``: models by kind on one device in one format, each made once."""

    @pytest.fixture(scope="module", params=PLACES)
    def small(request, tmp_path_factory):
        device, dtype = request.param

        @cache
        def make(kind):
            folder = tmp_path_factory.mktemp(kind)
            return Small(cuda_cases.save_small(folder / "model", kind), device, dtype, folder)

        return make

    return small


def plain_answers(count: int, *, local: bool = False) -> Any:
    """The fixture ``plain``: one stage on the graph runner, each answer of ``count`` made once.

    ``local``: by the in-process runner, whose logits are not bit-equal to the graph runner's.
    """

    @pytest.fixture(scope="module")
    def plain(small):
        @cache
        def run(kind, length, count=count, sampling=None):
            model = small(kind)
            options = {} if sampling is None else {"sampling": sampling}
            if not local:
                return model.plain(prompt(length), count, **options)
            runner = model.local((model.layers,), head=None)
            return ask(runner, prompt(length), count=count, drafting=False, **options)

        return run

    return plain
