"""What the benchmark over several GPUs runs: pipelines in Triton's interpreter, gloo ranks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import many_gpus_layout
import many_gpus_links
import many_gpus_ppsd
import pytest
import triton_cpu
from many_gpus_jobs import Job, run_part
from many_gpus_layers import check_shape
from many_gpus_plan import LINKS, Part, Setup, spec_for

from ppsd_cli.calibration_records import DeviceMemory
from ppsd_cli.errors import ConfigError, ResourceError
from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.runtime import memory_plan

ROOT = Path(__file__).parents[1]
SMALL = Setup(("tiny",), (2,), 0, layers=2, tokens=5, answers=1, prompt=3, acceptance=(0.5, 1.0))

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


# --- the pipelines


@pytest.fixture
def small(monkeypatch):
    """A shape that the interpreter can do in seconds."""
    shape = replace(SHAPES["tiny"], hidden=32, intermediate=32, heads=2, kv_heads=1, vocabulary=64)
    monkeypatch.setitem(SHAPES, "tiny", shape)


def job_of(tmp_path: Path, *links: str, setup: Setup = SMALL) -> Job:
    part = Part("ppsd", "tiny", 2, links, played=True)
    return Job(setup, part, tuple(LINKS[link] for link in links), tmp_path / "out.jsonl")


def figures_in(job: Job) -> dict:
    lines = [json.loads(line) for line in job.out.read_text().splitlines()]
    return {line["link"]: line["figures"] for line in lines if "link" in line}


@pytest.mark.skipif(triton_cpu.missing() is not None, reason=str(triton_cpu.missing()))
@pytest.mark.usefixtures("small")
def test_a_chain_over_a_slow_link(tmp_path, monkeypatch):
    """Guesses are right as often as asked, the text is that of plain decoding, and each device is
    held up once a tick.
    """
    waits: list[float] = []
    monkeypatch.setattr(many_gpus_links, "sleep", waits.append)
    job = job_of(tmp_path, "host+50us", setup=replace(SMALL, acceptance=(0.5,)))
    many_gpus_ppsd.work(job)
    found = figures_in(job)["host+50us"]
    (chain,), (tree,) = found["chain"], found["tree"]
    assert 0 < chain["realised"] < 1
    assert 0 < tree["realised"] <= 1
    assert chain["equal_answers"] == tree["equal_answers"] == [1, 1]
    assert len(found["own_ms"]) == 2
    assert found["fixed_ms"] == found["timed_tick_ms"] - max(found["own_ms"])
    assert set(waits) == {50e-6}
    runs = (found["naive"], chain, tree)
    ticks = sum(round((SMALL.tokens - 1) / run["tokens_per_tick"]) for run in runs)
    assert len(waits) >= 2 * ticks


@pytest.mark.skipif(triton_cpu.missing() is not None, reason=str(triton_cpu.missing()))
@pytest.mark.usefixtures("small")
def test_trees_where_the_engine_has_them(tmp_path, monkeypatch):
    """Here all stages are on one device, in step."""
    runner = many_gpus_ppsd.graph_runner

    def together(*stages, groups, **options):
        assert groups == (1, 1)
        return runner(*stages, **options)

    monkeypatch.setattr(many_gpus_ppsd, "graph_runner", together)
    setup = replace(SMALL, width=2, tokens=3, acceptance=(0.3,))
    job = job_of(tmp_path, "peer", setup=setup)
    many_gpus_ppsd.work(job)
    chain, tree = (figures_in(job)["peer"][kind][0] for kind in ("chain", "tree"))
    assert tree["equal_answers"] == [1, 1]
    assert tree["realised"] > chain["realised"]


def test_memory_is_planned_before_weights_load(tmp_path, monkeypatch):
    setup = replace(SMALL, shapes=("llama-70b",), layers=None, devices=4, counts=(4,))
    part = Part("ppsd", "llama-70b", 4, ("peer",))
    plan = many_gpus_layout.layout(Job(setup, part, (), tmp_path / "out"))
    assert plan.config.devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert sum(plan.config.split) == 80
    assert plan.config.split[0] < plan.config.split[1]  # the head takes its part of a tick
    free = 30 << 30
    monkeypatch.setattr(memory_plan, "available_memory", lambda _: free)
    with pytest.raises(ResourceError, match=r"80 layers over 4 stages: cuda:0 needs 40\.\d GiB"):
        many_gpus_layout.check(plan)
    free = 60 << 30
    monkeypatch.setattr(memory_plan, "available_memory", lambda _: free)
    assert DeviceMemory(**many_gpus_layout.check(plan)[0]).available == free


# --- tensor parallelism


def test_what_cannot_be_shared_out():
    check_shape(spec_for("llama-70b", None), 8)
    with pytest.raises(ConfigError, match="8 key/value heads cannot be shared by 3 ranks"):
        check_shape(spec_for("llama-8b", 4), 3)
    with pytest.raises(ConfigError, match="untied"):
        check_shape(spec_for("llama-1b", None), 2)


def test_ranks_agree_with_one_process(tmp_path):
    script = ROOT / "tests" / "tensor_parallel_script.py"
    places = os.pathsep.join(map(str, (ROOT, ROOT / "docs" / "benchmarks")))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "2", "4"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": places, "GLOO_SOCKET_IFNAME": "lo"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout).values():
        assert found["difference"] < 1e-4
        assert found["same_text"]
        assert found["without_all_reduce"] > 0.1
        assert found["at_another_slot"] > 0.1


def test_a_part_of_tensor_parallelism():
    """The real worker, as a part of the script; one rank reduces, too."""
    part = Part("tp", "tiny", 1, ("host", "host+50us"))
    setup = replace(SMALL, variants=("eager",))
    outcome = run_part(part, setup, part.links, seconds=60)
    assert (outcome.state, outcome.why) == ("done", None)
    assert outcome.links["host"]["variants"]["eager"]["as_single_launches"]
    figures = outcome.links["host+50us"]
    assert figures["variant"] == "eager"
    assert len(figures["variants"]["eager"]["token_ids"]) == SMALL.tokens
    assert figures["token_ms"] > 4 * 0.05  # four all-reduces a token
