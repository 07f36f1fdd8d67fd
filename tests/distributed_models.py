"""Tiny models, heads and answers for the tests of stage processes."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ppsd_cli.core.decode import decode
from ppsd_cli.core.events import Event, Flushed, Pruned, Ticked, Verified
from ppsd_cli.core.plan import Plan, Request, Runner, Sampling, TickResult
from ppsd_cli.core.schedule import Limits, Schedule
from ppsd_cli.model.head_files import HeadInfo, write_head
from ppsd_cli.model.heads import DeepWeights, HeadWeights, Tap
from ppsd_cli.model.load import Loader
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.stage import Output
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.runtime.pipeline import PipelineConfig

LAYERS, HIDDEN, VOCABULARY, SLOTS, CHUNK = 4, 32, 128, 64, 8
HASH = "sha256:" + "0" * 64
PROMPT = tuple(range(3, 24))


def save_llama(folder: Path) -> Path:
    """A random four-layer llama."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=SLOTS,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_deep_head(model: Path, folder: Path, depths: tuple[int, ...]) -> Path:
    """A random ``deep`` head that reads ``depths`` at the lags 0, 1, 2, ..."""
    torch.manual_seed(1)
    loader = Loader(Checkpoint(model), read_spec(model), torch.float32, torch.device("cpu"))
    lags, width = len(depths) - 1, 2 * 2 * (HIDDEN // 4)
    deep = DeepWeights(
        norms=torch.rand(lags, HIDDEN),
        kv=torch.randn(lags, HIDDEN, width) / 4,
        fuse=torch.randn(lags, HIDDEN, HIDDEN) / 4,
    )
    taps = tuple(Tap(depth, lag) for lag, depth in enumerate(depths))
    output = Output(torch.rand(HIDDEN), loader.lm_matrix(), 1e-6)
    weights = HeadWeights(taps, output, blocks=(loader.layer(LAYERS - 1),), deep=deep)
    info = HeadInfo(
        kind="deep",
        model_hash=HASH,
        model_name="tiny",
        hidden=HIDDEN,
        taps=taps,
        blocks=1,
        draft_vocabulary=None,
        stages=len(depths),
        training={},
    )
    write_head(folder, info, weights)
    return folder


def settings(model: Path, split: tuple[int, ...], **changes) -> PipelineConfig:
    """A pipeline on the CPU with the raw exit as its head."""
    config = PipelineConfig(
        folder=str(model),
        model_hash=HASH,
        split=split,
        devices=("cpu",) * len(split),
        dtype="float32",
        slots=SLOTS,
        chunk=CHUNK,
        head="raw",
    )
    return replace(config, **changes)


class Recorder:
    """A runner in front of another one that keeps its results."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.results: list[TickResult] = []

    @property
    def stages(self) -> int:
        return self._runner.stages

    @property
    def lookahead(self) -> int:
        return self._runner.lookahead

    @property
    def pending(self) -> int:
        return self._runner.pending

    def submit(self, plan: Plan) -> None:
        self._runner.submit(plan)

    def collect(self) -> TickResult:
        self.results.append(self._runner.collect())
        return self.results[-1]

    def close(self) -> None:
        self._runner.close()


def answer(
    runner: Runner,
    *,
    prompt: tuple[int, ...] = PROMPT,
    tokens: int = 12,
    forced: tuple[int, ...] | None = None,
    temperature: float = 0.0,
    **more: Any,
) -> list[Event]:
    """All events of one answer; ``more`` for the request."""
    limits = Limits(tokens, SLOTS)
    request = Request(
        Sampling(temperature=temperature, seed=7),
        drafting=True,
        feed_limit=limits.feed_limit(len(prompt)),
        forced_drafts=forced,
        prompt_tokens=len(prompt),
        **{"keep_logits": True, **more},
    )
    schedule = Schedule(prompt, stages=runner.stages, chunk=CHUNK, request=request, limits=limits)
    return list(decode(runner, schedule))


def timeless(event: Event, *, tick: int = 0, serial: int = 0) -> tuple[object, ...]:
    """An event without its times; ticks and serials counted from the given ones."""
    fields = asdict(event)
    fields["tick"] -= tick
    if "serial" in fields:
        fields["serial"] -= serial
    if fields.get("parent") is not None:
        fields["parent"] -= serial
    if isinstance(event, Flushed | Pruned):
        fields["void"] = [void - serial for void in event.void]
    if isinstance(event, Ticked):
        fields = {"tick": fields["tick"]}
    if isinstance(event, Verified):
        fields["spans"] = [span.stage for span in event.spans]
    return type(event).__name__, fields
