"""The benchmark over several GPUs, on this machine's CPU: its plan, its processes, its figures."""

import json
import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import many_gpus
import many_gpus_jobs
import many_gpus_links
import many_gpus_ppsd
import pytest
import torch
import triton_cpu
from many_gpus_jobs import Job, Outcome, run_part
from many_gpus_layers import check_shape
from many_gpus_plan import (
    LINKS,
    Crossing,
    Part,
    Setup,
    chosen,
    counts_for,
    crossing,
    missing,
    parts_of,
    spec_for,
    summary,
)
from many_gpus_plot import Axis, plot

from ppsd_cli.calibration_records import DeviceMemory
from ppsd_cli.errors import ConfigError, ResourceError
from ppsd_cli.model.cache import Rows
from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.runtime import memory_plan

ROOT = Path(__file__).parents[1]
SMALL = Setup(("tiny",), (2,), 0, layers=2, tokens=5, answers=1, prompt=3, acceptance=(0.5, 1.0))

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


# --- what is measured


def test_parts_of_a_host_with_eight():
    setup = Setup(("llama-70b",), counts_for(8), 8)
    names = [part.name.removeprefix("llama-70b/") for part in parts_of(setup)]
    assert names[:2] == ["ppsd/8", "tp/8"]
    assert set(names) == {"one/1"} | {
        f"{kind}/{n}" for kind, counts in (("ppsd", "23468"), ("tp", "248")) for n in counts
    }
    assert not any(part.played for part in parts_of(setup))
    assert [p.name for p in chosen(parts_of(setup), ["*/tp/[48]"])] == [
        "llama-70b/tp/8",
        "llama-70b/tp/4",
    ]


@pytest.mark.parametrize(("devices", "ranks"), [(0, 2), (1, 1)])
def test_one_device_plays_several(devices, ranks):
    """Tensor parallelism cannot: NCCL takes one rank a GPU."""
    parts = {part.kind: part for part in parts_of(Setup(("tiny",), counts_for(devices), devices))}
    assert parts["ppsd"].played
    assert parts["ppsd"].count == 2
    assert parts["tp"].count == ranks


def test_counts_of_odd_hosts():
    assert counts_for(5) == (2, 4, 5)
    assert counts_for(8) == (2, 4, 8)


def test_what_is_missing():
    part = Part("tp", "tiny", 2, ("peer", "host"))
    assert missing(part, None) == ("peer", "host")
    assert missing(part, {"state": "timed out", "links": {"peer": {}}}) == ("host",)
    assert missing(part, {"state": "refused", "links": {}}) == ()


# --- figures


@pytest.mark.parametrize(
    ("rival", "expected"),
    [
        (25.0, Crossing("at", 0.7, 0.6, 1.0)),
        (30.0, Crossing("always", None, 0.6, 1.0)),
        (20.0, Crossing("at", 0.8, 0.6, 1.0)),
        (12.5, Crossing("at", 0.95, 0.6, 1.0)),
        (9.0, Crossing("never", None, 0.6, 1.0)),
        (99.0, Crossing("always", None, 0.6, 1.0)),
    ],
)
def test_crossing(rival, expected):
    found = crossing([(1.0, 10.0), (0.6, 30.0), (0.8, 20.0)], rival)
    assert replace(found, acceptance=None) == replace(expected, acceptance=None)
    assert found.acceptance == pytest.approx(expected.acceptance)


def test_crossing_of_noisy_points_is_the_last_one():
    """Where a slower point lies behind a faster one, PPSD has not passed before it."""
    points = [(0.5, 40.0), (0.6, 15.0), (0.7, 30.0), (0.9, 10.0)]
    assert crossing(points, 20.0).acceptance == pytest.approx(0.8)
    assert crossing([], 20.0) is None


def row(acceptance: float, ms: float) -> dict:
    return {"acceptance": acceptance, "realised": acceptance, "token_ms": ms}


def pipeline(naive: float, chain: list, fixed: float | None = 0.1) -> dict:
    tree = "not available: no trees"
    return {"naive": {"token_ms": naive}, "chain": chain, "tree": tree, "fixed_ms": fixed}


def report_with(*parts: tuple[str, int, dict]) -> dict:
    found = {}
    for kind, count, links in parts:
        part = Part(kind, "tiny", count, tuple(links))
        found[part.name] = {
            "kind": kind,
            "shape": "tiny",
            "count": count,
            "played": False,
            "state": "done",
            "why": None,
            "links": links,
        }
    return {"setup": SMALL.to_json(), "parts": found}


