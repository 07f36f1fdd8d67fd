"""Models and heads of random weights: sizes, repeatability, scale, and exact decoding with them."""

import dataclasses
import hashlib

import pytest
import torch
from models import answer, forced_drafts

from ppsd_cli.commands.session import ModelChoice, Plan, make_plan
from ppsd_cli.config import Settings
from ppsd_cli.core.events import Outcome
from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.model.cache import Rows
from ppsd_cli.model.load import Loader
from ppsd_cli.model.places import RandomModel, open_checkpoint, random_model, spec_of
from ppsd_cli.model.random_weights import (
    RANDOM_BLOCK,
    RANDOM_DEEP,
    RandomCheckpoint,
    random_head,
    random_taps,
)
from ppsd_cli.model.shapes import SHAPES, parameters, tensor_shapes
from ppsd_cli.model.stage import Stage, StageRange
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.runtime.pipeline import PipelineConfig, local_runner, returning_stages
from ppsd_cli.runtime.processes import spawn_runner

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
# As published with the models (embeddings that are shared count once).
KNOWN = {
    "llama-1b": 1.2358e9,
    "llama-3b": 3.2127e9,
    "llama-8b": 8.0303e9,
    "llama-70b": 70.554e9,
    "qwen3-4b": 4.0225e9,
    "smollm2-135m": 134.515e6,
}
PROMPT = tuple((7 * i * i + 3) % TINY.vocabulary for i in range(40))


def pipeline(
    split: tuple[int, ...], head: str | None, folder="random:tiny:3", **changes
) -> PipelineConfig:
    settings = {"dtype": "float32", "slots": 192, "chunk": 16, "draft_vocab": 200} | changes
    return PipelineConfig(
        folder=folder,
        model_hash=RandomModel("tiny", 3).model_hash,
        split=split,
        devices=("cpu",) * len(split),
        head=head,
        **settings,
    )


def run(config: PipelineConfig, **options):
    return answer(local_runner(config), PROMPT, context=192, chunk=16, count=60, **options)


@pytest.fixture(scope="module")
def plain():
    return run(pipeline((6,), None), drafting=False)


# --- shapes


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_its_known_size(name):
    """From the specs alone, nothing is allocated."""
    spec = SHAPES[name]
    assert len(spec.windows) == spec.layers
    assert spec.heads % spec.kv_heads == 0
    if name in KNOWN:
        assert parameters(spec) == pytest.approx(KNOWN[name], rel=0.001)
    else:
        assert name == "tiny"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "biases", "mha"])
def test_tensor_names_and_shapes_are_those_of_real_checkpoints(tiny, kind):
    model = tiny(kind)
    real = Checkpoint(model.folder)
    assert tensor_shapes(model.spec) == {name: real.shape(name) for name in real.names()}
    made = RandomCheckpoint(model.spec, 0, CPU)
    assert made.names() == real.names()
    assert made.nbytes(made.names()) == real.nbytes(real.names())


# --- the checkpoint


def test_numbers_follow_from_seed_and_name():
    one, again, other = (RandomCheckpoint(TINY, seed, CPU) for seed in (1, 1, 2))
    name, second = (f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))
    value = one.tensor(name, torch.float32)
    one.tensor(second, torch.float32)
    assert torch.equal(value, one.tensor(name, torch.float32))
    assert torch.equal(value, again.tensor(name, torch.float32))
    assert not torch.equal(value, other.tensor(name, torch.float32))
    assert not torch.equal(value, one.tensor(second, torch.float32))
    state = torch.random.get_rng_state()
    one.tensor(name)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales(dtype):
    checkpoint = RandomCheckpoint(TINY, 0, CPU)
    up = checkpoint.tensor("model.layers.0.mlp.up_proj.weight", dtype)
    output = checkpoint.tensor("model.layers.0.self_attn.o_proj.weight", dtype)
    assert up.dtype == output.dtype == dtype
    assert up.float().std().item() == pytest.approx(TINY.hidden**-0.5, rel=0.05)
    residual = (TINY.heads * TINY.head_dim * 2 * TINY.layers) ** -0.5
    assert output.float().std().item() == pytest.approx(residual, rel=0.05)
    assert checkpoint.tensor("model.norm.weight", dtype).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_text_is_one_that_rounding_does_not_change(tied, dtype):
    """Behind token t comes t + 1 (tied: t again), by far. A random head never guesses it."""
    spec, ids = dataclasses.replace(TINY, tied=tied), torch.arange(TINY.vocabulary)
    loader = Loader(RandomCheckpoint(spec, 0, CPU), spec, dtype, CPU)
    stage = Stage.load(loader, StageRange(0, 6, 6), slots=len(ids))
    head = random_head(loader, loader.lm_matrix(), taps=random_taps(RANDOM_BLOCK, (3, 3)))
    with torch.inference_mode():
        rows = Rows.chain(0, len(ids), CPU)
        states, _ = stage.forward(stage.embed(ids), rows)
        logits = stage.output.logits(states).float()
        guesses = head.output.logits(states)
    right = ids if tied else (ids + 1) % len(ids)
    best = logits.topk(2)
    assert torch.equal(best.indices[:, 0], right)
    assert (best.values[:, 0] - best.values[:, 1]).min() > 1.5
    assert logits.std() < 2
    assert not guesses.argmax(-1).eq(right).any()


