"""The lean layers against transformers, for every architecture, beyond the sliding window."""

import pytest
import torch
from models import CHUNK, KINDS, VOCABULARY, answer, prompt_of

from ppsd_cli.model.cache import LayerCache, Rows, attend, visible
from ppsd_cli.model.layers import rms_norm
from ppsd_cli.model.load import Loader
from ppsd_cli.model.stage import Stage, StageRange
from ppsd_cli.model.weights import Checkpoint

REAL_KINDS = [kind for kind in KINDS if kind not in ("three", "echo")]
PROMPT, COUNT = 37, 60


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_plain_decoding_equals_transformers_generate(tiny, kind):
    """Token for token through several chunks and windows, and the logits close."""
    model, prompt = tiny(kind), prompt_of(PROMPT)
    reference = model.reference.generate(
        torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, pad_token_id=0
    )[0, PROMPT:].tolist()
    run = answer(model.runner((6,), head=None), prompt, count=COUNT, drafting=False)
    assert run.ids == reference
    assert len(set(reference)) > 8, "a text that repeats itself would prove little"
    expected = model.logits((*prompt, *reference[:-1]))[PROMPT - 1 :]
    torch.testing.assert_close(run.logits, expected, rtol=1e-3, atol=2e-3 * expected.std().item())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_as_close_to_float32_as_transformers(tiny, kind):
    """Rounding differs between the two, so both are measured against the float32 logits."""
    from transformers import AutoModelForCausalLM

    model, prompt = tiny(kind), prompt_of(PROMPT)
    run = answer(model.runner((6,), dtype="bfloat16", head=None), prompt, drafting=False)
    text = (*prompt, *run.ids[:-1])
    exact = model.logits(text)[PROMPT - 1 :]
    narrow = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = narrow(torch.tensor([text])).logits[0, PROMPT - 1 :].float()

    def error(logits):
        return ((logits - exact).square().mean().sqrt() / exact.std()).item()

    assert error(run.logits) < 1.3 * error(theirs)
    assert error(theirs) < 0.2


