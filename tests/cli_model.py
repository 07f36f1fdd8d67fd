"""A tiny model folder with a real tokenizer and chat template, and ways to run ``ppsd`` on it."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, how are you today?"]
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT, LAYERS = 128, 6


def save_cli_model(folder: Path) -> Path:
    """A random six-layer llama that writes printable text, with byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIAL[0])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=size,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for token in range(size):  # logit 0: never the largest
            text = tokenizer.decode([token])
            if not (text.isascii() and text.isprintable() and text.strip()):
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    return folder


def save_deep_head(model: Path, folder: Path) -> str:
    """A random head of two depths for three stages of that model; its guesses are worth nothing."""
    from models import Tiny, save_head
    from transformers import LlamaForCausalLM

    from ppsd_cli.assets import resolve_model

    files = resolve_model(str(model), offline=True)
    tiny = Tiny(model, LlamaForCausalLM.from_pretrained(model))
    taps = [(2, 0), (2, 1), (4, 2), (4, 3), (6, 4)]
    save_head(folder, tiny, taps, depth=2, model_hash=files.model_hash, stages=3)
    return str(folder)


@dataclass(frozen=True)
class Result:
    """What a run of the command gave."""

    code: int
    out: str
    err: str


class Ppsd:
    """Runs ``ppsd`` in this process, or as a process of its own where signals are at stake."""

    def __init__(
        self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        self._capsys, self._patch = capsys, patch
        self.model = str(folder)

    def generate(self, *args: str, stdin: bytes | None = None) -> Result:
        """``ppsd generate --model MODEL ARGS``, stdin a pipe if given, else a terminal."""
        return self.run("generate", "--model", self.model, *args, stdin=stdin)

    def run(self, *args: str, stdin: bytes | None = None) -> Result:
        """``ppsd ARGS`` in this process."""
        from ppsd_cli.cli import main

        stream = io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8")
        stream.isatty = lambda: stdin is None  # type: ignore[method-assign]
        self._patch.setattr(sys, "stdin", stream)
        self._capsys.readouterr()
        code = 0
        try:
            main(list(args))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)


def start(folder: Path | str, *args: str, **options) -> subprocess.Popen[bytes]:
    """``ppsd generate`` as a process of its own; ``options`` for Popen."""
    command = [sys.executable, "-m", "ppsd_cli", "generate", "--model", str(folder), *args]
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, "NO_COLOR": "1"}, **settings | options)
