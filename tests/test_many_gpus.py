"""The benchmark over several GPUs, on this machine's CPU: its plan, its processes, its figures."""

import json
import textwrap
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import many_gpus
import many_gpus_jobs
import pytest
from many_gpus_jobs import Outcome, run_part
from many_gpus_plan import (
    Crossing,
    Part,
    Setup,
    chosen,
    counts_for,
    crossing,
    missing,
    parts_of,
    summary,
)
from many_gpus_plot import Axis, plot

SMALL = Setup(("tiny",), (2,), 0, layers=2, tokens=5, answers=1, prompt=3, acceptance=(0.5, 1.0))

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
