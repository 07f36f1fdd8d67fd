"""A tiny chat model with a tokenizer, and the train-head command on it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
WORDS = 58
SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]


def save_chat_model(folder: Path, *, template: bool = True, hidden: int = 32) -> Path:
    """A random llama of 4 layers over a vocabulary of words, saved with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = [*SPECIAL, "user", "assistant", "system", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(names),
        max_position_embeddings=128,
        initializer_range=0.25,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    """Settings under which a run takes a second or two."""
    return [
        *("-m", str(model), "-o", str(output), "--quiet", "--device", "cpu", "--context", "64"),
        *("--text-tokens", "6000", "--batch-tokens", "512", "--held-out", "8", "--warmup", "5"),
        *("--log-every", "5", "--eval-every", "20", "--checkpoint-every", "20"),
        *more,
    ]


def curve(folder: Path) -> list[dict[str, Any]]:
    """The records of ``curve.jsonl``."""
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def training(folder: Path) -> dict[str, Any]:
    """The training record of a head file."""
    record: dict[str, Any] = json.loads((folder / "head.json").read_text())["training"]
    return record


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """A JSONL file; strings are written as they are."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path
