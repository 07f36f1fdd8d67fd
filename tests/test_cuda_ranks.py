"""The CUDA engine with a rank of ``torchrun`` for each device.

Event by event the in-process runner, bit by bit one device and several devices of one process. In
Triton's interpreter over gloo; on a GPU that the ranks share, over gloo by way of the host; on two
or three GPUs over NCCL.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_cases
import pytest
import torch
import triton_cpu
from cli_model import Ppsd, save_cli_model
from cuda_cases import VOCABULARY, Small, assert_exact, assert_same_events, prompt
from models import Run, forced_drafts
from test_cuda_trees import nodes_of
from trees import right_and_ranks

from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.heads import lagged_taps

TESTS = Path(__file__).parent
DEEP = ((1, 0), (2, 1), (4, 2))
SPLITS = {2: ((1, 3), (2, 2)), 3: ((1, 1, 2), (2, 1, 1))}
"""By ranks: for the deep head, and for raw exit."""
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
            (("cuda:0", "cuda:1"), pytest.mark.multi_gpu, 2, "two-gpus"),
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


def on_ranks(model: Small, jobs: list[dict]) -> tuple[list[list[Run | None]], str]:
    """Runs of the answers of each job, and the error that the last one ends with."""
    devices = jobs[0]["devices"]
    told, output = model.heads / "jobs", model.heads / "runs"
    told.write_text(json.dumps(jobs))
    ranks = torchrun(
        len(devices), "torchrun_graphs.py", str(model.tiny.folder), str(told), str(output)
    )
    assert output.exists(), ranks.stderr.decode()
    failed = any("fails" in job for job in jobs)
    assert (ranks.returncode != 0) == failed, ranks.stderr.decode()
    return pickle.loads(output.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "dtype"), PLACES)
def test_chains(tmp_path, devices, dtype):
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
    (even, early), common = SPLITS[len(devices)], {"devices": devices, "dtype": dtype}
    grouped = {"grouped": devices[0] == "cpu"}
    jobs = [
        {"split": even, "head": head, "answers": deep} | common,
        {"split": early, "head": "raw", "answers": right} | common | grouped,
        {"split": early, "head": "raw", "answers": right, "fails": 6} | common,
    ]
    ((first, _, sampled, naive, last), (other,)), error = on_ranks(model, jobs)
    assert error.startswith(f"StageError: stage {len(devices) - 1} (layer")
    assert f"{devices[-1]}): torch.OutOfMemoryError: CUDA" in error
    assert_exact(first, plain)
    assert_exact(sampled, drawn)
    assert naive.ids == plain.ids[:2]
    assert last.ids == plain.ids[:3]
    assert other.ids == plain.ids[:3]
    several = model.graph(even, head=head, groups=(1,) * len(even))
    same_numbers(first, answer(several, **deep[0]))
    if not model.same_numbers:
        return
    for split, with_head, options, run in (
        (even, head, deep[0], first),
        (even, head, deep[3], naive),
        (early, "raw", right[0], other),
    ):
        assert_same_events(run, answer(model.local(split, head=with_head), **options))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "dtype"), PLACES)
def test_trees(tmp_path, devices, dtype):
    """Answers of several widths, a chain and two depths after each other, guesses forced at
    various ranks and the head's own, sampling, ahead of the host and with logits; faults in what
    is sent.
    """
    from torchrun_graphs import FAULTS, answer

    model = Small(cuda_cases.save_small(tmp_path / "model", "llama"), devices[0], dtype, tmp_path)
    forced = right_and_ranks(model.plain(prompt(12), 6), 4)
    (even, early), interpreted = SPLITS[len(devices)], devices[0] == "cpu"
    deep = [
        {"length": 12, "count": 4, "width": 4} | forced,
        {"length": 19, "count": 2},
        {"length": 12, "count": 3, "width": 3, "sampling": DRAWN, "tree_scale": 0.7},
        {"length": 12, "count": 4, "width": 2, "keep_logits": False} | forced,
        {"length": 30, "seed": 2, "count": 2, "width": 4},
    ]
    taps = [(tap.depth, tap.lag) for tap in lagged_taps(even, depth=2)]
    jobs = [
        {"split": even, "head": model.head(DEEP, blocks=1), "answers": deep},
        {
            "split": early,
            "head": "raw",
            "answers": [{"length": 12, "count": 4, "width": 3} | forced],
            "grouped": interpreted,
        },
        {
            "split": even,
            "head": model.head(taps, depth=2),
            "answers": [{"length": 12, "count": 4, "width": 4, "depth": 2} | forced],
        },
    ]
    faults = [jobs[0] | {"answers": deep[:1], "fault": name} for name in FAULTS if interpreted]
    common = {"devices": devices, "dtype": dtype}
    found, _ = on_ranks(model, [job | common for job in jobs + faults])
    for job, runs in zip(jobs, found, strict=False):
        first = job["answers"][0]
        settings = {"head": job["head"], "width": first["width"], "depth": first.get("depth", 1)}
        several = model.graph(job["split"], groups=(1,) * len(devices), **settings)
        for run, options in zip(runs, job["answers"], strict=True):
            if not interpreted or run is found[0][0]:
                same_numbers(run, answer(several, **options))
            if model.same_numbers:
                local = model.local(job["split"], **settings)
                same_answers(run, answer(local, **options), **options)
    for (run,) in found[len(jobs) :]:
        with pytest.raises(AssertionError):
            same_answers(run, found[0][0], **deep[0])


def same_answers(
    run: Run | None, expected: Run, *, width: int = 1, keep_logits: bool = True, **_options: Any
) -> None:
    """The same nodes in the same slots, what became of them, and nearly the same logits."""
    assert run is not None
    assert run.ids == expected.ids
    assert width == 1 or nodes_of(run) == nodes_of(expected)
    if keep_logits:
        assert_same_events(run, expected, tree=width > 1)
    else:
        ours, theirs = (cuda_cases.facts(each.events, tree=True) for each in (run, expected))
        assert ours == theirs


@pytest.fixture(scope="module")
def cli_model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("ranks-model"))


ASKED = (
    "--prompt", "hello world", "--json", "--max-new-tokens", "4", "--ignore-eos", "--offline",
    "--head", "raw", "--split", "2,4", "--context", "32", "--threads", "1", "--width", "2",
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
