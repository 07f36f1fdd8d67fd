"""Tiny random models of every architecture, draft heads for them, and one answer as plain data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.decode import decode
from ppsd_cli.core.events import (
    Committed,
    Event,
    Finished,
    FinishReason,
    Outcome,
    Verified,
)
from ppsd_cli.core.plan import Node, Plan, Request, Runner, Sampling, TickResult
from ppsd_cli.core.schedule import Limits, Schedule
from ppsd_cli.model.head_files import HeadInfo, write_head
from ppsd_cli.model.heads import DeepWeights, HeadWeights, MlpWeights, Tap
from ppsd_cli.model.layers import LayerWeights
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.stage import Output
from ppsd_cli.runtime.local import LocalRunner
from ppsd_cli.runtime.pipeline import PipelineConfig, assembled, local_runner

VOCABULARY, LAYERS, CONTEXT, CHUNK, WINDOW = 128, 6, 256, 16, 16
MODEL_HASH = "sha256:" + "0123456789abcdef" * 4
GREEDY = Sampling()
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", _SLIDING),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mha": ("Llama", {"num_key_value_heads": 4}),
    "echo": ("Llama", {}),
    "three": ("Llama", {"vocab_size": 3, "num_hidden_layers": 2, "initializer_range": 0.15}),
}


@dataclass(frozen=True)
class Tiny:
    """A saved model and the transformers model that it was saved from."""

    folder: Path
    reference: Any

    @cached_property
    def spec(self) -> ModelSpec:
        return read_spec(self.folder)

    def config(self, split: Sequence[int], **changes: Any) -> PipelineConfig:
        """A pipeline of that split, drafting by raw exit unless told otherwise."""
        settings: dict[str, Any] = {"dtype": "float32", "slots": CONTEXT, "chunk": CHUNK}
        settings |= {"head": "raw"} | changes
        return PipelineConfig(
            folder=str(self.folder),
            model_hash=MODEL_HASH,
            split=tuple(split),
            devices=("cpu",) * len(split),
            **settings,
        )

    def runner(self, split: Sequence[int], **changes: Any) -> LocalRunner:
        """That pipeline in this process."""
        return local_runner(self.config(split, **changes))

    def double(self, split: Sequence[int], **changes: Any) -> LocalRunner:
        """The same in float64, where no width of a matrix can change a token."""
        return assembled(self.config(split, dtype="float64", **changes))

    @torch.inference_mode()
    def states(self, token_ids: Sequence[int]) -> list[Tensor]:
        """States [T, H] after 0, 1, ... all layers, by transformers in one pass."""
        seen: list[Tensor] = []
        layers = self.reference.model.layers
        hooks = [
            layer.register_forward_hook(
                lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in layers
        ]
        ids = torch.tensor([list(token_ids)])
        try:
            self.reference(ids)
        finally:
            for hook in hooks:
                hook.remove()
        states = [self.reference.model.embed_tokens(ids), *seen]
        return [state.reshape(len(token_ids), -1) for state in states]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [T, V] by transformers in one pass."""
        return self.reference(torch.tensor([list(token_ids)])).logits[0]


def save_tiny(folder: Path, kind: str) -> Tiny:
    """Make the model ``kind`` in ``folder``: the same weights every time."""
    import transformers

    name, changes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**_SHAPE | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # what transformers initialises to one or zero must matter too
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if kind == "echo":  # layers 2 and up add nothing: a raw exit there equals the model
            for layer in model.model.layers[2:]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return Tiny(folder, model)


def prompt_of(length: int, *, vocabulary: int = VOCABULARY, seed: int = 1) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())


