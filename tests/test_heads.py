"""Draft heads: files, fit, and the lagged view against a plain one-pass reference."""

import json
from collections.abc import Sequence
from functools import cache, partial

import pytest
import torch
from models import LAYERS, MODEL_HASH, VOCABULARY, answer, forced_drafts, prompt_of, save_head
from torch import Tensor

from ppsd_cli.errors import AssetError
from ppsd_cli.model.head_files import check_fit, read_head, read_info
from ppsd_cli.model.heads import HeadWeights, Tap
from ppsd_cli.model.layers import LayerWeights
from ppsd_cli.model.load import Loader
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.runtime.pipeline import head_taps, returning_stages, tap_depths

PROMPT, COUNT = 37, 24


def norm(x, weight, eps):
    return x / (x.square().mean() + eps).sqrt() * weight


def rotated(heads, position, theta_of):
    """Rotary embedding of [heads, D] by pairs (i, i + D/2), as complex numbers."""
    half = heads.shape[-1] // 2
    pairs = torch.complex(heads[:, :half], heads[:, half:])
    turn = torch.polar(torch.ones(half), position * theta_of)
    turned = pairs * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


class PlainHead:
    """A head by its definition, one position and one attention head at a time."""

    def __init__(self, tiny, weights: HeadWeights) -> None:
        self.spec, self.weights, self.tiny = tiny.spec, weights, tiny
        self.frequencies = tiny.reference.model.rotary_emb.inv_freq.float()

    def draft_logits(self, text: Sequence[int]) -> list[Tensor]:
        """Logits [V'] after every position of the text, from one pass of transformers."""
        states = self.tiny.states(text)
        hidden = [states[self.weights.taps[0].depth][p] for p in range(len(text))]
        for mlp in self.weights.mlps:
            hidden = [x + self._gated(norm(x, mlp.norm, self._eps), mlp) for x in hidden]
        for index, block in enumerate(self.weights.blocks):
            lagged = states if index == 0 and len(self.weights.taps) > 1 else None
            seen = cache(partial(self._key_value, hidden, w=block, states=lagged))
            hidden = [self._block(hidden[p], p, block, seen, lagged) for p in range(len(text))]
        output = self.weights.output
        return [norm(x, output.norm, output.eps) @ output.lm_matrix for x in hidden]

    @property
    def _eps(self):
        return self.spec.rms_eps

    def _gated(self, x, w):
        gate, up = (x @ w.gate_up).chunk(2)
        return (torch.nn.functional.silu(gate) * up) @ w.down

    def _block(self, x, p, w: LayerWeights, key_value, states):
        """One layer at position p; with ``states`` its keys are those of the lagged view."""
        n, m, d = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        bias = 0.0 if w.qkv_bias is None else w.qkv_bias
        qkv = norm(x, w.input_norm, self._eps) @ w.qkv + bias
        q = self._turned(qkv[: n * d].view(n, d), w.q_norm, p)
        oldest = len(self.weights.taps) - 1 if states is not None else 0
        pairs = [key_value(position, min(p - position, oldest)) for position in range(p + 1)]
        keys, values = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        out = []
        for head in range(n):
            group = head // (n // m)
            scores = keys[:, group] @ q[head] * d**-0.5
            out.append(scores.softmax(0) @ values[:, group])
        if states is not None:
            x = x + self._fused(states, p)
        x = x + torch.cat(out) @ w.output
        gate, up = (norm(x, w.mlp_norm, self._eps) @ w.gate_up).chunk(2)
        return x + (torch.nn.functional.silu(gate) * up) @ w.down

    def _key_value(self, inputs, position, lag, *, w, states):
        """Key [M, D] and value [M, D] of a position as one that is ``lag`` further on sees it."""
        n, m, d = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        bias = 0.0 if w.qkv_bias is None else w.qkv_bias[n * d :]
        if states is None or lag == 0:
            kv = norm(inputs[position], w.input_norm, self._eps) @ w.qkv[:, n * d :]
        else:
            deep = self.weights.deep
            assert deep is not None
            state = states[self.weights.taps[lag].depth][position]
            kv = norm(state, deep.norms[lag - 1], self._eps) @ deep.kv[lag - 1]
        key, value = (kv + bias).view(2, m, d)
        return self._turned(key, w.k_norm, position), value

    def _fused(self, states, p):
        deep = self.weights.deep
        assert deep is not None
        total = torch.zeros(self.spec.hidden)
        for index in range(1, len(self.weights.taps)):
            if p >= index:
                state = states[self.weights.taps[index].depth][p - index]
                total += norm(state, deep.norms[index - 1], self._eps) @ deep.fuse[index - 1]
        return total

    def _turned(self, heads, weight, position):
        if weight is not None:
            heads = torch.stack([norm(h, weight, self._eps) for h in heads])
        return rotated(heads, position, self.frequencies)


