"""Which layers go to which stage."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsd_cli.errors import ConfigError, ResourceError
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.runtime import engine
from ppsd_cli.runtime.engine import choose_devices, choose_dtype, default_threads
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.placement import (
    Costs,
    balance,
    check_split,
    choose_split,
    costs_in_step,
    costs_of,
    layer_parameters,
)

SPEC = ModelSpec(
    architecture="llama",
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocabulary=49152,
    rms_eps=1e-5,
    rope_theta=1e4,
    context=2048,
    tied=True,
    windows=(None,) * 30,
)
FREE = Costs(0.0, 0.0)


def compositions(layers, parts):
    for cuts in itertools.combinations(range(1, layers), parts - 1):
        ends = (0, *cuts, layers)
        yield tuple(b - a for a, b in itertools.pairwise(ends))


def slowest(counts, extra):
    return max(c + e for c, e in zip(counts, extra, strict=True))


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.floats(0, 9), min_size=1, max_size=min(n, 5)))
    )
)
def test_balance_is_as_good_as_every_other_split(case):
    layers, extra = case
    counts = balance(layers, extra)
    assert sum(counts) == layers
    assert min(counts) >= 1
    best = min(slowest(each, extra) for each in compositions(layers, len(extra)))
    assert slowest(counts, extra) == pytest.approx(best)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stages": 1, "exit_layer": None}, (30,)),
        ({"stages": 2, "exit_layer": None}, (15, 15)),
        ({"stages": 3, "exit_layer": None}, (10, 10, 10)),
        ({"stages": 3, "exit_layer": 10}, (10, 10, 10)),
        ({"stages": 3, "exit_layer": 4}, (4, 13, 13)),
        ({"stages": 30, "exit_layer": None}, (1,) * 30),
        ({"stages": 2, "exit_layer": 29}, (29, 1)),
    ],
)
def test_splits_without_other_costs(options, expected):
    assert choose_split(30, costs=FREE, **options) == expected


def test_the_lm_matrix_and_the_head_lighten_their_stages():
    costs = costs_of(SPEC, blocks=2, draft_vocab=None, drafting=True)
    assert layer_parameters(SPEC) == 576 * 64 * 2 * 12 + 3 * 576 * 1536
    assert costs.lm == pytest.approx(49152 * 576 / layer_parameters(SPEC))
    assert costs.head == pytest.approx(2 + costs.lm)
    assert choose_split(30, stages=2, exit_layer=None, costs=costs) == (14, 16)
    split = choose_split(30, stages=3, exit_layer=10, costs=costs)
    assert split[0] == 10
    assert split[1] - split[2] in (7, 8, 9), "the LM matrix is worth eight layers"
    assert costs_of(SPEC, blocks=0, draft_vocab=None, drafting=False).head == 0
    twice = costs_of(SPEC, blocks=2, draft_vocab=None, drafting=True, depth=2).head
    assert 2 * costs.lm + 3 < twice < 2 * costs.lm + 3.5, "a layer, a join and the matrix again"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": 31, "exit_layer": None}, "only 30 layers"),
        ({"stages": 2, "exit_layer": 30}, "last layer of this 30-layer model; choose 1 to 29"),
        ({"stages": 2, "exit_layer": 99}, "has 30 layers; choose 1 to 29"),
        ({"stages": 1, "exit_layer": 10}, "two stages"),
        ({"stages": 4, "exit_layer": 28}, "leaves 2 layers for 3 stages"),
    ],
)
def test_shapes_that_cannot_be(options, says):
    with pytest.raises(ConfigError, match=says):
        choose_split(30, costs=FREE, **options)


def test_explicit_splits():
    check_split((10, 10, 10), 30, None)
    check_split((10, 10, 10), 30, 10)
    with pytest.raises(ConfigError, match="10,10,9 adds up to 29; the model has 30"):
        check_split((10, 10, 9), 30, None)
    with pytest.raises(ConfigError, match="disagree"):
        check_split((10, 20), 30, 12)


def test_devices(monkeypatch):
    monkeypatch.setattr(engine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine.torch.cuda, "device_count", lambda: 0)
    assert choose_devices(None, stages=1) == (("cpu",), False)
    assert choose_devices(None, stages=3) == (("cpu",) * 3, True), "a process each on CPUs"
    assert choose_devices(("cpu",), stages=3) == (("cpu",) * 3, False)
    assert choose_devices(("cpu", "cpu"), stages=2) == (("cpu", "cpu"), True)
    with pytest.raises(ConfigError, match="2 devices for 3 stages"):
        choose_devices(("cpu", "cpu"), stages=3)
    with pytest.raises(ResourceError, match="cuda:0.*0 CUDA devices"):
        choose_devices(("cuda:0",), stages=1)
    monkeypatch.setattr(engine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine.torch.cuda, "device_count", lambda: 2)
    assert choose_devices(None, stages=2) == (("cuda:0",) * 2, False)
    assert choose_devices(("cuda:0", "cuda:1"), stages=2) == (("cuda:0", "cuda:1"), False)
    with pytest.raises(ResourceError, match="cuda:2"):
        choose_devices(("cuda:0", "cuda:2"), stages=2)


def test_number_format_and_threads(monkeypatch):
    assert choose_dtype(None, ("cpu",)) == "float32"
    assert choose_dtype("auto", ("cuda:0",)) == "bfloat16"
    assert choose_dtype("float16", ("cpu",)) == "float16"
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda _: set(range(8)))
    assert [default_threads(n) for n in (1, 2, 3, 16)] == [4, 4, 2, 1]


def test_pipeline_config_travels_as_json():
    config = PipelineConfig(
        "/x", "sha256:0", (2, 4), ("cpu", "cpu"), "float32", 64, head="raw", draft_vocab=5
    )
    assert PipelineConfig.from_json(config.to_json()) == config
    assert [(config.part(s).first, config.part(s).last) for s in range(2)] == [(0, 2), (2, 6)]
    assert config.part(0).embeds
    assert not config.part(0).predicts
    assert config.part(1).predicts


def test_stages_in_step_share_the_layers_evenly() -> None:
    split = choose_split(30, stages=3, exit_layer=10, costs=costs_in_step())
    assert split == (10, 10, 10)
    assert choose_split(32, stages=4, exit_layer=None, costs=costs_in_step()) == (8, 8, 8, 8)