def random_tensor(*shape: int, seed: int, scale: float = 0.3) -> Tensor:
    """Normal numbers of that scale."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def save_head(
    folder: Path, tiny: Tiny, taps: Sequence[tuple[int, int]], **changes: Any
) -> tuple[HeadInfo, HeadWeights]:
    """A random head with two blocks (or ``kind='mlp'``) on these taps; deep with more than one.

    ``depth=2`` gives it a second level.
    """
    spec, kind = tiny.spec, changes.pop("kind", "deep" if len(taps) > 1 else "block")
    blocks = changes.pop("blocks", 2)
    norm = 1 + random_tensor(spec.hidden, seed=90)
    columns = changes.pop("token_ids", None)
    matrix = tiny.reference.get_output_embeddings().weight.detach().t()
    weights = HeadWeights(
        taps=tuple(Tap(*tap) for tap in taps),
        output=Output(norm, matrix if columns is None else matrix[:, columns], 1e-6, columns),
        blocks=() if kind == "mlp" else tuple(random_layer(spec, i) for i in range(blocks)),
        mlps=tuple(_random_mlp(spec, i) for i in range(blocks)) if kind == "mlp" else (),
        deep=_random_deep(spec, len(taps) - 1) if len(taps) > 1 else None,
        second=_random_second(spec) if changes.get("depth", 1) > 1 else None,
    )
    fields: dict[str, Any] = {
        "kind": kind,
        "model_hash": MODEL_HASH,
        "model_name": "tiny",
        "hidden": spec.hidden,
        "taps": weights.taps,
        "blocks": blocks,
        "draft_vocabulary": None if columns is None else len(columns),
        "stages": len(taps),
        "training": {"steps": 0},
    }
    info = HeadInfo(**fields | changes)
    write_head(folder, info, weights)
    return info, weights


def random_layer(spec: ModelSpec, seed: int) -> LayerWeights:
    """A decoder layer with every tensor that the architecture has."""
    h, f, d = spec.hidden, spec.intermediate, spec.head_dim
    q, kv = spec.heads * d, 2 * spec.kv_heads * d
    base = 1000 + 20 * seed
    return LayerWeights(
        input_norm=1 + random_tensor(h, seed=base),
        qkv=random_tensor(h, q + kv, seed=base + 1),
        output=random_tensor(q, h, seed=base + 2),
        mlp_norm=1 + random_tensor(h, seed=base + 3),
        gate_up=random_tensor(h, 2 * f, seed=base + 4),
        down=random_tensor(f, h, seed=base + 5),
        qkv_bias=random_tensor(q + kv, seed=base + 6) if spec.qkv_bias else None,
        q_norm=1 + random_tensor(d, seed=base + 7) if spec.qk_norm else None,
        k_norm=1 + random_tensor(d, seed=base + 8) if spec.qk_norm else None,
    )


def _random_mlp(spec: ModelSpec, seed: int) -> MlpWeights:
    h, f = spec.hidden, spec.intermediate
    return MlpWeights(
        norm=1 + random_tensor(h, seed=2000 + seed),
        gate_up=random_tensor(h, 2 * f, seed=2100 + seed),
        down=random_tensor(f, h, seed=2200 + seed),
    )


def _random_deep(spec: ModelSpec, count: int) -> DeepWeights:
    h, kv = spec.hidden, 2 * spec.kv_heads * spec.head_dim
    return DeepWeights(
        norms=1 + random_tensor(count, h, seed=3000),
        kv=random_tensor(count, h, kv, seed=3001),
        fuse=random_tensor(count, h, h, seed=3002),
    )


def _random_second(spec: ModelSpec) -> SecondLevel:
    h = spec.hidden
    return SecondLevel(
        state_norm=1 + random_tensor(h, seed=4000),
        token_norm=1 + random_tensor(h, seed=4001),
        fuse=random_tensor(2 * h, h, seed=4002),
        layer=random_layer(spec, 40),
        norm=1 + random_tensor(h, seed=4003),
    )


class Recorder:
    """A runner that keeps every result on its way."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.results: list[TickResult] = []
        self.stages = runner.stages

    @property
    def lookahead(self) -> int:
        return self.runner.lookahead  # a runner may change it with the request

    @property
    def pending(self) -> int:
        return self.runner.pending

    def submit(self, plan: Plan) -> None:
        self.runner.submit(plan)

    def collect(self) -> TickResult:
        self.results.append(self.runner.collect())
        return self.results[-1]


