"""Rounding on a GPU: a stage's layer gives the same bits whoever shares its launches."""

import pytest
import torch

from ppsd_cli.model.cache import LayerCache
from ppsd_cli.model.layers import LayerWeights, Shape
from ppsd_cli.model.rope import rope_tables
from ppsd_cli.model.spec import ModelSpec

SLOTS = 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("hidden", "middle", "heads", "kv"), [(576, 1536, 9, 3), (896, 4864, 14, 2)]
)
def test_a_group_rounds_as_one_layer_does(hidden, middle, heads, kv):
    """Tiles may follow the number of stages that share a launch; not one bit may."""
    from cuda_launches import Layer, run_group

    sizes = (1, hidden, middle, heads, kv, 64, 90)
    spec = ModelSpec("llama", *sizes, 1e-5, 1e4, SLOTS, False, (None,))
    shape, some = Shape.of(spec), torch.randn
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    tables = tuple(table.to(**kind) for table in rope_tables(spec, SLOTS))
    inner = (heads + 2 * kv) * 64
    weights = [
        LayerWeights(
            *(t.to(**kind) for t in (
                1 + 0.1 * some(hidden), 0.05 * some(hidden, inner),
                0.05 * some(heads * 64, hidden), 1 + 0.1 * some(hidden),
                0.05 * some(hidden, 2 * middle), 0.05 * some(middle, hidden),
            ))
        )
        for _ in range(4)
    ]  # fmt: skip
    rows = [some(1, hidden).to(**kind) for _ in weights]

    def run(members):
        layers = []
        for index in members:
            cache = LayerCache(kv_heads=kv, slots=SLOTS, head_dim=64, **kind)
            layers.append(Layer(weights[index], cache, rows[index], 5 + index))
        results = run_group(layers, shape, tables, slots=SLOTS)
        return [(r, layer.cache.keys) for r, layer in zip(results, layers, strict=True)]

    alone = [run([index])[0] for index in range(4)]
    for count in (2, 3, 4):
        for one, shared in zip(alone, run(range(count)), strict=False):
            assert all(torch.equal(a, b) for a, b in zip(one, shared, strict=True)), count
