"""The CUDA engine with a rank of ``torchrun`` for each device, in Triton's interpreter over gloo.

Event by event the in-process runner, bit by bit one device and several devices of one process.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cuda_cases
import pytest
import triton_cpu
from cuda_cases import VOCABULARY, Small, ask, assert_exact, assert_same_events, prompt
from models import MODEL_HASH, Run, forced_drafts

from ppsd_cli.core.plan import Sampling

SCRIPT = Path(__file__).parent / "torchrun_graphs.py"
ROOT = SCRIPT.parent.parent
COUNT = 7
DEEP = ((1, 0), (2, 1), (4, 2))
DRAWN = {"temperature": 0.8, "seed": 7}

pytestmark = [
    pytest.mark.skipif(bool(triton_cpu.missing()), reason=str(triton_cpu.missing())),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Small:
    folder = tmp_path_factory.mktemp("ranks")
    return Small(cuda_cases.save_small(folder / "model", "llama"), "cpu", "float32", folder)


def torchrun(ranks: int, *args: str) -> subprocess.Popen[bytes]:
    """Ranks that run a script of the tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node", str(ranks), *args],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run_jobs(model: Small, folder: Path, jobs: list[dict]) -> list[list[Run]]:
    """The runs of every pipeline, by as many ranks as its stages."""
    told, output = folder / "jobs", folder / "runs"
    told.write_text(json.dumps([{"model_hash": MODEL_HASH} | job for job in jobs]))
    ranks = torchrun(
        len(jobs[0]["split"]), str(SCRIPT), str(model.tiny.folder), str(told), str(output)
    )
    out, err = ranks.communicate(timeout=100)
    assert ranks.returncode == 0, err.decode()
    assert out == b""
    return pickle.loads(output.read_bytes())


def expected(runner, answers) -> list[Run]:
    """The same answers of another runner."""
    runs = []
    for options in answers:
        more = dict(options)
        length, seed = more.pop("length"), more.pop("seed", 1)
        if "sampling" in more:
            more["sampling"] = Sampling(**more["sampling"])
        runs.append(ask(runner, prompt(length, seed=seed), **more))
    return runs


def test_two_ranks(model, tmp_path):
    """Guesses right and wrong, sampling, answers after each other, and the naive split."""
    guesses = forced_drafts(model.plain(prompt(12), COUNT).ids, "thirds", VOCABULARY)
    answers = [
        {"length": 12, "count": COUNT, "forced": guesses},
        {"length": 30, "seed": 2, "count": 2, "keep_logits": False},
        {"length": 12, "count": 4, "sampling": DRAWN},
        {"length": 12, "count": 3, "drafting": False},
        {"length": 12, "count": COUNT, "forced": guesses, "keep_logits": False},
    ]
    jobs = [{"split": (1, 3), "head": "raw", "answers": answers}]
    (runs,) = run_jobs(model, tmp_path, jobs)
    print([r.ids for r in runs])