@dataclass(frozen=True)
class Run:
    """One answer: its events and the results behind them."""

    events: list[Event]
    results: list[TickResult]

    @cached_property
    def commits(self) -> list[Committed]:
        return [event for event in self.events if isinstance(event, Committed)]

    @property
    def ids(self) -> list[int]:
        return [event.token_id for event in self.commits]

    @property
    def reason(self) -> FinishReason:
        (finished,) = (event for event in self.events if isinstance(event, Finished))
        return finished.reason

    def count(self, outcome: Outcome) -> int:
        return sum(event.outcome is outcome for event in self.commits)

    @property
    def logits(self) -> Tensor:
        """The logits [T, V] that each committed token was chosen from."""
        live = {e.serial for e in self.events if isinstance(e, Verified) and e.live}
        targets = [t for r in self.results for t in r.targets if t.serial in live]
        return torch.stack([t.logits for t in targets if t.token_id is not None])

    @property
    def live_drafts(self) -> dict[int, list[Tensor]]:
        """Draft logits by the position drafted for, of guesses that stood on committed tokens."""
        last = self.commits[-1].position
        drafts: dict[int, list[Tensor]] = {}
        committed = {e.position: e.token_id for e in self.commits}
        path: dict[int, int] = {}
        for node, logits in self._entered:
            if node.token_id is None:
                continue
            stands = all(
                committed.get(position, token) == token
                for position, token in path.items()
                if position < node.position
            )
            if logits is not None and stands and node.position <= last:
                drafts.setdefault(node.position, []).append(logits)
            path[node.position] = node.token_id
        return drafts

    @property
    def _entered(self) -> Iterator[tuple[Node, Tensor | None]]:
        """Nodes in the order of entry, guesses with their logits."""
        for result in self.results:
            logits = iter(result.draft_logits)
            for node in result.entered:
                yield node, next(logits, None) if node.drafted else None


def answer(
    runner: Runner,
    prompt: Sequence[int],
    *,
    count: int = 40,
    drafting: bool = True,
    forced: Sequence[int] | None = None,
    **options: Any,
) -> Run:
    """Decode one answer.

    Options: sampling, eos, context, chunk (as the runner's), keep_logits, draft_length, width,
    depth, tree_scale, ranks (of the forced guesses in a tree), rank_scores.
    """
    limits = Limits(count, options.get("context", CONTEXT), frozenset(options.get("eos", ())))
    request = Request(
        sampling=options.get("sampling", GREEDY),
        drafting=drafting,
        feed_limit=limits.feed_limit(len(prompt)),
        forced_drafts=None if forced is None else tuple(forced),
        prompt_tokens=len(prompt),
        keep_logits=options.get("keep_logits", True),
        draft_length=options.get("draft_length", 0),
        width=options.get("width", 1),
        tree_scale=options.get("tree_scale", 1.0),
        forced_ranks=options.get("ranks"),
        rank_scores=options.get("rank_scores", ()),
        depth=options.get("depth", 1),
    )
    schedule = Schedule(
        tuple(prompt),
        stages=runner.stages,
        chunk=options.get("chunk", CHUNK),
        request=request,
        limits=limits,
    )
    recorder = Recorder(runner)
    return Run(list(decode(recorder, schedule)), recorder.results)


def wrong(token_id: int, vocabulary: int = VOCABULARY) -> int:
    """Another token."""
    return (token_id + 1) % vocabulary


def forced_drafts(right: Sequence[int], pattern: str, vocabulary: int = VOCABULARY) -> list[int]:
    """Guesses by position for the pattern always, never, alternating or thirds."""
    keep = {
        "always": lambda _: True,
        "never": lambda _: False,
        "alternating": lambda i: i % 2 == 1,
        "thirds": lambda i: i % 3 != 2,
    }[pattern]
    return [t if keep(i) else wrong(t, vocabulary) for i, t in enumerate(right)]
