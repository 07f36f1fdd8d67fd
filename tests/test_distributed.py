"""Stage processes answer exactly as the in-process runner does, and listen on loopback only."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_models import (
    HIDDEN,
    Recorder,
    answer,
    save_deep_head,
    save_llama,
    settings,
    timeless,
)

from ppsd_cli.core.events import Committed, Entered, Outcome, Span, Ticked, Verified
from ppsd_cli.core.plan import (
    Bubble,
    Burst,
    Node,
    Prompt,
    Request,
    Sampling,
    Step,
    TickResult,
)
from ppsd_cli.errors import ResourceError
from ppsd_cli.runtime.frames import Frame, Return
from ppsd_cli.runtime.messages import pack_plan, pack_result, unpack_plan, unpack_result
from ppsd_cli.runtime.pipeline import local_runner
from ppsd_cli.runtime.processes import spawn_runner
from ppsd_cli.runtime.wire import FrameCodec, ReturnCodec, RowFormat

REQUEST = Request(
    Sampling(0.7, 5, 0.9, 0.01, 3), True, 40, (1, 2, 3), 9, True, 0, 4, 1.5, (0, 2, 1), (-0.5, -1.0)
)
LISTENING = "0A"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def record(runner, **wishes):
    """Two answers in a row: their events without times, and the logits of their ticks."""
    answers = []
    try:
        for _ in range(2):
            recorder = Recorder(runner)
            answers.append(comparable(answer(recorder, **wishes), recorder.results))
    finally:
        runner.close()
    return answers


def comparable(events, results):
    """Ticks and serials counted from the answer's first, without leftovers of an earlier one.

    A runner that looks ahead runs a few more ticks after an answer than one in step.
    """
    tick = next(e.tick for e in events if isinstance(e, Ticked))
    serial = next(e.serial for e in events if isinstance(e, Entered))
    kept = [e for e in events if not isinstance(e, Verified) or e.serial >= serial]
    logits = [
        (*(t.logits for t in r.targets if t.serial >= serial), *r.draft_logits) for r in results
    ]
    ticks = sum(isinstance(e, Ticked) for e in events)
    return [timeless(e, tick=tick, serial=serial) for e in kept], logits[:ticks]


def assert_equal(ours, theirs) -> None:
    """The same events, and bit-equal logits at every tick."""
    for (events, logits), (other_events, other_logits) in zip(ours, theirs, strict=True):
        assert events == other_events
        assert sum(a is not None for tick in logits for a in tick) > 5
        for tick, other_tick in zip(logits, other_logits, strict=True):
            for a, b in zip(tick, other_tick, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def alternating(model: Path, split) -> tuple[int, ...]:
    """Guesses that are right at every second position."""
    runner = local_runner(settings(model, split))
    right = [e.token_id for e in answer(runner, tokens=20) if isinstance(e, Committed)]
    return tuple(t if i % 2 else (t + 1) % 128 for i, t in enumerate(right))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_processes_equal_one(model: Path, dtype):
    config = settings(model, (2, 2), dtype=dtype)
    ours = record(local_runner(config), temperature=0.8)
    assert_equal(ours, record(spawn_runner(config), temperature=0.8))


def test_three_processes_with_alternating_drafts(model: Path):
    config = settings(model, (1, 2, 1))
    forced = alternating(model, (1, 2, 1))
    ours = record(local_runner(config), forced=forced, tokens=20)
    outcomes = {e[-1]["outcome"] for e in ours[0][0] if e[0] == "Committed"}
    assert outcomes == set(Outcome)
    assert_equal(ours, record(spawn_runner(config), forced=forced, tokens=20))


def test_taps_of_a_deep_head_across_processes(model: Path, tmp_path: Path):
    head = save_deep_head(model, tmp_path / "head", (1, 3, 4))
    config = settings(model, (1, 2, 1), head=str(head))
    ours = record(local_runner(config), temperature=1.0)
    assert_equal(ours, record(spawn_runner(config), temperature=1.0))


@pytest.mark.parametrize(("split", "draft_length"), [((2, 2), 1), ((2, 2), 5), ((1, 2, 1), 3)])
def test_bursts_across_processes(model: Path, split, draft_length):
    config = settings(model, split)
    forced = alternating(model, split)
    wishes = {"forced": forced, "tokens": 20, "draft_length": draft_length}
    ours = record(local_runner(config), **wishes)
    entered = [e[-1]["tick"] for e in ours[0][0] if e[0] == "Entered"]
    assert max(entered.count(tick) for tick in entered) == 1 + draft_length
    outcomes = {e[-1]["outcome"] for e in ours[0][0] if e[0] == "Committed"}
    alone = draft_length == 1  # every second guess is never made
    assert outcomes == {*Outcome} - ({Outcome.CORRECTED} if alone else set())
    assert_equal(ours, record(spawn_runner(config), **wishes))


@pytest.mark.parametrize("split", [(1, 3), (1, 2, 1)])
def test_bursts_of_a_deep_head_across_processes(model: Path, tmp_path: Path, split):
    head = save_deep_head(model, tmp_path / "head", (1, 3, 4))
    config = settings(model, split, head=str(head))
    wishes = {"temperature": 1.0, "draft_length": 4}
    assert_equal(record(local_runner(config), **wishes), record(spawn_runner(config), **wishes))


@pytest.mark.parametrize("split", [(2, 2), (1, 2, 1)])
def test_trees_across_processes(model: Path, tmp_path: Path, split):
    """Levels of fewer nodes than the engine was made for, too, with the states of a deep head."""
    head = save_deep_head(model, tmp_path / "head", (1, 3, 4)) if len(split) == 3 else "raw"
    config = settings(model, split, head=str(head), width=5)
    plain = answer(local_runner(config), tokens=20, temperature=1.0)
    right = tuple(e.token_id for e in plain if isinstance(e, Committed))
    wishes = {"temperature": 1.0, "tokens": 20, "width": 4, "forced": right}
    wishes["forced_ranks"] = (0, 1, 0, 4, 2) * 4
    ours = record(local_runner(config), **wishes)
    kinds = {e[0] for e in ours[0][0]}
    assert {"Pruned", "Flushed"} <= kinds
    assert_equal(ours, record(spawn_runner(config), **wishes))


def test_only_loopback_is_listened_on(model: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ready: list[int] = []
    runner = spawn_runner(settings(model, (2, 2)), port=port, on_ready=ready.append)
    try:
        assert sorted(ready) == [0, 1]
        found = listeners([*runner.pids, os.getpid()])
        assert f"0100007F:{port:04X}" in found
        assert {address.split(":")[0] for address in found} == {"0100007F"}
    finally:
        runner.close()


def test_a_taken_port_is_an_error(model: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} is taken"):
            spawn_runner(settings(model, (2, 2)), port=port)


def test_a_stage_process_imports_little():
    code = (
        "import sys, ppsd_cli.runtime.stage_main\n"
        "assert 'torch' not in sys.modules\n"
        "import ppsd_cli.runtime.links, ppsd_cli.runtime.messages, ppsd_cli.runtime.group\n"
        "assert 'torch' in sys.modules\n"
        "print([m for m in ('transformers', 'rich', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("plan", [Step(), Burst(4), Bubble(), Prompt((4, 5), 8, True, REQUEST)])
def test_plans_travel_whole(plan):
    assert unpack_plan(pack_plan(plan)) == plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("wanted", [0, 1, 5])
@pytest.mark.parametrize("request_", [None, REQUEST])
def test_frames_travel_whole(dtype, count, wanted, request_):
    codec = FrameCodec(RowFormat(HIDDEN, dtype, 3))
    hidden = torch.randn(count, HIDDEN).to(dtype)
    frame = Frame(7, 40, wanted, hidden, (Span(0, 1.5, 2.25),), request_)
    back = through(codec, frame)
    assert torch.equal(back.hidden, hidden)
    assert (back.serial, back.position, back.wanted) == (7, 40, wanted)
    assert (back.spans, back.request) == (frame.spans, request_)
    assert through(codec, None) is None


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("depths", [(), (2,), (2, 3)])
@pytest.mark.parametrize("target", [(), (17,), (3, 1, 4)])
def test_returns_travel_whole(count, depths, target):
    codec = ReturnCodec(RowFormat(HIDDEN, torch.bfloat16, 2), 1, frozenset(depths))
    taps = {d: torch.randn(count, HIDDEN).bfloat16() for d in depths}
    logits = torch.randn(len(target), 128) if target else None
    spans = (Span(0, 1.0, 2.0), Span(1, 3.0, 4.0))
    back = through(codec, Return(1, 3, 9, taps, target, spans, logits))
    assert back.taps.keys() == taps.keys()
    assert all(torch.equal(back.taps[d], taps[d]) for d in depths)
    assert (back.stage, back.serial, back.position, back.token_ids) == (1, 3, 9, target)
    assert back.spans == spans
    assert (back.logits is None) == (logits is None)
    assert logits is None or torch.equal(back.logits, logits)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_levels_of_a_tree_travel_in_one_message(count):
    rows = RowFormat(HIDDEN, torch.float32, 2, most=4)
    hidden, tree = torch.randn(count, HIDDEN), tuple((9 - i, i) for i in range(min(count, 4)))
    frame = Frame(7, 40, count, hidden, (Span(0, 1.5, 2.25),), None, tree)
    codec = FrameCodec(rows)
    assert len(codec.pack(frame)) == (1 if count <= 4 else 2)
    back = through(codec, frame)
    assert torch.equal(back.hidden, hidden)
    assert (back.tree, back.wanted, back.spans) == (tree, count, frame.spans)
    taps = {d: torch.randn(count, HIDDEN) for d in (2, 3)}
    codec = ReturnCodec(rows, 1, frozenset(taps))
    sent = Return(1, 3, 9, taps, tuple(range(count)), ())
    assert len(codec.pack(sent)) == (1 if count <= 4 else 3)
    received = through(codec, sent)
    assert received.token_ids == sent.token_ids
    assert all(torch.equal(received.taps[d], taps[d]) for d in taps)


def test_results_of_a_tree_travel_whole():
    node = Node(5, 9, 3, 1, True, True, parent=2, slot=11, score=-1.25)
    result = TickResult(Ticked(1, 0.0, 1.0, 2.0, 3.0), (), (node, replace(node, parent=None)))
    assert unpack_result(b"".join(pack_result(result))) == result


def through(codec, item):
    """Pack and unpack, with the sizes that the codec announces."""
    small, *following = codec.pack(item)
    assert small.numel() == codec.small_bytes
    assert codec.following(small) == [m.numel() for m in following]
    return codec.unpack(small, following)


def listeners(pids: list[int]) -> set[str]:
    """Local addresses (hexadecimal, as the kernel prints them) on which processes listen."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(fd) if fd.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and (fields[3] == LISTENING or table.startswith("udp")):
                found.add(fields[1])
    return found
