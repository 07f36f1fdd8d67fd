"""Chrome traces."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ui_chain import TICK, Chain

from ppsd_cli.core.events import Entered, Flushed, Span, Verified
from ppsd_cli.errors import AssetError, ResourceError
from ppsd_cli.files import check_writable
from ppsd_cli.ui.trace import TraceWriter


@pytest.fixture
def writer() -> TraceWriter:
    trace = TraceWriter(stages=3)
    for event in Chain().events():
        trace.add(event)
    return trace


def named(events: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == phase]


def test_file_is_an_array_of_trace_events(writer: TraceWriter, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    writer.write(path)
    events = json.loads(path.read_text())
    assert {event["ph"] for event in events} == {"M", "X", "i"}
    assert all({"pid", "tid", "ts", "dur", "name"} <= set(event) for event in named(events, "X"))
    assert min(event["ts"] for event in named(events, "X")) == 0
    names = [e["args"]["name"] for e in named(events, "M") if e["name"] == "thread_name"]
    assert names == ["stage 0", "stage 1", "stage 2", "stage 0: wait and draft"]
    assert [path] == list(tmp_path.iterdir())


def test_slices_of_a_thread_do_not_overlap(writer: TraceWriter) -> None:
    for tid in range(4):
        slices = [each for each in writer.events() if each["ph"] == "X" and each["tid"] == tid]
        ends = [each["ts"] + each["dur"] for each in slices]
        assert len(slices) > 20
        assert all(end <= after["ts"] + 0.01 for end, after in zip(ends, slices[1:], strict=False))


def test_void_and_live(writer: TraceWriter) -> None:
    nodes = [each for each in named(writer.events(), "X") if "state" in each["args"]]
    assert len(nodes) == 3 * len({each["args"]["serial"] for each in nodes})
    assert len([each for each in nodes if each["args"]["state"] == "void"]) == 3 * 6
    assert nodes[0]["args"]["token"] is None
    assert nodes[0]["dur"] == TICK * 1e6


def test_flushes_are_instants(writer: TraceWriter) -> None:
    flushes = [each for each in named(writer.events(), "i") if each["name"] == "flush"]
    assert len(flushes) == 3
    assert all(len(each["args"]["void"]) == 2 and each["s"] == "p" for each in flushes)


def test_a_burst_is_one_slice_a_stage() -> None:
    trace = TraceWriter(stages=2)
    spans = (Span(0, 0.0, 0.4), Span(1, 0.5, 0.9))
    for serial in range(3):
        trace.add(Entered(0, serial, 9 + serial, 5, 1, drafted=serial > 0))
    trace.add(Verified(2, 0, 5, True, spans))
    trace.add(Verified(2, 1, 8, True, spans))
    trace.add(Flushed(2, 11, (2,)))
    trace.add(Verified(2, 2, 8, False, spans))
    slices = [each for each in trace.events() if each["ph"] == "X"]
    assert [(each["tid"], each["name"], each["dur"]) for each in slices] == [
        (0, "position 9", 400_000.0),
        (1, "position 9", 400_000.0),
    ]
    assert all(each["args"]["guesses"] == 2 for each in slices)


def test_empty_run(tmp_path: Path) -> None:
    TraceWriter(stages=2).write(tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_text())) == 7


def test_old_file_keeps_its_permissions(writer: TraceWriter, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    writer.write(link)
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert json.loads(path.read_text())


def test_failed_write_leaves_the_old_file(
    writer: TraceWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "trace.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left"):
        writer.write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_devices_are_written_in_place(writer: TraceWriter) -> None:
    check_writable(Path(os.devnull))
    writer.write(Path(os.devnull))
    assert not Path(os.devnull).is_file()


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssetError, match="folder .* does not exist"):
        check_writable(tmp_path / "missing" / "new.json")
    with pytest.raises(AssetError, match="it is a folder"):
        check_writable(tmp_path)
