"""The demo model, SmolLM2-135M-Instruct: equal to transformers, and chains equal to plain."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Run, answer, forced_drafts

import ppsd_cli
from ppsd_cli.assets import ModelFiles
from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.prompts import encode_chat
from ppsd_cli.commands.session import ModelChoice, find_model, find_profile
from ppsd_cli.core.events import Committed, Outcome
from ppsd_cli.model.head_files import read_head, read_info
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone, backbone_states, head_one_pass
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.runtime.local import LocalRunner
from ppsd_cli.runtime.pipeline import PipelineConfig, local_runner
from ppsd_cli.runtime.processes import spawn_runner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HEADS = Path(ppsd_cli.__file__).parent / "data" / "heads"
TWO_STAGES, THREE_STAGES = str(HEADS / "smollm2-135m-2stage"), str(HEADS / "smollm2-135m-3stage")
COUNT, SLOTS, CHUNK, LITERAL = 48, 512, 128, 1
QUESTIONS = [
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "Explain recursion to a child.",
    "What is the capital of France?",
    "List five uses for a brick.",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that reverses a string.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "How do vaccines work?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23? Think step by step.",
    "Who wrote The Origin of Species, and why does it matter?",
    "Compare cats and dogs as pets.",
    "Describe the water cycle.",
    "Write a short letter that asks for a refund.",
    "What are the primary colours?",
    "Explain how a bicycle stays upright, in detail and with an example from everyday life.",
    "Name three rivers in Africa.",
    "What should I pack for a week of hiking in the mountains in autumn?",
    "Invent a name for a coffee shop and describe it.",
]


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    """The demo model; downloaded once into the cache folder."""
    choice = ModelChoice("smollm2-135m", None, None, False)
    return find_model(choice, find_profile(choice), None)


@pytest.fixture(scope="module")
def reference(files) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(files) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(files.folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [encode_chat(tokenizer, chat) for chat in chats]


def config(files: ModelFiles, split: tuple[int, ...], head: str | None = "raw") -> PipelineConfig:
    return PipelineConfig(
        folder=str(files.folder),
        model_hash=files.model_hash,
        split=split,
        devices=("cpu",) * len(split),
        dtype="float32",
        slots=SLOTS,
        chunk=CHUNK,
        head=head,
    )


def runner(files: ModelFiles, split: tuple[int, ...], head: str | None = "raw") -> LocalRunner:
    return local_runner(config(files, split, head))


@pytest.fixture(scope="module")
def whole(files) -> LocalRunner:
    """Plain decoding."""
    return runner(files, (30,), None)


@pytest.fixture(scope="module")
def expected(whole, prompts) -> Callable[[int], Run]:
    """Plain decoding's first tokens and logits for a prompt by its number, each made once."""
    return cache(lambda number: plain(whole, prompts[number], 32, keep_logits=True))


def plain(whole: LocalRunner, prompt: tuple[int, ...], count: int, *, keep_logits: bool) -> Run:
    options = {"context": SLOTS, "chunk": CHUNK, "keep_logits": keep_logits}
    return answer(whole, prompt, count=count, drafting=False, **options)