def test_summary():
    chain = [row(0.6, 22.0), row(0.8, 16.0), row(1.0, 10.0)]
    slow = [row(0.6, 26.0), row(1.0, 14.0)]
    report = report_with(
        ("ppsd", 4, {"peer": pipeline(32.0, chain), "host": pipeline(36.0, slow)}),
        ("ppsd", 3, {"peer": pipeline(32.0, chain, 0.05)}),
        ("tp", 2, {"peer": {"token_ms": 20.0}, "host": {"token_ms": 20.0}}),
        ("tp", 4, {"peer": {"token_ms": 12.0}}),
        ("one", 1, {"peer": pipeline(30.0, [])}),
    )
    found = summary(report)["tiny"]
    assert found["fixed_ms"] == {"3": 0.05, "4": 0.1}
    four = found["pipelines"]["4"]
    middle = four["peer"]["chain"][1]
    assert middle["over_naive_split"] == pytest.approx(2.0)
    assert middle["over_one_gpu"] == pytest.approx(1.875)
    assert middle["over_tensor_parallel"] == pytest.approx(0.75)
    assert middle["share_of_ideal"] == pytest.approx(2.0 / (4 / 1.6))
    assert four["peer"]["chain_passes_tensor_parallel"]["acceptance"] == pytest.approx(14 / 15)
    assert four["peer"]["tree"] == "not available: no trees"
    assert four["host"]["tensor_parallel_ms"] is None  # it was measured on another link only
    assert four["host"]["chain"][0]["over_tensor_parallel"] is None
    picture = plot(report | {"summary": summary(report)})
    ET.fromstring(picture)
    assert "4, chain" in picture
    assert "nan" not in picture


def test_a_plot_of_nothing():
    ET.fromstring(plot({"parts": {}, "summary": {}}))


@pytest.mark.parametrize(
    ("values", "doubling", "marks"),
    [
        ([3.0, 37.0], False, (0, 10, 20, 30, 40)),
        ([0.04, 0.113], False, (0, 0.025, 0.05, 0.075, 0.1, 0.125)),
        ([-0.2], False, (0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6)),
        ([0.4, 3.0], True, (0.25, 0.5, 1, 2, 4)),
        ([1.0], True, (1, 2)),
    ],
)
def test_axes(values, doubling, marks):
    axis = Axis.of(values, doubling=doubling)
    assert axis.marks == pytest.approx(marks)
    assert all(0 <= axis.height(each) <= 1 for each in values)
    assert axis.height(axis.marks[-1]) == 1


# --- the whole script, with parts that end as they like


def test_a_run_goes_on_where_the_file_ends(tmp_path, monkeypatch, capsys):
    asked: list[tuple[str, tuple[str, ...]]] = []
    broken = {"tiny/ppsd/2"}

    def part(part, setup, links, *, seconds):
        assert setup.shapes == ("tiny",)
        assert seconds <= 7
        asked.append((part.name, tuple(links)))
        if part.kind == "one":
            return Outcome("refused", "too large", 0.1, {}, {})
        done = links[:1] if part.name in broken else links
        figures = {"token_ms": 12.0} if part.kind == "tp" else pipeline(32.0, [row(1.0, 10.0)])
        state = "timed out" if part.name in broken else "done"
        facts = {"environment": {"machine": "m"}, "peer_copies": True}
        return Outcome(state, None, 0.1, dict.fromkeys(done, figures), facts)

    monkeypatch.setattr(many_gpus, "run_part", part)
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    flags = ["-o", str(out), "--shapes", "tiny", "--cpu", "--links", "peer", "host"]
    flags += ["--part-seconds", "7"]
    assert many_gpus.main(flags) == many_gpus.ENDED_OTHERWISE
    assert [name for name, _ in asked] == ["tiny/ppsd/2", "tiny/tp/2", "tiny/one/1"]
    asked.clear()
    broken.clear()
    assert many_gpus.main([*flags, "--plot", str(picture)]) == 0
    assert asked == [("tiny/ppsd/2", ("host",))]
    report = json.loads(out.read_text())
    assert report["environment"] == {"machine": "m"}
    assert set(report["parts"]["tiny/ppsd/2"]["links"]) == {"peer", "host"}
    assert report["parts"]["tiny/one/1"]["why"] == "too large"
    ET.fromstring(picture.read_text())
    assert "refused: too large" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        many_gpus.main([*flags, "--layers", "1"])
    asked.clear()
    assert many_gpus.main([*flags, "--again", "--seconds", "0"]) == many_gpus.ENDED_OTHERWISE
    assert asked == []


