"""The kernels of a layer and of the LM head against the layer functions of torch, by interpreter.

One row is what the chain uses; several rows take the way through tensor cores.
"""

from copy import deepcopy

import pytest
import torch
import triton_cpu

from ppsd_cli.core.choose import choose
from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.cache import LayerCache, Rows, attend, visible
from ppsd_cli.model.layers import LayerWeights, Shape, finish, project
from ppsd_cli.model.rope import rope_tables
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.stage import Output
from ppsd_cli.runtime.cuda.tiles import SPLIT

_MISSING = triton_cpu.missing()
if _MISSING is None:
    from cuda_launches import Layer, run_group, vote
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=str(_MISSING)),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
H, N, M, D, F, SLOTS = 40, 6, 2, 16, 56, 2 * SPLIT + 8
SPEC = ModelSpec("llama", 1, H, F, N, M, D, 90, 1e-5, 1e4, SLOTS, False, (None,))
SHAPE = Shape.of(SPEC)
SAMPLINGS = {
    "greedy": Sampling(),
    "all": Sampling(temperature=0.8, seed=5),
    "cut": Sampling(temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, seed=-5),
}


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def weights(dtype, *, biases=False, norms=False):
    def some(*sizes, scale=0.2, base=0.0):
        return (base + scale * torch.randn(*sizes)).to(dtype)

    return LayerWeights(
        input_norm=some(H, base=1.0),
        qkv=some(H, (N + 2 * M) * D),
        output=some(N * D, H),
        mlp_norm=some(H, base=1.0),
        gate_up=some(H, 2 * F),
        down=some(F, H),
        qkv_bias=some((N + 2 * M) * D) if biases else None,
        output_bias=some(H) if biases else None,
        gate_up_bias=some(2 * F) if biases else None,
        down_bias=some(H) if biases else None,
        q_norm=some(D, base=1.0) if norms else None,
        k_norm=some(D, base=1.0) if norms else None,
    )


def filled_cache(dtype):
    cache = LayerCache(kv_heads=M, slots=SLOTS, head_dim=D, dtype=dtype, device=torch.device("cpu"))
    cache.keys.normal_()
    cache.values.normal_()
    return cache


def by_torch(layer, cache, tables):
    """The same layer by the functions of the CPU engine, over ``cache``."""
    rows = Rows.chain(layer.position, layer.x.shape[0])
    cos, sin = (table[rows.positions][:, None] for table in tables)
    q, k, v = project(layer.x, layer.weights, SHAPE, cos, sin)
    cache.write(k, v, rows.slots)
    attended = attend(q, cache, rows, visible(rows, layer.window))
    return finish(layer.x, attended, layer.weights, SHAPE)


@pytest.mark.parametrize(
    ("width", "changes", "dtype"),
    [
        (1, {}, torch.float32),
        (1, {"biases": True}, torch.float32),
        (1, {"norms": True}, torch.float32),
        (1, {"norms": True, "biases": True}, torch.float16),
        (3, {"biases": True}, torch.float32),
        (3, {"norms": True}, torch.float32),
    ],
    ids=str,
)
def test_a_group_of_layers(width, changes, dtype):
    """Members with weights, caches, windows and positions of their own; all parts of attention."""
    tables = tuple(table.to(dtype) for table in rope_tables(SPEC, SLOTS))
    places = [(0, None), (70, 33), (SPLIT - 1, None), (2 * SPLIT - 4, SPLIT + 3)]
    layers = [
        Layer(weights(dtype, **changes), filled_cache(dtype), torch.randn(width, H).to(dtype), *at)
        for at in places
    ]
    copies = [deepcopy(layer.cache) for layer in layers]
    expected = [by_torch(layer, c, tables) for layer, c in zip(layers, copies, strict=True)]
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    results = run_group(layers[:1], SHAPE, tables, slots=SLOTS)
    results += run_group(layers[1:], SHAPE, tables, slots=SLOTS)
    for layer, result, copy, wanted in zip(layers, results, copies, expected, strict=True):
        torch.testing.assert_close(result, wanted, **close)
        torch.testing.assert_close(layer.cache.keys, copy.keys, **close)
        torch.testing.assert_close(layer.cache.values, copy.values, **close)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("reduced", [False, True])
def test_logits_and_the_choice(width, sampling, reduced):
    columns = 50 if reduced else 90
    ids = torch.randperm(90)[:columns].sort().values if reduced else None
    head = Output(1 + 0.3 * torch.randn(H), torch.randn(H, columns), 1e-5, ids)
    for position in (3, 10_000):
        x = torch.randn(width, H)
        logits, column = vote(head, x, position, sampling)
        torch.testing.assert_close(logits, head.logits(x), rtol=1e-3, atol=1e-3)
        where = torch.arange(position + 1, position + 1 + width)
        expected = choose(logits, sampling, where, token_ids=ids)
        assert (column if ids is None else ids[column]).tolist() == expected.tolist()


@pytest.mark.parametrize("pair", [(0, 89), (3, 5), (3, 67)])
def test_ties_go_to_the_lowest_token(pair):
    matrix = torch.randn(H, 90).abs()
    matrix[:, pair] = 10 * matrix.max()
    head = Output(torch.ones(H), matrix, 1e-5)
    logits, column = vote(head, torch.rand(1, H), 5, Sampling())
    assert logits[0, pair[0]] == logits[0, pair[1]]
    assert column.tolist() == [pair[0]]