def test_wrong_names_and_shapes():
    checkpoint = RandomCheckpoint(TINY, 0, CPU)
    assert not checkpoint.has("model.layers.6.input_layernorm.weight")
    with pytest.raises(AssetError, match=r"no tensor model\.layers\.6"):
        checkpoint.tensor("model.layers.6.input_layernorm.weight")
    with pytest.raises(AssetError, match=r"\[64\], expected \[65\]"):
        checkpoint.tensor("model.norm.weight", shape=(65,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_are_made_on_the_device():
    device = torch.device("cuda:0")
    checkpoint = open_checkpoint("random:llama-8b", device)
    name = "model.layers.31.mlp.gate_proj.weight"
    value = checkpoint.tensor(name, torch.bfloat16)
    assert (value.device, value.dtype) == (device, torch.bfloat16)
    assert torch.equal(value, checkpoint.tensor(name, torch.bfloat16))
    assert value.float().std().item() == pytest.approx(4096**-0.5, rel=0.01)


def test_tensors_are_made_on_the_wanted_device_only(monkeypatch):
    """Nothing is made elsewhere and moved: every maker is told the device."""
    told = []
    for name in ("empty", "full", "Generator"):
        real = getattr(torch, name)

        def maker(*args, _real=real, _name=name, **kwargs):
            device = args[0] if _name == "Generator" else kwargs.pop("device")
            told.append((_name, device))
            return _real(*(() if _name == "Generator" else args), **kwargs)

        monkeypatch.setattr(torch, name, maker)
    device = torch.device("cuda:1")
    checkpoint = RandomCheckpoint(TINY, 0, device)
    checkpoint.tensor("model.norm.weight")
    checkpoint.tensor("lm_head.weight")
    assert told == [("full", device), ("Generator", device), ("empty", device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_stay_finite_through_eighty_layers(dtype):
    spec = dataclasses.replace(TINY, layers=80, windows=(None,) * 80)
    loader = Loader(RandomCheckpoint(spec, 0, CPU), spec, dtype, CPU)
    stage = Stage.load(loader, StageRange(0, 80, 80), slots=64)
    with torch.inference_mode():
        hidden = stage.embed(torch.arange(64))
        states, _ = stage.forward(hidden, Rows.chain(0, 64, CPU))
        logits = stage.output.logits(states).float()
    assert 0.3 < states.float().std().item() < 5
    assert 0.5 < logits.std().item() < 2


# --- places


def test_places(tiny):
    folder = tiny("llama").folder
    assert random_model(folder) is None
    assert spec_of(folder) == tiny("llama").spec
    assert isinstance(open_checkpoint(str(folder), CPU), Checkpoint)
    assert random_model("random:llama-8b") == RandomModel("llama-8b", 0)
    assert random_model("random:tiny:12") == RandomModel("tiny", 12)
    assert random_model(RandomModel("tiny", 12).place) == RandomModel("tiny", 12)
    assert spec_of("random:llama-8b:4") is SHAPES["llama-8b"]
    hashes = {RandomModel(s, i).model_hash for s in ("tiny", "llama-8b") for i in range(3)}
    assert len(hashes) == 6
    assert RandomModel("tiny").model_hash == (
        "sha256:" + hashlib.sha256(b"random:tiny:0").hexdigest()
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("llama-9b", r"did you mean 'llama-\db'\?"),
        ("", "there are: llama-1b"),
        ("tiny:", "the seed must be a number"),
        ("tiny:-1", "the seed must be a number"),
        ("tiny:1:2", "the seed must be a number"),
        ("tiny:\u00b2", "the seed must be a number"),
        ("tiny:" + "9" * 5000, "the seed must be a number"),
    ],
)
def test_bad_places(text, words):
    with pytest.raises(ConfigError, match=words):
        spec_of(f"random:{text}")


# --- heads


def test_taps_of_random_heads():
    taps = random_taps(RANDOM_DEEP, (2, 3, 1))
    assert [(tap.depth, tap.lag) for tap in taps] == [(2, 0), (5, 1), (6, 2)]
    assert [(tap.depth, tap.lag) for tap in random_taps(RANDOM_BLOCK, (2, 3, 1))] == [(2, 0)]
    assert returning_stages(pipeline((2, 3, 1), RANDOM_DEEP)) == (1, 2)
    assert returning_stages(pipeline((2, 3, 1), RANDOM_BLOCK)) == (2,)


@pytest.mark.parametrize("name", ["tiny", "qwen3"])
def test_a_random_head_has_the_tensors_of_a_trained_one(tiny, name):
    spec = TINY if name == "tiny" else tiny(name).spec
    loader = Loader(RandomCheckpoint(spec, 0, CPU), spec, torch.bfloat16, CPU)
    head = random_head(
        loader, loader.lm_matrix(), taps=random_taps(RANDOM_DEEP, (2, 2, 2)), draft_vocab=100
    )
    h, kv = spec.hidden, 2 * spec.kv_heads * spec.head_dim
    assert len(head.blocks) == 2
    for block in head.blocks:
        model = loader.layer(0).tensors()
        assert {k: t.shape for k, t in block.tensors().items()} == {
            k: t.shape for k, t in model.items()
        }
    assert head.deep is not None
    assert (head.deep.kv.shape, head.deep.fuse.shape) == ((2, h, kv), (2, h, h))
    assert head.output.lm_matrix.shape == (h, 100)
    assert head.output.token_ids.tolist() == list(range(100))
    assert head.output.lm_matrix.dtype == head.blocks[0].qkv.dtype == torch.bfloat16
    whole = random_head(loader, loader.lm_matrix(), taps=random_taps(RANDOM_BLOCK, (2, 4)))
    assert (whole.deep, whole.output.token_ids) == (None, None)


# --- decoding


def test_plain_decoding_counts_and_repeats(plain):
    """The text is the same for every seed, the numbers are not."""
    follow = [(PROMPT[-1] + i) % TINY.vocabulary for i in range(1, 61)]
    again, other = (
        run(pipeline((6,), None, folder=f"random:tiny:{seed}"), drafting=False) for seed in (3, 4)
    )
    assert plain.ids == again.ids == other.ids == follow
    assert torch.equal(plain.logits, again.logits)
    assert not torch.equal(plain.logits, other.logits)


@pytest.mark.parametrize("head", [RANDOM_DEEP, RANDOM_BLOCK])
@pytest.mark.parametrize("split", [(3, 3), (2, 3, 1), (1, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("pattern", ["always", "thirds", "never", None])
def test_chains_with_random_heads_equal_plain_decoding(plain, head, split, pattern):
    forced = None if pattern is None else forced_drafts(plain.ids, pattern, TINY.vocabulary)
    chain = run(pipeline(split, head), forced=forced)
    assert chain.ids == plain.ids
    assert torch.equal(chain.logits, plain.logits)
    accepted, corrected = chain.count(Outcome.ACCEPTED), chain.count(Outcome.CORRECTED)
    if pattern == "always":  # the first token and one at the end are committed undrafted
        assert (accepted, corrected) == (58, 0)
    elif pattern == "thirds":
        assert accepted > 15
        assert corrected > 15
    elif pattern == "never":
        assert (accepted, corrected) == (0, 58)


@pytest.mark.parametrize("head", [RANDOM_DEEP, RANDOM_BLOCK])
def test_random_heads_go_on_behind_a_guess(plain, head):
    """Their own guesses are wrong; forced ones that are right commit two tokens a tick."""
    config = pipeline((2, 3, 1), head, width=4, depth=2)
    ticks = []
    for forced in (
        {},
        {"forced": plain.ids, "ranks": (0,) * 60, "rank_scores": (-0.1, -3, -4, -5)},
    ):
        tree = run(config, width=4, depth=2, **forced)
        assert tree.ids == plain.ids
        ticks.append(tree.commits[-1].tick)
    assert tree.count(Outcome.ACCEPTED) > 50
    assert ticks[1] < 40 < 170 < ticks[0]


@pytest.mark.slow
def test_stage_processes_make_the_same_weights(plain):
    """Nothing but the place's text travels; each process makes its own part."""
    chain = spawn_runner(pipeline((2, 3, 1), RANDOM_DEEP), port=None)
    forced = forced_drafts(plain.ids, "thirds", TINY.vocabulary)
    try:
        found = answer(chain, PROMPT, context=192, chunk=16, count=60, forced=forced)
    finally:
        chain.close()
    assert found.ids == plain.ids
    assert torch.equal(found.logits, plain.logits)


# --- plans


def plan(text: str = "tiny", *, model: str | None = None, **flags) -> Plan:
    choice = ModelChoice(model, None, None, True, random_weights=text)
    return make_plan(choice, Settings(**flags), lambda _: None)


def test_a_plan_for_random_weights_needs_no_files():
    made = plan("llama-8b:7", devices=("cpu",))
    assert made.spec is SHAPES["llama-8b"]
    assert made.config.folder == "random:llama-8b:7"
    assert made.config.model_hash == made.files.model_hash == RandomModel("llama-8b", 7).model_hash
    assert (made.decoder, made.head_name, made.config.head) == ("ppsd", RANDOM_DEEP, RANDOM_DEEP)
    assert sum(made.config.split) == 32
    assert made.eos_ids == frozenset()
    assert any("random weights" in note for note in made.notes)
    first, last = made.config.split
    assert 0 <= first - last <= 3  # two blocks and 32,000 columns here, 128,256 there


@pytest.mark.parametrize(
    ("flags", "decoder", "head"),
    [
        ({"decoder": "ar"}, "ar", None),
        ({"split": (2, 2, 2)}, "ppsd", RANDOM_DEEP),
        ({"draft_vocab": 50}, "ppsd", RANDOM_DEEP),
        ({"head": RANDOM_BLOCK, "stages": 3}, "ppsd", RANDOM_BLOCK),
        ({"head": "raw", "stages": 3}, "ppsd", "raw"),
        ({"decoder": "eesd", "head": RANDOM_BLOCK}, "eesd", RANDOM_BLOCK),
    ],
)
def test_plans_load_and_draft(plain, flags, decoder, head):
    made = plan("tiny:3", devices=("cpu",), dtype="float32", context=192, **flags)
    assert (made.decoder, made.config.head) == (decoder, head)
    drafting = decoder == "ppsd"
    found = answer(
        local_runner(dataclasses.replace(made.config, chunk=16)),
        PROMPT,
        context=192,
        chunk=16,
        count=60,
        drafting=drafting,
    )
    assert found.ids == plain.ids
    wrong = found.count(Outcome.CORRECTED) > 0
    assert wrong == (drafting and head != "raw"), "only the raw exit knows the next token"


def test_plans_that_cannot_be(tiny):
    with pytest.raises(ConfigError, match="drop --model"):
        plan(model="smollm2-135m")
    with pytest.raises(ConfigError, match="there are: llama-1b"):
        plan("gpt")
    with pytest.raises(AssetError, match="was trained for"):
        plan("smollm2-135m", head="smollm2-135m-2stage")
    choice = ModelChoice(str(tiny("llama").folder), None, None, True)
    made = make_plan(choice, Settings(head=RANDOM_DEEP, stages=3), lambda _: None)
    assert (made.head_name, made.config.stages) == (RANDOM_DEEP, 3)
    assert any("guesses nothing" in note for note in made.notes)
