"""Stages that die, freeze or cannot load: the error names the stage, and nothing stays behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from distributed_models import answer, save_llama, settings
from safetensors.torch import load_file, save_file

from ppsd_cli.errors import AssetError, StageError
from ppsd_cli.runtime.processes import spawn_runner

SPAWN = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from distributed_models import answer, settings
from ppsd_cli.runtime.processes import spawn_runner
runner = spawn_runner(settings(Path({model!r}), (2, 2)))
Path({output!r}).write_text(" ".join(map(str, runner.pids)))
while True:
    answer(runner, keep_logits=False)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def running(model: Path):
    runner = spawn_runner(settings(model, (1, 2, 1)))
    yield runner
    runner.close()


def alive(pids) -> list[int]:
    """Those processes that still exist and are no zombies."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.append(pid)
    return found


def assert_gone(pids, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pids)


def wait_for(path: Path, seconds: float = 40.0) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


def answer_forever(runner) -> None:
    while True:
        answer(runner, keep_logits=False)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_killed_stage_is_named(running, stage):
    pids = running.pids
    answer(running)
    os.kill(pids[stage], signal.SIGKILL)
    begin = time.monotonic()
    layers = ["layers 0 to 0", "layers 1 to 2", "layers 3 to 3"][stage]
    with pytest.raises(StageError, match=rf"stage {stage} \({layers}.*killed by signal 9"):
        answer_forever(running)
    assert time.monotonic() - begin < 5
    assert_gone(pids, 0)
    assert running.pending == 0
    with pytest.raises(StageError, match="killed by signal 9"):
        answer(running)


@pytest.mark.slow
def test_a_frozen_stage_is_named(model: Path):
    """The first stage and the last one, each of a pipeline of its own, at the same time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda stage: check_frozen(model, stage), (0, 2)))


def check_frozen(model: Path, stage: int) -> None:
    with closing(spawn_runner(settings(model, (1, 2, 1)))) as runner:
        pids = runner.pids
        answer(runner)
        os.kill(pids[stage], signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(StageError, match=rf"stage {stage} .* no sign of life"):
            answer_forever(runner)
        assert time.monotonic() - begin < 15
        assert_gone(pids, 0)


def test_closing_ends_stopped_stages(running):
    pids = running.pids
    os.kill(pids[1], signal.SIGSTOP)
    running.close()
    assert_gone(pids, 0)
    running.close()


def test_stages_outlive_ctrl_c(running):
    for pid in running.pids:
        os.kill(pid, signal.SIGINT)
    assert answer(running)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_killed_launcher_leaves_nothing(model: Path, tmp_path: Path, freeze):
    output = tmp_path / "pids"
    code = SPAWN.format(tests=str(Path(__file__).parent), model=str(model), output=str(output))
    launcher = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        pids = [int(pid) for pid in wait_for(output).split()]
        assert alive(pids) == pids
        if freeze:
            os.kill(pids[1], signal.SIGSTOP)
    finally:
        launcher.kill()
        launcher.wait()
    assert_gone(pids)


def test_not_a_number_names_the_stage(model: Path, tmp_path: Path):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    runner = spawn_runner(settings(damaged, (2, 2)))
    try:
        with pytest.raises(StageError, match="stage 1: "):
            answer(runner)
        assert_gone(runner.pids, 0)
    finally:
        runner.close()


def test_a_truncated_file_is_the_same_error_as_in_this_process(model: Path, tmp_path: Path):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AssetError, match=r"model\.safetensors"):
        spawn_runner(settings(damaged, (2, 2)))


def test_an_unforeseen_error_tells_its_last_line(model: Path, capfd, monkeypatch):
    config = settings(model, (2, 2), devices=("cpu", "nonsense"))
    with pytest.raises(StageError, match=r"stage 1 \(layers 2 to 3, nonsense\): RuntimeError"):
        spawn_runner(config)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("PPSD_DEBUG", "1")
    with pytest.raises(StageError):
        spawn_runner(config)
    assert "Traceback" in capfd.readouterr().err