def assert_drafts(run, prompt, expected):
    """Every guess that stood on committed tokens has the reference's logits; how many there were.

    ``expected`` gives the logits after each position of the true text.
    """
    count = 0
    for position, drafts in run.live_drafts.items():
        reference = expected[position - 1]
        for logits in drafts:
            scale = reference.std().item()
            torch.testing.assert_close(logits, reference, rtol=1e-3, atol=2e-3 * scale)
            count += 1
    assert min(run.live_drafts) > len(prompt) - 1
    return count


HEADS = [
    ((3, 3), [(3, 0), (6, 1)]),
    ((3, 3), [(3, 0), (5, 1)]),
    ((2, 2, 2), [(2, 0), (4, 1), (6, 2)]),
    ((2, 2, 2), [(2, 0), (3, 1), (5, 2)]),
    ((1, 2, 3), [(1, 0), (3, 1), (4, 2)]),
    ((3, 2, 1), [(3, 0), (3, 1), (6, 2)]),
    ((2, 2, 2), [(2, 0), (4, 1)]),
    ((2, 1, 1, 1, 1), [(2, 0), (3, 1), (4, 2), (5, 3), (6, 4)]),
    ((1, 1, 1, 1, 2), [(1, 0), (2, 1), (2, 2), (4, 3)]),
    ((2, 2, 2), [(2, 0)]),
]


@pytest.fixture(scope="module")
def truth(tiny):
    """The model's answer to the prompt, and the reference logits of a head over the whole text."""

    @cache
    def ids(kind):
        runner = tiny(kind).runner((6,), head=None)
        return answer(runner, prompt_of(PROMPT), count=COUNT, drafting=False).ids

    return ids


@pytest.mark.parametrize(("split", "taps"), HEADS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_lagged_view_at_every_phase_of_a_flush(tiny, truth, tmp_path, kind, split, taps):
    """Guesses wrong at positions p with p mod (n + 1) = phase, for every phase; always; never.

    A flush at any distance from the one before makes the head read states that void guesses
    overwrote or used; the prompt is long enough for three chunks and ring reuse.
    """
    model, prompt, right = tiny(kind), prompt_of(PROMPT), truth(kind)
    _, weights = save_head(tmp_path, model, taps)
    expected = PlainHead(model, weights).draft_logits((*prompt, *right))
    runner = model.runner(split, head=str(tmp_path))
    period = len(split) + 1
    patterns = [
        [t if i % period != phase else (t + 1) % VOCABULARY for i, t in enumerate(right)]
        for phase in range(period)
    ]
    patterns += [forced_drafts(right, name) for name in ("always", "never", "alternating")]
    for forced in patterns:
        run = answer(runner, prompt, count=COUNT, forced=forced)
        assert run.ids == right
        assert assert_drafts(run, prompt, expected) >= COUNT - 2


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 33])
def test_lagged_view_after_short_prompts_and_at_chunk_edges(tiny, tmp_path, length):
    """Fewer prompt tokens than taps; a last chunk of one token."""
    model, prompt = tiny("qwen2"), prompt_of(length)
    _, weights = save_head(tmp_path, model, [(2, 0), (3, 1), (6, 2)])
    plain = answer(model.runner((6,), head=None), prompt, count=12, drafting=False).ids
    expected = PlainHead(model, weights).draft_logits((*prompt, *plain))
    runner = model.runner((2, 2, 2), head=str(tmp_path))
    for pattern in ("thirds", "never", "always"):
        run = answer(runner, prompt, count=12, forced=forced_drafts(plain, pattern))
        assert assert_drafts(run, prompt, expected) >= 10


