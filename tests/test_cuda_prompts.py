"""The draft head's part of a prompt as the CUDA engine runs it, against the head's own way.

In float32, on the CPU without graphs: what would be captured is what runs. With a GPU by graphs.
"""

import inspect
import types
from dataclasses import replace

import pytest
import torch
from test_one_pass import SPEC, head, random

pytest.importorskip("triton")

from ppsd_cli.model.heads import DraftHead, MlpWeights
from ppsd_cli.model.layers import Shape
from ppsd_cli.runtime.cuda import prompt_head, prompts
from ppsd_cli.runtime.cuda.prompts import bucket_of
from ppsd_cli.runtime.cuda.recorder import Immediate, Recorder

SLOTS, STEPS = 1025, 4
HEADS = [
    ("block", (3,), 1),
    ("block", (3,), 3),
    ("deep", (3, 6), 1),
    ("deep", (3, 6), 2),
    ("deep", (2, 4, 6), 1),
    ("deep", (2, 4, 6), 3),
    ("deep", (1, 1, 5), 2),
    ("deep", (1, 2, 4, 5, 6), 2),
]
LENGTHS = {8: (1, 2, 7, 9, 3, 16, 8, 17), 64: (63, 65, 1, 128, 130), 128: (511, 5, 512, 513, 640)}
"""Prompts by chunk size: one answer after the other, around the bounds of chunks and buckets."""

_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda:0", marks=_GPU)]


class Side:
    """A head behind a prompt of random states: as ``prompt_head`` does it, or the head."""

    def __init__(self, kind, depths, blocks, *, chunk, extras, module=None):
        device = torch.get_default_device()
        graphs = module is not None and device.type != "cpu"
        self.recorder = Recorder(device, branches=1) if graphs else Immediate()
        torch.manual_seed(blocks * 10 + len(depths))
        self.spec = replace(SPEC, qkv_bias=extras, qk_norm=extras, context=SLOTS)
        self.chunk = chunk
        weights = head(self.spec, kind, depths, blocks)
        more = [MlpWeights(random(32), random(32, 96), random(48, 32)) for _ in range(extras)]
        weights = replace(weights, mlps=tuple(more))
        self.head = DraftHead(self.spec, weights, slots=SLOTS, ring=2 * chunk + 3)
        self.lane = None
        if module is not None:
            rows = module.ChunkRows(chunk, trash=SLOTS - 1, device=device)
            # The exit's states are those of the first device's lane, the others are handed over.
            near = {depths[0]: torch.full((chunk, self.spec.hidden), 1e3)}
            shape = Shape.of(self.spec)
            self.rows, self.near = rows, near
            self.lane = module.PromptHead(self.head, shape, rows, self.recorder, taps=near)

    def prompt(self, states, length):
        """Chunks of a prompt."""
        for start in range(0, length, self.chunk):
            count = min(self.chunk, length - start)
            part = {depth: rows[start : start + count] for depth, rows in states.items()}
            if self.lane is None:
                for depth, rows in part.items():
                    self.head.observe(depth, start, rows)
                self.head.prefill(start, count)
                continue
            self.lane.prepare(bucket_of(start + count))
            self.rows.tell((7,) * count, start)
            for depth, rows in part.items():
                if depth in self.near:
                    self.near[depth][:count] = rows
                else:
                    self.lane.take(depth, rows)
            self.lane.run(start + count)

    def drafts(self, states, length):
        """Draft logits of the positions behind the prompt, each with the taps that there are."""
        found = []
        for position in range(length, length + STEPS):
            for tap in self.head.taps:
                at = position - tap.lag
                if at >= 0:
                    self.head.observe(tap.depth, at, states[tap.depth][at : at + 1])
            found.append(self.head.draft_logits(position))
        return torch.cat(found)

    def spoil(self):
        """What an earlier answer has left is anything."""
        for tensor in self.buffers():
            tensor.copy_(30 * torch.randn(tensor.shape))

    def buffers(self):
        """All that lasts from chunk to chunk."""
        pairs = [(cache.keys, cache.values) for cache in self.head.caches]
        return [self.head.rings, *(tensor for pair in pairs for tensor in pair)]


