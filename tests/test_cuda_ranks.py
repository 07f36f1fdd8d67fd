"""The CUDA engine with a rank of ``torchrun`` for each device.

Event by event the in-process runner, bit by bit one device and several devices of one process. In
Triton's interpreter over gloo; on a GPU that the ranks share, over gloo by way of the host; on
three GPUs over NCCL.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cuda_cases
import pytest
import torch
import triton_cpu
from cli_model import Ppsd, save_cli_model
from cuda_cases import VOCABULARY, Small, assert_exact, assert_same_events, prompt
from models import Run, forced_drafts

from ppsd_cli.core.plan import Sampling

TESTS = Path(__file__).parent
DEEP = ((1, 0), (2, 1), (4, 2))
DRAWN = {"temperature": 0.8, "seed": 7}
MISSING = triton_cpu.missing()

INTERPRETED = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
PLACES = [
    pytest.param(("cpu",) * 3, "float32", marks=INTERPRETED, id="cpu"),
    *[
        pytest.param(
            devices,
            "bfloat16",
            marks=[
                marker,
                pytest.mark.skipif(torch.cuda.device_count() < wanted, reason="too few GPUs"),
            ],
            id=name,
        )
        for devices, marker, wanted, name in (
            (("cuda:0",) * 3, pytest.mark.gpu, 1, "one-gpu"),
            (("cuda:0", "cuda:1", "cuda:2"), pytest.mark.multi_gpu, 3, "three-gpus"),
        )
    ],
]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def torchrun(ranks: int, script: str, *args: str, **more: str) -> subprocess.CompletedProcess:
    """Ranks that run a script of the tests; ``more`` for their environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(ranks), str(TESTS / script), *args],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"} | more,
        capture_output=True,
        check=False,
        timeout=100,
    )


def same_numbers(run: Run, reference: Run) -> None:
    """The same results, with bit-equal logits of every target and draft, void ones too."""
    assert cuda_cases.facts(run.events) == cuda_cases.facts(reference.events)
    for ours, theirs in zip(run.results, reference.results, strict=True):
        pairs = zip(ours.draft_logits, theirs.draft_logits, strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs)
        for mine, other in zip(ours.targets, theirs.targets, strict=True):
            assert (mine.logits is None) == (other.logits is None)
            assert mine.logits is None or torch.equal(mine.logits, other.logits)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "dtype"), PLACES)
def test_three_ranks(tmp_path, devices, dtype):
    """A deep head with taps on both followers, prompts of several chunks, guesses right and wrong,
    sampling, the naive split, each after the other; other links; a rank that fails.
    """
    from torchrun_graphs import answer

    tiny = cuda_cases.save_small(tmp_path / "model", "llama")
    model = Small(tiny, devices[0], dtype, tmp_path)
    plain = model.plain(prompt(19), 5)
    drawn = model.plain(prompt(12), 3, sampling=Sampling(**DRAWN))
    guesses = list(forced_drafts(plain.ids, "thirds", VOCABULARY)[:3])
    head = model.head(DEEP, blocks=2)
    deep = [
        {"length": 19, "count": 5, "forced": guesses},
        {"length": 30, "seed": 2, "count": 2, "keep_logits": False},
        {"length": 12, "count": 3, "sampling": DRAWN},
        {"length": 19, "count": 2, "drafting": False},
        {"length": 19, "count": 3, "forced": plain.ids[1:3], "keep_logits": False},
    ]
    right = [{"length": 19, "count": 3, "forced": plain.ids[1:]}]
    jobs = [
        {"split": (1, 1, 2), "head": head, "answers": deep},
        {"split": (2, 1, 1), "head": "raw", "answers": right, "grouped": True},
        {"split": (2, 1, 1), "head": "raw", "answers": right, "fails": 6},
    ]
    told, output = tmp_path / "jobs", tmp_path / "runs"
    for job in jobs:
        job |= {"devices": devices, "dtype": dtype}
        job["grouped"] = job.get("grouped", False) and devices[0] == "cpu"
    told.write_text(json.dumps(jobs))
    ranks = torchrun(3, "torchrun_graphs.py", str(model.tiny.folder), str(told), str(output))
    assert ranks.returncode != 0
    assert output.exists(), ranks.stderr.decode()
    ((first, _, sampled, naive, last), (other,)), error = pickle.loads(output.read_bytes())
    assert error.startswith(
        f"StageError: stage 2 (layers 2 to 3, {devices[2]}): torch.OutOfMemoryError: CUDA"
    )
    assert_exact(first, plain)
    assert_exact(sampled, drawn)
    assert naive.ids == plain.ids[:2]
    assert last.ids == plain.ids[:3]
    assert other.ids == plain.ids[:3]
    several = model.graph((1, 1, 2), head=head, groups=(1, 1, 1))
    same_numbers(first, answer(several, **deep[0]))
    if not model.same_numbers:
        return
    for split, with_head, options, run in (
        ((1, 1, 2), head, deep[0], first),
        ((1, 1, 2), head, deep[3], naive),
        ((2, 1, 1), "raw", right[0], other),
    ):
        assert_same_events(run, answer(model.local(split, head=with_head), **options))


@pytest.fixture(scope="module")
def cli_model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("ranks-model"))


ASKED = (
    "--prompt", "hello world", "--json", "--max-new-tokens", "4", "--ignore-eos", "--offline",
    "--head", "raw", "--split", "2,4", "--context", "32", "--threads", "1",
)  # fmt: skip


@INTERPRETED
@pytest.mark.slow
def test_generate(cli_model, capsys, monkeypatch, tmp_path):
    """The command under torchrun says what it says of one process."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    options = ("--devices", "cpu")
    ranks = torchrun(
        2, "torchrun_generate.py", "generate", "-m", str(cli_model), *ASKED, *options
    )  # fmt: skip
    assert ranks.returncode == 0, ranks.stderr.decode()
    ours = json.loads(ranks.stdout)
    one = Ppsd(capsys, monkeypatch, cli_model).generate(*ASKED, *options)
    theirs = json.loads(one.out)
    for field in ("token_ids", "text", "finish_reason", "split", "devices", "verified", "accepted"):
        assert ours[field] == theirs[field], field