def test_reference_would_notice_another_lag(tiny, truth, tmp_path):
    """The comparison has teeth: states of one lag too few give logits far away."""
    model, prompt, right = tiny("llama"), prompt_of(PROMPT), truth("llama")
    _, weights = save_head(tmp_path, model, [(2, 0), (4, 1), (6, 2)])
    other = HeadWeights(
        (Tap(2, 0), Tap(6, 1), Tap(6, 2)), weights.output, weights.blocks, (), weights.deep
    )
    expected = PlainHead(model, other).draft_logits((*prompt, *right))
    run = answer(model.runner((2, 2, 2), head=str(tmp_path)), prompt, count=COUNT)
    with pytest.raises(AssertionError):
        assert_drafts(run, prompt, expected)


@pytest.mark.parametrize("columns", [None, torch.tensor([1, 5, 6, 40, 99, 127])])
def test_mlp_head_and_reduced_vocabulary(tiny, truth, tmp_path, columns):
    model, prompt, right = tiny("llama"), prompt_of(PROMPT), truth("llama")
    _, weights = save_head(tmp_path, model, [(2, 0)], kind="mlp", token_ids=columns)
    expected = PlainHead(model, weights).draft_logits((*prompt, *right))
    runner = model.runner((2, 4), head=str(tmp_path))
    forced = forced_drafts(right, "thirds")
    assert assert_drafts(answer(runner, prompt, count=COUNT, forced=forced), prompt, expected) > 20
    free = answer(runner, prompt, count=COUNT)
    assert free.ids == right
    guesses = {node.token_id for r in free.results for node in r.entered if node.drafted}
    assert columns is None or guesses <= set(columns.tolist())


def test_raw_exit_is_the_models_own_output(tiny, truth):
    """Final norm and LM matrix on the exit layer; with a reduced vocabulary its first columns."""
    model, prompt, right = tiny("qwen3"), prompt_of(PROMPT), truth("qwen3")
    state = model.states((*prompt, *right))[2]
    with torch.inference_mode():
        expected = model.reference.lm_head(model.reference.model.norm(state))
    for columns in (None, 50):
        runner = model.runner((2, 4), draft_vocab=columns)
        run = answer(runner, prompt, count=COUNT, forced=forced_drafts(right, "thirds"))
        assert assert_drafts(run, prompt, [row[:columns] for row in expected]) > 20


def test_every_prompt_starts_afresh(tiny, tmp_path):
    """Rings and caches of one answer do not show in the next."""
    model = tiny("llama")
    _, weights = save_head(tmp_path, model, [(2, 0), (4, 1), (6, 2)])
    runner = model.runner((2, 2, 2), head=str(tmp_path))
    for length in (70, 5, 40, 1):
        prompt = prompt_of(length, seed=length)
        run = answer(runner, prompt, count=8)
        expected = PlainHead(model, weights).draft_logits((*prompt, *run.ids))
        assert assert_drafts(run, prompt, expected) > 0


# Files


