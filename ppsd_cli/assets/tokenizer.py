"""The tokenizer of a model folder, and conversations by its chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppsd_cli.errors import AssetError


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, from its own files only; AssetError when they are unusable."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise AssetError(f"{folder}: cannot load the tokenizer: {_line(error)}") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` as it stands; special tokens in it are recognised, none are added."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def render(tokenizer: Any, messages: Sequence[dict[str, str]], *, ask: bool = True) -> str:
    """A conversation as text; ``ask`` adds the opening of the answer.

    AssetError on failure, whatever it is: a template is a program of the model's author.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
    except Exception as error:
        raise AssetError(
            f"the model's chat template refuses this conversation: {_line(error)}"
        ) from error
    return text


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
