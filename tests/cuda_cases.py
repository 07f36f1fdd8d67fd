"""Small models for the CUDA engine, runners of both kinds for them, and answers made comparable.

Triton's interpreter needs about a millisecond for each program of a launch, so models are as
small as they can be without every tile being even: hidden and intermediate 24, 48 tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Recorder, Run, Tiny, answer, prompt_of, save_head

from ppsd_cli.core.events import (
    Committed,
    Entered,
    Event,
    Finished,
    Flushed,
    Pruned,
    Ticked,
    Verified,
)
from ppsd_cli.core.plan import Plan, Runner, TickResult
from ppsd_cli.runtime.cuda.crew import Crew
from ppsd_cli.runtime.cuda.tiles import SPLIT
from ppsd_cli.runtime.pipeline import local_runner

VOCABULARY, CHUNK, WINDOW = 48, 8, 8
CONTEXT = SPLIT + 64
_SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("Llama", 4, {}),
    "biases": ("Llama", 3, {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", 3, {"sliding_window": WINDOW} | _GROUPED),
    "qwen2": (
        "Qwen2",
        3,
        {
            "hidden_size": 32,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", 3, {"tie_word_embeddings": True} | _GROUPED),
}
KINDS = tuple(_KINDS)


def save_small(folder: Path, kind: str) -> Tiny:
    """Make the model ``kind`` in ``folder``: the same weights every time."""
    import transformers

    name, layers, changes = _KINDS[kind]
    shape = _SHAPE | {"num_hidden_layers": layers} | changes
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**shape)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return Tiny(folder, model)


class Watched(Recorder):
    """Keeps results, and says so when an answer does not end."""

    def __init__(self, runner: Runner, most: int) -> None:
        """``most``: results that the answer may take."""
        super().__init__(runner)
        self._most = most

    def submit(self, plan: Plan) -> None:
        assert len(self.results) < self._most, "the answer does not end"
        super().submit(plan)


@dataclass(frozen=True)
class Small:
    """One model on one device in one number format, with runners and answers."""

    tiny: Tiny
    device: str
    dtype: str
    heads: Path

    @cached_property
    def layers(self) -> int:
        """Layers of the model."""
        return self.tiny.spec.layers

    def head(self, taps: Sequence[tuple[int, int]], **changes: Any) -> str:
        """A random head of ``models.save_head`` on these taps; ``ids`` reduces its vocabulary."""
        columns = changes.pop("ids", None)
        if columns is not None:
            changes["token_ids"] = torch.arange(0, VOCABULARY, columns)
        text = "-".join(str(part) for part in (*taps, *changes, *map(str, changes.values())))
        folder = self.heads / str(abs(hash((str(self.tiny.folder), text))))
        if not folder.exists():
            save_head(folder, self.tiny, taps, **changes)
        return str(folder)

    def graph(self, split: Sequence[int], **changes: Any) -> Runner:
        """The graph runner, drafting by raw exit unless told otherwise.

        ``groups``: stages of each device, where this device is to play several; with several GPUs
        they take turns.
        """
        from ppsd_cli.runtime.cuda.build import load_graph_runner

        config = self.tiny.config(split, slots=CONTEXT, chunk=CHUNK, dtype=self.dtype)
        groups = changes.pop("groups", None)
        devices = self._devices(groups or (len(split),))
        return load_graph_runner(replace(config, devices=devices, **changes), groups=groups)

    def _devices(self, groups: Sequence[int]) -> tuple[str, ...]:
        """The device of each stage."""
        count = torch.cuda.device_count() if self.device.startswith("cuda") else 0
        names = [f"cuda:{index % count}" if count else self.device for index in range(len(groups))]
        return tuple(name for name, size in zip(names, groups, strict=True) for _ in range(size))

    def local(self, split: Sequence[int], **changes: Any) -> Runner:
        """The in-process runner of torch, on the CPU and in float32: what is to be equalled."""
        config = self.tiny.config(split, slots=CONTEXT, chunk=CHUNK)
        return local_runner(replace(config, **changes))

    def plain(self, prompt: Sequence[int], count: int, **options: Any) -> Run:
        """Plain decoding of one stage, on the graph runner."""
        runner = self.graph((self.layers,), head=None)
        return ask(runner, prompt, count=count, drafting=False, **options)

    @property
    def same_numbers(self) -> bool:
        """Whether token ids can be expected to equal those of float32 on the CPU."""
        return self.dtype == "float32"


Models = Callable[[str], Small]


def ask(runner: Runner, prompt: Sequence[int], **options: Any) -> Run:
    """``models.answer`` with the settings of this file."""
    options = {"context": CONTEXT, "chunk": CHUNK} | options
    chunks = -(-len(prompt) // options["chunk"])
    watched = Watched(runner, chunks + runner.stages * (options["count"] + 1))
    run = answer(watched, prompt, **options)
    return Run(run.events, watched.results)


def prompt(length: int, seed: int = 1) -> tuple[int, ...]:
    """Random token ids of the small vocabulary."""
    return prompt_of(length, vocabulary=VOCABULARY, seed=seed)


def facts(events: Sequence[Event], *, tree: bool = False) -> list[tuple[object, ...]]:
    """Events without times, with ticks and serials counted from the answer's first node.

    Results of nodes of earlier answers are left out: runners may drop them. ``tree``: with parents,
    and without what the full model says of void nodes.
    """
    first = next(event for event in events if isinstance(event, Entered))
    told: list[tuple[object, ...]] = []
    for event in events:
        tick = event.tick - first.tick
        match event:
            case Entered(_, serial, position, token, tokens, drafted, parent):
                node, above = serial - first.serial, None
                if tree and parent is not None:
                    above = parent - first.serial
                told.append(("entered", tick, node, position, token, tokens, drafted, above))
            case Verified(_, serial, token, live) if serial >= first.serial:
                said = token if live or not tree else None  # a void node sees what it likes
                told.append(("verified", tick, serial - first.serial, said, live))
            case Committed(_, position, token, outcome, draft):
                told.append(("committed", tick, position, token, outcome, draft))
            case Flushed(_, position, void) | Pruned(_, position, void):
                kind = type(event).__name__
                told.append((kind, tick, position, [s - first.serial for s in void]))
            case Finished(_, reason):
                told.append(("finished", tick, reason))
            case Ticked():
                told.append(("ticked", tick))
    return told


def assert_same_events(run: Run, expected: Run, *, tree: bool = False) -> None:
    """The same things happened in the same ticks, with nearly the same logits."""
    ours, theirs = facts(run.events, tree=tree), facts(expected.events, tree=tree)
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        assert mine == other, f"event {index} differs"
    assert len(ours) == len(theirs)
    torch.testing.assert_close(run.logits, expected.logits, rtol=1e-3, atol=1e-3)
    for mine, other in zip(drafts(run.results), drafts(expected.results), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def drafts(results: Sequence[TickResult]) -> list[torch.Tensor]:
    """Logits of every guess, void ones too."""
    return [logits for result in results for logits in result.draft_logits]


def assert_exact(run: Run, reference: Run) -> None:
    """The same text, from bit-equal logits."""
    count = len(reference.ids)
    assert run.ids == reference.ids
    assert torch.equal(run.logits, reference.logits[:count]), "logits are not bit-equal"
    assert run.reason is reference.reason


def replay_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crews launch their devices in the other order from now on."""
    replay = Crew.replay

    def backwards(self: Any, key: Any) -> None:
        members, graphs = self.members, self._graphs[key]
        self.members, self._graphs[key] = members[::-1], graphs[::-1]
        try:
            replay(self, key)
        finally:
            self.members, self._graphs[key] = members, graphs

    monkeypatch.setattr(Crew, "replay", backwards)