@pytest.mark.parametrize("ends", ["hangs", "fails"])
def test_what_was_measured_before_a_part_ended_is_kept(tmp_path, monkeypatch, ends):
    """A worker that hangs is ended in time, with all that it started."""
    script = f"""
        import json, os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        out = json.load(open(sys.argv[1]))["out"]
        with open({str(tmp_path / "pid")!r}, "w") as file:
            file.write(str(child.pid))
        with open(out, "a") as file:
            file.write(json.dumps({{"link": "peer", "figures": {{"token_ms": 1.0}}}}) + "\\n{{")
        time.sleep(60) if {ends == "hangs"} else sys.exit(1)
    """
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent(script))
    monkeypatch.setitem(many_gpus_jobs.WORKERS, "one", str(worker))
    part = Part("one", "tiny", 1, ("peer", "host"))
    begin = monotonic()
    outcome = run_part(part, SMALL, part.links, seconds=1.5)
    assert monotonic() - begin < 5
    assert outcome.state == ("timed out" if ends == "hangs" else "failed")
    assert outcome.links == {"peer": {"token_ms": 1.0}}
    assert has_ended(int((tmp_path / "pid").read_text()))


def has_ended(process: int) -> bool:
    """Whether it is gone or waits for somebody to ask how it ended."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        sleep(0.02)
    return False


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
    assert "trees run on one device" in found["tree"]
    (chain,) = found["chain"]
    assert 0 < chain["realised"] < 1
    assert chain["equal_answers"] == [1, 1]
    assert len(found["own_ms"]) == 2
    assert found["fixed_ms"] == found["timed_tick_ms"] - max(found["own_ms"])
    assert set(waits) == {50e-6}
    ticks = sum(round((SMALL.tokens - 1) / r["tokens_per_tick"]) for r in (found["naive"], chain))
    assert len(waits) >= 2 * ticks


@pytest.mark.skipif(triton_cpu.missing() is not None, reason=str(triton_cpu.missing()))
@pytest.mark.usefixtures("small")
def test_trees_where_the_engine_has_them(tmp_path, monkeypatch):
    """Here all stages are on one device, in step."""
    monkeypatch.setattr(many_gpus_ppsd, "_no_trees", lambda *_: None)
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


def test_the_text_is_one_that_rounding_cannot_change(tmp_path):
    """Behind token t comes t + 1, by far."""
    plan = many_gpus_ppsd.layout(job_of(tmp_path, "peer"))
    stages, head = many_gpus_ppsd.load(plan)
    assert [tap.depth for tap in head.taps] == [1, 2]
    vocabulary = plan.spec.vocabulary
    ids = torch.tensor([7, 300, vocabulary - 1])
    hidden = stages[0].embed(ids)
    for stage in stages:
        hidden, _ = stage.forward(hidden, Rows.chain(0, len(ids)))
    best = stages[-1].output.logits(hidden).topk(2)
    assert best.indices[:, 0].tolist() == [8, 301, 0]
    assert (best.values[:, 0] - best.values[:, 1]).min() > 0.5


def test_memory_is_planned_before_weights_load(tmp_path, monkeypatch):
    setup = replace(SMALL, shapes=("llama-70b",), layers=None, devices=4, counts=(4,))
    part = Part("ppsd", "llama-70b", 4, ("peer",))
    plan = many_gpus_ppsd.layout(Job(setup, part, (), tmp_path / "out"))
    assert plan.config.devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert sum(plan.config.split) == 80
    assert plan.config.split[0] < plan.config.split[1]  # the head takes its part of a tick
    free = 30 << 30
    monkeypatch.setattr(memory_plan, "available_memory", lambda _: free)
    with pytest.raises(ResourceError, match=r"80 layers over 4 stages: cuda:0 needs 40\.\d GiB"):
        many_gpus_ppsd.check(plan)
    free = 60 << 30
    monkeypatch.setattr(memory_plan, "available_memory", lambda _: free)
    assert DeviceMemory(**many_gpus_ppsd.check(plan)[0]).available == free


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