def load_head(model, folder, dtype=torch.float32):
    loader = Loader(Checkpoint(model.folder), model.spec, dtype, torch.device("cpu"))
    return read_head(folder, read_info(folder), loader, loader.lm_matrix())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {"taps": [(2, 0), (3, 1), (6, 2)]},
        {"taps": [(2, 0)], "kind": "mlp", "token_ids": torch.tensor([3, 9, 77])},
        {"taps": [(1, 0)], "blocks": 1},
    ],
    ids=["deep", "mlp", "block"],
)
def test_round_trip(tiny, tmp_path, kind, options):
    options = dict(options)
    info, weights = save_head(tmp_path, tiny(kind), options.pop("taps"), **options)
    assert read_info(tmp_path) == info
    again = load_head(tiny(kind), tmp_path)
    assert again.taps == weights.taps
    assert torch.equal(again.output.norm, weights.output.norm)
    assert torch.equal(again.output.lm_matrix, weights.output.lm_matrix)
    for one, other in zip(again.blocks, weights.blocks, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(one.tensors()[k], v) for k, v in other.tensors().items())
    for one, other in zip(again.mlps, weights.mlps, strict=True):
        assert torch.equal(one.gate_up, other.gate_up)
    if weights.deep is not None:
        assert again.deep is not None
        assert torch.equal(again.deep.kv, weights.deep.kv)
        assert torch.equal(again.deep.fuse, weights.deep.fuse)
    half = load_head(tiny(kind), tmp_path, torch.bfloat16)
    assert half.output.norm.dtype == torch.bfloat16


def test_a_saved_head_holds_no_lm_matrix_and_is_read_without_pickle(tiny, tmp_path):
    save_head(tmp_path, tiny("llama"), [(2, 0), (6, 1)])
    names = Checkpoint(tmp_path / "head.safetensors").names()
    assert {"norm", "deep.kv", "blocks.0.qkv"} <= set(names)
    sizes = [Checkpoint(tmp_path / "head.safetensors").shape(name) for name in names]
    assert all(VOCABULARY not in size for size in sizes if size != (32, 128))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.safetensors"]


def fit(info, **changes):
    settings = {"model_hash": MODEL_HASH, "hidden": 32, "split": (2, 2, 2)} | changes
    check_fit(info, **settings)


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"model_hash": "sha256:ffffffffffff99"}, [MODEL_HASH[:19], "sha256:ffffffffffff"]),
        ({"hidden": 64}, ["32", "64"]),
        ({"split": (3, 1, 2)}, ["layer 2", "layer is 3"]),
        ({"split": (2, 1, 3)}, ["layer 4 at lag 1", "only 3 layers", "2,1,3"]),
        ({"split": (2, 2, 1, 1)}, ["layer 6 at lag 2", "only 5 layers", "2,2,1,1"]),
    ],
)
def test_a_head_that_does_not_fit_is_refused_with_both_values(tiny, tmp_path, changes, both):
    info, _ = save_head(tmp_path, tiny("llama"), [(2, 0), (4, 1), (6, 2)])
    fit(info)
    with pytest.raises(AssetError) as caught:
        fit(info, **changes)
    for value in both:
        assert value in str(caught.value)


@pytest.mark.parametrize("split", [(2, 2, 2), (2, 3, 1), (2, 4)])
def test_a_head_fits_every_split_that_has_its_states_in_time(tiny, tmp_path, split):
    info, _ = save_head(tmp_path, tiny("llama"), [(2, 0), (4, 1), (6, 2)])
    fit(info, split=split)


def test_taps_are_returned_by_the_stages_that_hold_them(tiny, tmp_path):
    model = tiny("llama")
    save_head(tmp_path, model, [(1, 0), (2, 1), (2, 2), (6, 3)])
    config = model.config((1, 2, 2, 1), head=str(tmp_path))
    assert head_taps(config) == (Tap(1, 0), Tap(2, 1), Tap(2, 2), Tap(6, 3))
    assert [tap_depths(config, s) for s in range(4)] == [{1}, {2}, set(), {6}]
    assert returning_stages(config) == (1, 3)
    raw = model.config((1, 2, 2, 1))
    assert returning_stages(raw) == (3,)
    assert head_taps(model.config((6,), head=None)) == ()


def damaged(folder, change):
    path = folder / "head.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