def load_stage(model, first=0, last=6, slots=256, dtype=torch.float32):
    loader = Loader(Checkpoint(model.folder), model.spec, dtype, torch.device("cpu"))
    return Stage.load(loader, StageRange(first, last, 6), slots=slots)


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_states_after_every_layer_equal_transformers(tiny, kind):
    """Through stages that begin in mid-model, in uneven chunks."""
    model, prompt = tiny(kind), prompt_of(50)
    expected = model.states(prompt)
    for first, last in ((0, 2), (2, 5), (5, 6)):
        stage = load_stage(model, first, last)
        stage.tap_depths = frozenset(range(first + 1, last + 1))
        seen = {depth: [] for depth in stage.tap_depths}
        start = 0
        for count in (20, 1, 1, 13, 15):
            rows = Rows.chain(start, count)
            hidden, taps = stage.forward(expected[first][start : start + count], rows)
            assert torch.equal(hidden, taps[last])
            for depth, states in taps.items():
                seen[depth].append(states)
            start += count
        for depth, parts in seen.items():
            scale = expected[depth].abs().max().item()
            torch.testing.assert_close(
                torch.cat(parts), expected[depth], rtol=1e-4, atol=1e-5 * scale
            )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_tree_mask_that_says_chain_changes_nothing(tiny, kind):
    """The same rows through an explicit mask, at slots that are not their positions."""
    model, prompt = tiny(kind), prompt_of(8)
    chain, tree = load_stage(model), load_stage(model)
    hidden = chain.embed(torch.tensor(prompt))
    positions = torch.arange(8)
    expected, _ = chain.forward(hidden, Rows.chain(0, 8))
    slots = torch.tensor([11, 3, 7, 0, 9, 5, 1, 2])
    mask = torch.zeros(8, 12, dtype=torch.bool)
    for row in range(8):
        mask[row, slots[: row + 1]] = True
    actual, _ = tree.forward(hidden, Rows(positions, slots, 12, mask))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_two_branches_of_a_tree_do_not_see_each_other(tiny):
    model, prompt = tiny("llama"), prompt_of(6)
    left, right = (7, 9), (3, 5)
    stage = load_stage(model)
    stage.forward(stage.embed(torch.tensor(prompt)), Rows.chain(0, 6))
    tokens = torch.tensor([left[0], right[0], left[1], right[1]])
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, :6] = True
    for row, ancestors in enumerate(((6,), (7,), (6, 8), (7, 9))):
        mask[row, list(ancestors)] = True
    rows = Rows(torch.tensor([6, 6, 7, 7]), torch.tensor([6, 7, 8, 9]), 10, mask)
    actual, _ = stage.forward(stage.embed(tokens), rows)
    for branch, picked in ((left, (0, 2)), (right, (1, 3))):
        expected = model.states((*prompt, *branch))[6][6:]
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual[list(picked)], expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 64])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_against_plain_loops(window, count, heads):
    """Every row sees itself and what came before, at most ``window`` tokens, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    kv_heads, dim, before = 2, 8, 11
    cache = LayerCache(
        kv_heads=kv_heads, slots=40, head_dim=dim, dtype=torch.float32, device=torch.device("cpu")
    )
    cache.keys.fill_(1e4)  # what lies beyond must never be seen
    cache.values.fill_(torch.nan)
    keys, values = torch.randn(2, before + count, kv_heads, dim, generator=generator)
    cache.write(keys, values, torch.arange(before + count))
    q = torch.randn(count, heads * kv_heads, dim, generator=generator)
    rows = Rows.chain(before, count)
    actual = attend(q, cache, rows, visible(rows, window))
    for row in range(count):
        end = before + row + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(heads * kv_heads):
            k, v = keys[begin:end, head // heads], values[begin:end, head // heads]
            weights = (k @ q[row, head] * dim**-0.5).softmax(0)
            expected = weights @ v
            got = actual[row].view(-1, dim)[head]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_against_its_formula(dtype):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = (torch.arange(32) / 16).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = exact.to(dtype) * weight
    assert rms_norm(x, weight, 1e-5).dtype == dtype
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_holds_only_its_own_weights(tiny, kind, dtype):
    """Bytes of layers, embedding and LM matrix that the stage uses: not one matrix more."""
    model = tiny(kind)
    checkpoint = Checkpoint(model.folder)
    width = getattr(torch, dtype)
    split = (2, 3, 1)
    total = 0
    for number in range(3):
        first, last = sum(split[:number]), sum(split[: number + 1])
        stage = load_stage(model, first, last, slots=32, dtype=width)
        mine = [n for n in checkpoint.names() if _layer_of(n) in range(first, last)]
        if number == 0:
            mine.append("model.embed_tokens.weight")
        if number == 2:
            mine += ["model.norm.weight"]
            mine += ["model.embed_tokens.weight" if model.spec.tied else "lm_head.weight"]
        expected = checkpoint.nbytes(mine, width)
        assert expected <= stage.weight_bytes() <= 1.1 * expected
        total += _memory(stage.tensors())
        assert _memory(stage.tensors()) <= 1.1 * expected, "a view holds on to a larger tensor"
    whole = load_stage(model, dtype=width)
    assert whole.weight_bytes() == checkpoint.nbytes(checkpoint.names(), width)
    if model.spec.tied:
        assert whole.output is not None
        assert whole.output.lm_matrix is whole.embedding
    assert total >= whole.weight_bytes()


def _layer_of(name):
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") else None


def _memory(tensors):
    """Bytes of the storages behind the tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_embedding_rows(tiny):
    model = tiny("llama")
    stage = load_stage(model)
    ids = torch.tensor([0, 5, VOCABULARY - 1, 5])
    expected = model.reference.model.embed_tokens(ids)
    assert torch.equal(stage.embed(ids), expected)
    assert stage.embed(ids).is_contiguous()


def test_chunk_length_of_the_tests_cuts_prompts(tiny):
    """Guard for the parametrised tests: their prompts are longer than a chunk and the window."""
    assert PROMPT > 2 * CHUNK
    assert tiny("mistral").spec.windows == (16,) * 6
    assert tiny("qwen2").spec.windows == (None,) * 3 + (16,) * 3
