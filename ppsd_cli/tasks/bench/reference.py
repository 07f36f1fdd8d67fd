"""transformers' own ``generate`` as a contender: plain, or drafting with its first layers."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ppsd_cli.core.schedule import Limits
from ppsd_cli.errors import AssetError
from ppsd_cli.tasks.bench.decoders import Answered, Decoder, Forced
from ppsd_cli.tasks.bench.faults import first_line, foreign_errors, memory_errors


class Stopwatch:
    """A streamer that notes when tokens came and how many. The first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Tokens, on the CPU: whoever computed them has finished."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append((perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing to do."""


def load_transformers(folder: Path, dtype: str, device: str) -> Any:
    """The model as transformers loads it; AssetError where it cannot."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    doing = f"{folder.name}: loading with transformers"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), local_files_only=True
        )
    except torch.OutOfMemoryError:
        with memory_errors(doing):
            raise
    except Exception as error:
        line = first_line(error)
        raise AssetError(f"{folder.name}: transformers cannot load it: {line}") from error
    with memory_errors(doing):
        return model.to(device).eval()


@dataclass(frozen=True, slots=True)
class TransformersDecoder:
    """Greedy ``generate`` with a model of ``load_transformers``.

    ``exit_layer``: layers that draft (``assistant_early_exit``); None drafts nothing. ``threads``:
    of torch in this process, for a model on the CPU.
    """

    model: Any
    exit_layer: int | None
    threads: int

    def answer(
        self, prompt: tuple[int, ...], limits: Limits, forced: Forced | None = None
    ) -> Answered:
        """Answer to the end. PpsdError for what ``generate`` raises; the model is as it was."""
        assert forced is None, "transformers takes no forced drafts"
        with foreign_errors("transformers' generate failed"):
            return self._answer(prompt, limits)

    def _answer(self, prompt: tuple[int, ...], limits: Limits) -> Answered:
        torch.set_num_threads(self.threads)
        tokens = torch.tensor([prompt], device=self.model.device)
        most = min(limits.max_new_tokens, limits.context - len(prompt))
        watch = Stopwatch()
        layers = self.model.config.num_hidden_layers
        began = perf_counter()
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = self.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    generation_config=self._settings(most, limits.eos_ids),
                    streamer=watch,
                )
        finally:
            self.model.config.num_hidden_layers = layers
        ids = tuple(out[0, len(prompt) :].tolist())
        first, count = watch.times[0]
        return Answered(
            token_ids=ids,
            finish_reason=_reason(ids, limits, most),
            first_token_seconds=first - began,
            decode_seconds=watch.times[-1][0] - first,
            first_tokens=count,
        )

    def _settings(self, most: int, eos_ids: frozenset[int]) -> Any:
        """Greedy, with our ends of text and none of the model's own defaults."""
        from transformers import GenerationConfig

        own = self.model.generation_config
        self.model.generation_config = GenerationConfig()  # its defaults would fill the gaps
        pad = own.pad_token_id if own.pad_token_id is not None else 0
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=pad,
            assistant_early_exit=self.exit_layer,
        )


def refusal(decoder: Decoder, prompt: tuple[int, ...], limits: Limits, *, kind: str) -> str | None:
    """Why a model of this kind cannot be decoded so, in one line; None where it can."""
    try:
        decoder.answer(prompt, limits)
    except Exception as error:  # noqa: BLE001 (another project's code: whatever it raises)
        return f"transformers' generate refuses {kind} here: {first_line(error.__cause__ or error)}"
    return None


def _reason(ids: tuple[int, ...], limits: Limits, most: int) -> str:
    if ids and ids[-1] in limits.eos_ids:
        return "stop"
    return "length" if most == limits.max_new_tokens else "context"