KEYS = ["kind", "model_hash", "model_name", "hidden", "taps", "blocks", "draft_vocabulary"]
KEYS += ["stages", "format_version"]


@pytest.mark.parametrize("key", [*KEYS, "training"])
@pytest.mark.parametrize("value", [[1], {"a": 1}, 1.5, "x", -1, True, [["a", 0]]], ids=str)
def test_wrong_values_in_a_description(tiny, tmp_path, key, value):
    if (key == "training" and value == {"a": 1}) or (key in ("model_hash", "model_name", "kind")):
        value = [value]
    save_head(tmp_path, tiny("llama"), [(2, 0), (6, 1)])
    damaged(tmp_path, lambda data: data.update({key: value}))
    with pytest.raises(AssetError, match=r"head\.json"):
        read_info(tmp_path)


@pytest.mark.parametrize("key", KEYS)
def test_missing_keys_in_a_description(tiny, tmp_path, key):
    save_head(tmp_path, tiny("llama"), [(2, 0), (6, 1)])
    damaged(tmp_path, lambda data: data.pop(key))
    with pytest.raises(AssetError, match=key):
        read_info(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 99}, "head format 99"),
        ({"kind": "magic"}, "'magic'"),
        ({"taps": []}, "lags"),
        ({"taps": [[2, 1], [6, 2]]}, "lags"),
        ({"taps": [[2, 0], [1, 1]]}, "fall"),
        ({"taps": [[0, 0], [1, 1]]}, "1 or more"),
        ({"kind": "block"}, "cannot be"),
        ({"blocks": 0}, "cannot be"),
        ({"draft_vocabulary": 0}, "cannot be"),
    ],
    ids=str,
)
def test_descriptions_that_cannot_be(tiny, tmp_path, change, says):
    save_head(tmp_path, tiny("llama"), [(2, 0), (6, 1)])
    damaged(tmp_path, lambda data: data.update(change))
    with pytest.raises(AssetError, match=says):
        read_info(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00", '{"a":' * 100_000])
def test_descriptions_that_are_not_json(tmp_path, text):
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(AssetError, match=r"head\.json"):
        read_info(tmp_path)
    (tmp_path / "head.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(AssetError, match=r"head\.json"):
        read_info(tmp_path)
    with pytest.raises(AssetError, match="no such head"):
        read_info(tmp_path / "elsewhere")


def test_damaged_tensors(tiny, tmp_path):
    """Truncated anywhere, missing, or of another shape than model and description imply."""
    model, path = tiny("llama"), tmp_path / "head.safetensors"
    save_head(tmp_path, model, [(2, 0), (6, 1)])
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(AssetError, match=r"head\.safetensors"):
            load_head(model, tmp_path)
    path.unlink()
    with pytest.raises(AssetError, match=r"head\.safetensors"):
        load_head(model, tmp_path)
    path.write_bytes(whole)
    load_head(model, tmp_path)
    with pytest.raises(AssetError, match=r"blocks\.0\.qkv has shape \[32, 64\].*\[32, 128\]"):
        load_head(tiny("qwen3"), tmp_path)


def test_a_description_that_asks_for_more_than_the_file_has(tiny, tmp_path):
    model = tiny("llama")
    save_head(tmp_path, model, [(2, 0), (6, 1)])
    damaged(tmp_path, lambda data: data.update(blocks=3))
    with pytest.raises(AssetError, match=r"no tensor blocks\.2"):
        load_head(model, tmp_path)
    save_head(tmp_path, model, [(2, 0)], kind="mlp", token_ids=torch.tensor([1, VOCABULARY]) - 1)
    load_head(model, tmp_path)
    damaged(tmp_path, lambda data: data.update(draft_vocabulary=3))
    with pytest.raises(AssetError, match=r"token_ids has shape \[2\].*\[3\]"):
        load_head(model, tmp_path)


def test_layers_of_the_tests():
    assert all(sum(split) == LAYERS for split, _ in HEADS)
