"""What ``ppsd generate`` leaves where an answer does not come to its end.

Where a rank of ``torchrun`` freezes, rank 0's main thread waits in a receive for good, so another
thread writes. Here all stages are in this process, and a runner that stops working stands for the
frozen rank.
"""

import json
import threading
from pathlib import Path

import jsonschema
import pytest
import torch
from cli_model import Ppsd, save_cli_model

import ppsd_cli
from ppsd_cli.commands import answer, answer_output
from ppsd_cli.core.plan import Plan
from ppsd_cli.runtime.engine import Engine
from ppsd_cli.runtime.local import LocalRunner
from ppsd_cli.runtime.pipeline import local_runner

SCHEMA = Path(ppsd_cli.__file__).parent / "data" / "schema" / "generate.json"
MESSAGE = "stage 1 (layers 3 to 5, cpu) has given no sign of life for 10 s"
ASKED = ("--prompt", "hello world", "-n", "24", "--ignore-eos", "--split", "3,3")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("frozen-model"))


@pytest.fixture
def ppsd(capsys, monkeypatch, model, tmp_path) -> Ppsd:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    return Ppsd(capsys, monkeypatch, model)


class Freezing:
    """A runner whose ``ticks``th tick never ends; what watches the ranks says so elsewhere."""

    lookahead = 0

    def __init__(self, runner, ticks: int, on_frozen) -> None:
        self._runner, self._left, self._on_frozen = runner, ticks, on_frozen
        self.stages, self.close = runner.stages, runner.close

    @property
    def pending(self) -> int:
        return self._runner.pending

    def submit(self, plan: Plan) -> None:
        self._runner.submit(plan)

    def collect(self):
        self._left -= 1
        if self._left == 0:
            watch = threading.Thread(target=self._on_frozen, args=(MESSAGE,))
            watch.start()
            watch.join()
            raise SystemExit(5)  # in place of ``leave``, which a test cannot survive
        return self._runner.collect()


@pytest.fixture
def freeze(monkeypatch):
    """Let the next answer freeze at a tick; what the process would have said in leaving."""
    said: list[str] = []
    monkeypatch.setattr(answer_output, "leave", said.append)

    def freeze(ticks: int) -> list[str]:
        def open_engine(config, *, on_frozen, **_options):
            return Engine(config, Freezing(local_runner(config), ticks, on_frozen))

        monkeypatch.setattr(answer, "open_engine", open_engine)
        return said

    return freeze


def test_json_of_a_frozen_rank(ppsd, freeze, tmp_path):
    whole = json.loads(ppsd.generate(*ASKED, "--devices", "cpu", "--json").out)
    said, trace = freeze(20), tmp_path / "trace.json"
    result = ppsd.generate(*ASKED, "--devices", "cpu", "--json", "--trace", str(trace))
    assert result.code == 5
    report = json.loads(result.out)
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert (report["finish_reason"], report["incomplete"]) == ("failed", True)
    assert report["error"] == MESSAGE
    assert 1 < len(report["token_ids"]) < 24
    assert whole["token_ids"][: len(report["token_ids"])] == report["token_ids"]
    assert report["text"]
    assert whole["text"].startswith(report["text"])
    assert said == [MESSAGE]
    assert isinstance(json.loads(trace.read_text()), list)


@pytest.mark.parametrize("form", ["stdout", "file", "timeline"])
def test_text_of_a_frozen_rank(ppsd, freeze, tmp_path, form):
    whole = ppsd.generate(*ASKED, "--devices", "cpu").out
    said, file = freeze(20), tmp_path / "answer.txt"
    extra = {"stdout": (), "file": ("-o", str(file)), "timeline": ("--timeline",)}[form]
    result = ppsd.generate(*ASKED, "--devices", "cpu", *extra)
    text = file.read_text() if form == "file" else result.out
    assert text.strip()
    assert whole.startswith(text.rstrip("\n"))
    assert ("stage 1" in result.err) == (form == "timeline"), "the timeline's last frame"
    assert said == [MESSAGE]


def test_a_rank_that_freezes_while_loading(ppsd, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(answer_output, "leave", said.append)

    def open_engine(_config, *, on_frozen, **_options):
        on_frozen(MESSAGE)
        raise SystemExit(5)

    monkeypatch.setattr(answer, "open_engine", open_engine)
    result = ppsd.generate(*ASKED, "--devices", "cpu", "--json")
    assert (result.code, result.out, said) == (5, "", [MESSAGE])


def test_an_answer_that_is_written_already_stays(ppsd, freeze, monkeypatch):
    """The rank freezes when the main thread has gone on."""
    right, said = answer_output.AnswerOutput.write, freeze(1000)

    def write(self, answer):
        right(self, answer)
        self.frozen(MESSAGE)

    monkeypatch.setattr(answer_output.AnswerOutput, "write", write)
    result = ppsd.generate(*ASKED, "--devices", "cpu", "--json")
    assert (result.code, said) == (0, [])
    assert not json.loads(result.out)["incomplete"]


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried much.\nSee the manual")


def test_stages_that_find_no_memory(ppsd, monkeypatch):
    def open_engine(*_args, **_options):
        raise NO_MEMORY

    monkeypatch.setattr(answer, "open_engine", open_engine)
    result = ppsd.generate(*ASKED, "--devices", "cpu", "--json")
    assert (result.code, result.out) == (4, "")
    assert "loading the stages: not enough device memory; use a smaller --context" in result.err
    assert "See the manual" not in result.err, "one line"


def test_an_answer_that_finds_no_memory_keeps_its_tokens(ppsd, monkeypatch):
    """Graphs are recorded, and buffers made, when a device first needs them."""
    whole = json.loads(ppsd.generate(*ASKED, "--devices", "cpu", "--json").out)
    right, ticks = LocalRunner.collect, iter(range(20))

    def collect(self):
        if next(ticks, None) is None:
            raise NO_MEMORY
        return right(self)

    monkeypatch.setattr(LocalRunner, "collect", collect)
    result = ppsd.generate(*ASKED, "--devices", "cpu", "--json")
    assert result.code == 4, result.err
    assert "the answer: not enough device memory" in result.err
    report = json.loads(result.out)
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert (report["finish_reason"], report["incomplete"]) == ("failed", True)
    assert 1 < len(report["token_ids"]) < 24
    assert whole["token_ids"][: len(report["token_ids"])] == report["token_ids"]
