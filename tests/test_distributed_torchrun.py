"""Stages as ranks of ``torchrun`` answer as one process does; failures end all ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed_models import answer, save_llama, settings, timeless
from test_failures import alive, assert_gone, wait_for

from ppsd_cli.runtime.pipeline import local_runner
from ppsd_cli.runtime.torchrun import is_torchrun, is_worker, join_warnings

SCRIPT = Path(__file__).parent / "torchrun_script.py"
ROOT = SCRIPT.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def start(model: Path, output: Path, mode: str) -> subprocess.Popen:
    """Two ranks of the script."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(SCRIPT), str(model), str(output), mode],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@dataclass(frozen=True)
class Held:
    """Two ranks that answer until something happens."""

    launcher: subprocess.Popen
    output: Path

    @property
    def pids(self) -> list[int]:
        """Process ids by rank, of those that have begun."""
        files = sorted(self.output.parent.glob(f"{self.output.name}.pid*"))
        return [int(file.read_text()) for file in files]

    def end(self) -> None:
        """Leave nothing behind."""
        for pid in alive(self.pids):
            os.kill(pid, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.communicate()


@pytest.fixture
def hold(model: Path, tmp_path: Path):
    """Start so many pairs of ranks, at the same time."""
    started = []

    def begin(count: int) -> list[Held]:
        for output in (tmp_path / f"events{index}" for index in range(count)):
            started.append(Held(start(model, output, "hold"), output))
        for held in started:
            wait_for(held.output)
        return started

    yield begin
    for held in started:
        held.end()


@pytest.mark.slow
def test_ranks_equal_one_process(model: Path, tmp_path: Path):
    output = tmp_path / "events"
    launcher = start(model, output, "once")
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, err.decode()
    assert out == b""
    runner = local_runner(settings(model, (2, 2)))
    events = [repr([timeless(e) for e in answer(runner)]) for _ in range(2)]
    assert json.loads(output.read_text())[:2] == events


@pytest.mark.slow
def test_as_many_ranks_as_stages(model: Path, tmp_path: Path):
    output = tmp_path / "events"
    launcher = start(model, output, "wrong-count")
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    error = Path(f"{output}.error0").read_text()
    assert error.startswith("ConfigError: torchrun started 2 processes for 3 stages")


@pytest.mark.slow
def test_an_error_while_loading_reaches_rank_0(model: Path, tmp_path: Path):
    output = tmp_path / "events"
    launcher = start(model, output, "bad-device")
    launcher.communicate(timeout=60)
    error = Path(f"{output}.error0").read_text()
    assert error.startswith("StageError: stage 1 (layers 2 to 3, nonsense): RuntimeError")


@pytest.mark.slow
def test_a_killed_rank_is_named(hold):
    (held,) = hold(1)
    os.kill(held.pids[1], signal.SIGKILL)
    begin = time.monotonic()
    error = wait_for(Path(f"{held.output}.error0"), 5)
    assert error.startswith("StageError: stage 1 (layers 2 to 3, cpu)")
    held.launcher.communicate(timeout=20)
    assert_gone(held.pids, 5)
    assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_a_frozen_rank_is_named(hold):
    """Of one pair rank 0 freezes, of another rank 1; the other rank of each ends within 15 s."""
    pairs = hold(2)
    for frozen, held in enumerate(pairs):
        os.kill(held.pids[frozen], signal.SIGSTOP)
    assert_gone([held.pids[1 - frozen] for frozen, held in enumerate(pairs)], 15)
    for frozen, held in enumerate(pairs):
        os.kill(held.pids[frozen], signal.SIGKILL)  # torchrun itself takes 30 s to do so
        _, err = held.launcher.communicate(timeout=20)
        assert f"ppsd: stage {frozen} (layers" in err.decode()


def test_not_under_torchrun():
    assert not is_torchrun()
    assert not is_worker()


@pytest.mark.parametrize(
    ("address", "warned"), [("127.0.0.1", False), ("localhost", False), ("192.0.2.7", True)]
)
def test_other_hosts_give_a_warning(monkeypatch, address, warned):
    monkeypatch.setenv("MASTER_ADDR", address)
    assert any("no authentication" in line for line in join_warnings()) == warned
