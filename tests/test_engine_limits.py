"""What cannot be served is refused before weights load. No GPU: it is pretended."""

from pathlib import Path

import pytest
import torch
from cli_model import Ppsd, save_cli_model

from ppsd_cli.commands import answer
from ppsd_cli.commands.prompts import PromptSource, is_short
from ppsd_cli.errors import ConfigError
from ppsd_cli.runtime import engine
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.tasks.bench import pool


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("limits-model"))


def loads(*_args, **_options):
    raise AssertionError("weights are loaded")


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """Two devices with the graph engine, on which nothing may be loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(engine, "has_graphs", lambda config: config.devices[0] != "cpu")
    for module in (answer, pool):
        monkeypatch.setattr(module, "open_engine", loads)


@pytest.fixture
def ppsd(capsys, monkeypatch, model, tmp_path) -> Ppsd:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    return Ppsd(capsys, monkeypatch, model)


BURSTS = ("--decoder", "eesd", "--split", "3,3")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--devices", "cuda:0", "--draft-length", "16"), "--draft-length 16: on a GPU"),
        (("--devices", "cuda:0,cuda:1"), "runs on one GPU; use --devices cuda:0"),
        (("--devices", "cuda:0", "--width", "4"), "--width 4 is for --decoder ppsd"),
    ],
    ids=str,
)
def test_generate_refuses(ppsd, options, says):
    result = ppsd.generate("--prompt", "hello", *BURSTS, *options)
    assert (result.code, result.out) == (2, "")
    assert says in result.err
    assert len(result.err.splitlines()) == 1


def test_a_prompt_beyond_the_context(ppsd):
    """Weights load beside the tokenizer only where the prompt is short enough for any."""
    result = ppsd.generate("--prompt", "word " * 500, "--devices", "cpu")
    assert result.code == 2
    assert "tokens, the context holds 128" in result.err
    source = PromptSource("", None, "\N{EURO SIGN}" * 100, chat=True)
    assert is_short("word", source, 1000)
    assert not is_short("\N{EURO SIGN}" * 100, source, 1000)


def test_bench_refuses_a_draft_length(ppsd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello world\n")
    args = ("--split", "3,3", "--devices", "cuda:0", "--decoders", "eesd", "--draft-length", "16")
    result = ppsd.run("bench", "--prompts", str(prompts), "-m", ppsd.model, "--offline", *args)
    assert (result.code, result.out) == (2, "")
    assert "choose 1 to 15" in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("devices", "length", "says"),
    [
        (("cuda:0", "cuda:0"), 15, None),
        (("cuda", "cuda:0"), 0, None),
        (("cuda:0", "cuda:1"), 0, None),
        (("cpu", "cpu"), 64, None),
        (("cuda:0", "cuda:0"), 16, "choose 1 to 15"),
        (("cuda:1", "cuda:0"), 1, "use --devices cuda:1"),
    ],
)
def test_what_the_engine_serves(devices, length, says):
    config = PipelineConfig("x", "sha256:0", (3, 3), devices, "float32", 128)
    if says is None:
        engine.check_engine(config, draft_length=length)
        return
    with pytest.raises(ConfigError, match=says):
        engine.check_engine(config, draft_length=length)


@pytest.mark.parametrize(
    ("devices", "reach", "told"),
    [
        ("cuda:0,cuda:1", False, True),
        ("cuda:0,cuda:1", True, False),
        ("cuda:0", False, False),
    ],
)
def test_states_that_go_through_the_host_are_told(ppsd, monkeypatch, devices, reach, told):
    crew = pytest.importorskip("ppsd_cli.runtime.cuda.crew")
    monkeypatch.setattr(crew, "devices_reach", lambda _devices: reach)
    result = ppsd.generate("--prompt", "hello", "--split", "3,3", "--devices", devices)
    notes = [line for line in result.err.splitlines() if "through the host" in line]
    assert len(notes) == told
    assert all("cuda:0, cuda:1 cannot write to each other's memory" in note for note in notes)
