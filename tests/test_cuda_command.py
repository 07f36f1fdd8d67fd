"""``ppsd generate`` on a real GPU: the same tokens whatever the split and the decoder.

The comparison itself also runs on the CPU engine, so that it is known to work.
"""

import json
from pathlib import Path

import pytest
import torch
from cli_model import Ppsd, save_cli_model

DEVICES = [
    pytest.param("cpu", "float32", id="cpu"),
    *[
        pytest.param(
            "cuda:0",
            dtype,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
            id=f"gpu-{dtype}",
        )
        for dtype in ("float32", "bfloat16")
    ],
]
CHAINS = [("--split", "3,3"), ("--split", "1,2,3"), ("--stages", "6")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("cli-model"))


@pytest.fixture
def ppsd(capsys, monkeypatch, model, tmp_path) -> Ppsd:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    return Ppsd(capsys, monkeypatch, model)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("drawn", [(), ("--temperature", "0.8", "--top-p", "0.95", "--seed", "3")])
def test_the_same_tokens_whatever_the_split(ppsd, device, dtype, drawn):
    def tokens(*options: str) -> list[int]:
        result = ppsd.generate(
            "--prompt", "hello world", "--json", "--max-new-tokens", "60", "--ignore-eos",
            "--devices", device, "--dtype", dtype, *drawn, *options,
        )  # fmt: skip
        assert result.code == 0, result.err
        return list(json.loads(result.out)["token_ids"])

    reference = tokens("--decoder", "ar")
    assert len(reference) == 60
    for split in CHAINS:
        assert tokens("--decoder", "ppsd", "--head", "raw", *split) == reference
    assert tokens("--decoder", "ar", "--stages", "3") == reference