def compare(kind, depths, blocks, *, chunk, extras=False, module=prompt_head):
    """Answers one after the other on the same buffers, as on fresh ones of the head's own way."""
    options = {"chunk": chunk, "extras": extras}
    ours = Side(kind, depths, blocks, module=module, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with ours.recorder.stream():
        ours.spoil()
        for length in LENGTHS[chunk]:
            torch.manual_seed(length)
            states = {d: torch.randn(length + STEPS, 32) for d in sorted(set(depths))}
            fresh = Side(kind, depths, blocks, **options)
            before = [tensor.clone() for tensor in ours.buffers()]
            for side in (ours, fresh):
                side.prompt(states, length)
            ring = ours.head.rings.shape[1] - 1
            known = [p % ring for p in range(max(0, length - ring), length)]
            first = range(max(0, length - len(depths) + 1))
            places = [known, first, first, *[range(length)] * (2 * blocks - 2)]
            buffers = zip(ours.buffers(), fresh.buffers(), before, places, strict=True)
            for mine, other, old, written in buffers:
                assert_written(mine, other, old, torch.tensor(list(written), dtype=torch.int64))
            assert_close(ours.drafts(states, length), fresh.drafts(states, length))


def assert_written(mine, other, old, places):
    """Both have the same in these places; in all others but the last one nothing has changed."""
    assert_close(mine[:, places], other[:, places])
    rest = torch.ones(mine.shape[1] - 1, dtype=torch.bool)
    rest[places] = False
    assert torch.equal(mine[:, :-1][:, rest], old[:, :-1][:, rest])


def assert_close(mine, other):
    loose = 1 if mine.device.type == "cpu" else 20
    torch.testing.assert_close(mine, other, atol=2e-5 * loose, rtol=2e-4 * loose)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", LENGTHS)
@pytest.mark.parametrize(("kind", "depths", "blocks"), HEADS)
def test_what_ticks_read_is_the_head_s_own(kind, depths, blocks, chunk, device):
    with torch.device(device), torch.inference_mode():
        compare(kind, depths, blocks, chunk=chunk)


@pytest.mark.parametrize(("kind", "depths", "blocks"), [HEADS[1], HEADS[5]])
def test_every_tensor_that_a_head_may_have(kind, depths, blocks):
    compare(kind, depths, blocks, chunk=8, extras=True)


FAULTS = {
    "near keys are seen twice": (prompt_head, "nearest=lags", "nearest=lags - 1"),
    "a lag is seen by nobody": (prompt_head, "nearest=lags", "nearest=lags + 1"),
    "near keys before the start": (prompt_head, "(position >= lag)", "(position >= 0)"),
    "states before the start": (
        prompt_head,
        "where((at >= 0)[:, None], states, 0)",
        "clone(states)",
    ),
    "near keys of other rows": (prompt_head, "row[:, None] == row[None, :]", "row[:, None] >= row"),
    "rings one place off": (prompt_head, "position % self._ring,", "(position + 1) % self._ring,"),
    "states one lag off": (prompt_head, "at = position - lag", "at = position - lag + 1"),
    "keys turned as if near": (prompt_head, "(position - lag).clamp(min=0)", "position"),
    "the last tap one slot off": (prompt_head, "trash = position - self._lags", "trash = position"),
    "keys from before the start": (prompt_head, "where(at >= 0, at, trash)", "clamp(at, min=0)"),
    "no block but the last": (prompt_head, "ends = index == last", "ends = True"),
    "one graph for all lengths": (prompt_head, "return bucket if", "return 0 if"),
    "padding is written": (prompts, "where(self._rows < self._count", "where(self._rows >= 0"),
    "stale rows are seen": (prompts, "found = behind >= nearest", "found = behind >= -1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch, name):
    module, old, new = FAULTS[name]
    changed = changed_module(module, old, new)
    if module is prompts:
        for part in ("ChunkRows", "seen"):
            monkeypatch.setattr(prompt_head, part, getattr(changed, part))
        changed = prompt_head
    with pytest.raises(AssertionError):
        compare("deep", (2, 4, 6), 3, chunk=128 if "lengths" in name else 8, module=changed)


def changed_module(module, old, new):
    """The module from a source with another text in it."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module.__name__} has changed: adapt the fault {old!r}"
    changed = types.ModuleType("changed")
    exec(compile(source.replace(old, new), "changed.py", "exec"), vars(changed))
    return changed