@pytest.mark.parametrize("begin", range(0, len(QUESTIONS), 4))
def test_plain_decoding_is_transformers_greedy_choice_everywhere(whole, reference, prompts, begin):
    """Each of 20 x 48 tokens is the argmax of transformers' own logits for the text before it.

    By induction over the tokens that is its greedy ``generate``; one prompt shows it literally.
    """
    for number, prompt in enumerate(prompts[begin : begin + 4], begin):
        ids = plain(whole, prompt, COUNT, keep_logits=False).ids
        assert len(ids) == COUNT
        with torch.inference_mode():
            logits = reference(torch.tensor([(*prompt, *ids[:-1])])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == ids
        if number == LITERAL:
            assert generated(reference, prompt) == ids


def generated(reference: Any, prompt: tuple[int, ...]) -> list[int]:
    """What transformers' ``generate`` says, also beyond the end of text."""
    settings = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    made = reference.generate(torch.tensor([prompt]), max_new_tokens=COUNT, **settings)
    return list(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize(
    ("split", "number"), [((14, 16), 0), ((10, 12, 8), 13), ((6, 7, 7, 6, 4), 4)], ids=str
)
def test_chains_are_bit_equal_to_plain_decoding(files, prompts, expected, split, number):
    right = expected(number)
    forced = forced_drafts(right.ids, "thirds", 49152)
    options = {"context": SLOTS, "chunk": CHUNK}
    run = answer(runner(files, split), prompts[number], count=32, forced=forced[:27], **options)
    assert run.ids == right.ids
    assert torch.equal(run.logits, right.logits)
    assert run.count(Outcome.ACCEPTED) >= 16
    assert run.count(Outcome.CORRECTED) >= 8


@pytest.mark.parametrize(
    ("split", "head"),
    [((16, 14), TWO_STAGES), ((10, 12, 8), THREE_STAGES), ((6, 7, 7, 6, 4), "raw")],
    ids=str,
)
def test_stage_processes_are_bit_equal_to_plain_decoding(files, prompts, expected, split, head):
    chain = spawn_runner(config(files, split, head), port=None)
    count = 32 if head != "raw" else 16  # most guesses of a raw exit are wrong
    try:
        run = answer(chain, prompts[4], count=count, context=SLOTS, chunk=CHUNK)
    finally:
        chain.close()
    assert run.ids == expected(4).ids[:count]
    assert torch.equal(run.logits, expected(4).logits[:count])


@pytest.mark.parametrize(
    ("split", "head"), [((16, 14), TWO_STAGES), ((10, 10, 10), THREE_STAGES)], ids=str
)
def test_shipped_heads_draft_in_the_pipeline_what_training_predicts(files, prompts, split, head):
    """Guess by guess: accepted exactly where the one-pass forward guesses the model's token."""
    pipeline = config(files, split, head)
    chain = local_runner(pipeline)
    loader = Loader(
        Checkpoint(files.folder), read_spec(files.folder), torch.float32, torch.device("cpu")
    )
    backbone, info = Backbone.load(loader), read_info(Path(head))
    weights = read_head(Path(head), info, loader, backbone.output.lm_matrix)
    same = accepted = count = 0
    for prompt in (prompts[0], prompts[6]):
        run = answer(chain, prompt, count=64, context=SLOTS, chunk=CHUNK)
        text = torch.tensor([[*prompt, *run.ids]])
        tables = backbone.tables(text.shape[1])
        with torch.inference_mode():
            states = backbone_states(backbone, text, {t.depth for t in info.taps}, tables)
            taps = [states[t.depth] for t in info.taps]
            hidden = head_one_pass(weights, taps, Shape.of(backbone.spec), tables)[0]
            guesses = weights.output.token_ids[weights.output.logits(hidden).argmax(-1)]
        hits = guesses[:-1] == text[0, 1:]
        for event in run.events:
            if isinstance(event, Committed) and event.outcome is not Outcome.UNDRAFTED:
                took = event.outcome is Outcome.ACCEPTED
                same += took == bool(hits[event.position - 1])
                accepted += took
                count += 1
    assert count >= 100
    assert same >= count - 1
    assert accepted / count > 0.45


def test_a_long_prompt_in_chunks(files, whole, reference, prompts):
    """Several chunks through three stages, then the same tokens as plain and as transformers."""
    prompt = tuple(token for each in prompts for token in each)[: 2 * CHUNK + 60]
    expected = plain(whole, prompt, 12, keep_logits=True)
    run = answer(runner(files, (10, 12, 8)), prompt, count=12, context=SLOTS, chunk=CHUNK)
    assert run.ids == expected.ids
    assert torch.equal(run.logits, expected.logits)
    with torch.inference_mode():
        logits = reference(torch.tensor([(*prompt, *run.ids[:-1])])).logits[0, len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == run.ids
