"""Heads and backbone over whole texts equal what the pipeline computes token by token."""

from dataclasses import replace

import pytest
import torch

from ppsd_cli.model.cache import Rows
from ppsd_cli.model.heads import DeepWeights, DraftHead, HeadWeights, MlpWeights, Tap
from ppsd_cli.model.lagged_attention import dense_lagged_attention, lagged_attention
from ppsd_cli.model.layers import LayerWeights, Shape
from ppsd_cli.model.one_pass import Backbone, backbone_states, head_one_pass
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.stage import Output, Stage, StageRange

SPEC = ModelSpec(
    architecture="llama",
    layers=6,
    hidden=32,
    intermediate=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocabulary=50,
    rms_eps=1e-5,
    rope_theta=10_000.0,
    context=64,
    tied=True,
    windows=(None,) * 6,
)
LENGTH = 19


def random(*shape: int) -> torch.Tensor:
    return (
        torch.randn(*shape) * shape[-2] ** -0.5 if len(shape) > 1 else 1 + 0.2 * torch.randn(shape)
    )


def layer(spec: ModelSpec, *, extras: bool = False) -> LayerWeights:
    h, f, d = spec.hidden, spec.intermediate, spec.head_dim
    joined = (spec.heads + 2 * spec.kv_heads) * d
    return LayerWeights(
        input_norm=random(h),
        qkv=random(h, joined),
        output=random(spec.heads * d, h),
        mlp_norm=random(h),
        gate_up=random(h, 2 * f),
        down=random(f, h),
        qkv_bias=torch.randn(joined) if extras else None,
        q_norm=random(d) if extras else None,
        k_norm=random(d) if extras else None,
    )


def head(spec: ModelSpec, kind: str, depths: tuple[int, ...], blocks: int = 2) -> HeadWeights:
    h, width = spec.hidden, 2 * spec.kv_heads * spec.head_dim
    output = Output(random(h), random(h, spec.vocabulary), spec.rms_eps)
    taps = tuple(Tap(depth, lag) for lag, depth in enumerate(depths))
    if kind == "mlp":
        mlps = [
            MlpWeights(random(h), random(h, 2 * spec.intermediate), random(spec.intermediate, h))
            for _ in range(blocks)
        ]
        return HeadWeights(taps, output, mlps=tuple(mlps))
    layers = tuple(layer(spec, extras=spec.qk_norm) for _ in range(blocks))
    if kind == "block":
        return HeadWeights(taps, output, blocks=layers)
    k = len(depths) - 1
    deep = DeepWeights(
        torch.stack([random(h) for _ in range(k)]),
        torch.stack([random(h, width) for _ in range(k)]),
        torch.stack([random(h, h) for _ in range(k)]),
    )
    return HeadWeights(taps, output, blocks=layers, deep=deep)


CASES = [
    ("mlp", (2,), 2),
    ("block", (3,), 1),
    ("block", (3,), 2),
    ("deep", (3, 6), 2),
    ("deep", (2, 4, 6), 1),
    ("deep", (2, 4, 6), 2),
    ("deep", (1, 1, 5), 2),
    ("deep", (1, 2, 4, 5, 6), 2),
]


@pytest.mark.parametrize("prompt", [1, 3, 8])
@pytest.mark.parametrize(("kind", "depths", "blocks"), CASES)
@pytest.mark.parametrize("norms", [False, True])
def test_head_one_pass_equals_ticks(
    kind: str, depths: tuple[int, ...], blocks: int, norms: bool, prompt: int
) -> None:
    torch.manual_seed(len(depths) * 10 + blocks)
    spec = replace(SPEC, qkv_bias=norms, qk_norm=norms)
    weights = head(spec, kind, depths, blocks)
    states = {depth: torch.randn(LENGTH, spec.hidden) for depth in set(depths)}
    shape = Shape.of(spec)
    tables = Backbone(spec, torch.zeros(spec.hidden, 1), (), weights.output).tables(LENGTH)
    # The ring is fed as the pipeline does: a tap of lag k is known k ticks later.
    ticked = DraftHead(spec, weights, slots=LENGTH, ring=LENGTH + 2)
    for depth, rows in states.items():
        ticked.observe(depth, 0, rows[:prompt])
    ticked.prefill(0, prompt)
    expected = []
    for position in range(prompt, LENGTH):
        for tap in weights.taps:
            at = position - tap.lag
            if at >= 0:
                ticked.observe(tap.depth, at, states[tap.depth][at : at + 1])
        expected.append(ticked.draft_logits(position))
    taps = [states[tap.depth][None] for tap in weights.taps]
    hidden = head_one_pass(weights, taps, shape, tables)
    logits = weights.output.logits(hidden)[0]
    torch.testing.assert_close(logits[prompt:], torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_positions_from_the_first_on() -> None:
    """Without a prompt: positions 0 to K see only what exists."""
    torch.manual_seed(5)
    weights = head(SPEC, "deep", (2, 3, 5, 6))
    states = {tap.depth: torch.randn(7, SPEC.hidden) for tap in weights.taps}
    ticked = DraftHead(SPEC, weights, slots=7, ring=7)
    for depth, rows in states.items():
        ticked.observe(depth, 0, rows)
    expected = torch.cat([ticked.draft_logits(position) for position in range(7)])
    tables = Backbone(SPEC, torch.zeros(SPEC.hidden, 1), (), weights.output).tables(7)
    taps = [states[tap.depth][None] for tap in weights.taps]
    hidden = head_one_pass(weights, taps, Shape.of(SPEC), tables)
    logits = weights.output.logits(hidden)[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_backbone_equals_stage(window: int | None) -> None:
    """Batched and padded, the states equal those of a cached stage."""
    torch.manual_seed(6)
    spec = replace(SPEC, windows=(window,) * 3 + (None,) * 3)
    layers = [layer(spec) for _ in range(spec.layers)]
    embedding = torch.randn(spec.hidden, spec.vocabulary)
    output = Output(random(spec.hidden), embedding, spec.rms_eps)
    backbone = Backbone(spec, embedding, tuple(layers), output)
    ids = torch.randint(0, spec.vocabulary, (2, LENGTH))
    states = backbone_states(backbone, ids, [2, 4], backbone.tables(LENGTH + 3))
    assert set(states) == {2, 4, 6}
    stage = Stage(spec, StageRange(0, 6, 6), layers, slots=LENGTH, embedding=embedding)
    stage.tap_depths = frozenset([2, 4])
    hidden, taps = stage.forward(stage.embed(ids[1, :11]), Rows.chain(0, 11))
    for depth, expected in {**taps, 6: hidden}.items():
        torch.testing.assert_close(states[depth][1, :11], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lags", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 3, 17])
def test_fused_attention_equals_dense(lags: int, time: int) -> None:
    """Output and all gradients of the fused way equal those of full score matrices."""
    torch.manual_seed(lags * 100 + time)
    sizes = [(2, 3, time, 8)] * 3 + [(2, 3, time, lags, 8)] * 2
    first = [torch.randn(size, requires_grad=True) for size in sizes]
    second = [x.detach().clone().requires_grad_() for x in first]
    fused, dense = lagged_attention(*first), dense_lagged_attention(*second)
    torch.testing.assert_close(fused, dense, atol=1e-5, rtol=1e-4)
    grad = torch.randn_like(dense)
    fused.backward(grad)
    dense.backward(grad)
    # Near keys before the start of the text are hidden: their gradients are zero both ways.
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
