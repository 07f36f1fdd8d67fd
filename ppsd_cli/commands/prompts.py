"""Where a prompt comes from, and how it becomes tokens."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd_cli.assets.tokenizer import encode, render
from ppsd_cli.errors import AssetError, ConfigError

_TEMPLATE_ROOM = 512


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The prompt as the user gave it; at most one of ``text`` and ``file``."""

    text: str | None
    file: Path | None
    system: str | None
    chat: bool


def read_prompt(source: PromptSource) -> str:
    """The prompt's text: from the flag, a file, or stdin when it is piped (or ``-``)."""
    if source.text is not None and source.file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if source.file is not None:
        try:
            text = decode_utf8(source.file.read_bytes(), str(source.file))
        except OSError as error:
            raise AssetError(f"{source.file}: {error.strerror}") from error
    elif source.text is not None and source.text != "-":
        text = source.text
    elif source.text == "-" or (sys.stdin is not None and not sys.stdin.isatty()):
        text = _read_stdin()
    else:
        raise ConfigError("no prompt: give --prompt, --prompt-file, or pipe text into stdin")
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def decode_utf8(data: bytes, where: str) -> str:
    """Text from bytes; AssetError with the offset of the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AssetError(f"{where}: not UTF-8 at byte {error.start}") from error


def encode_prompt(tokenizer: Any, prompt: str, source: PromptSource) -> tuple[int, ...]:
    """Token ids: through the model's chat template, or the bare text."""
    if source.chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        if source.system is not None:
            messages.insert(0, {"role": "system", "content": source.system})
        try:
            return encode_chat(tokenizer, messages)
        except AssetError as error:
            raise AssetError(f"{error}; use --no-chat-template") from error
    if source.system is not None:
        raise ConfigError("--system needs a chat template; this model has none, or it is off")
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty")
    return tuple(ids)


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """Token ids of a conversation, up to where the assistant's answer begins."""
    return tuple(encode(tokenizer, render(tokenizer, messages)))


def is_short(prompt: str, source: PromptSource, context: int) -> bool:
    """Whether ``check_length`` will hardly refuse the prompt, by its bytes: a token has one or
    more, and a chat template adds little.
    """
    given = len(prompt.encode()) + len((source.system or "").encode())
    return given + _TEMPLATE_ROOM < context


def check_length(prompt_tokens: int, context: int) -> None:
    """Raise ConfigError where no token could follow the prompt."""
    if prompt_tokens >= context:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, the context holds {context}; "
            "shorten it or raise --context"
        )


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError("no prompt: stdin is closed; give --prompt or --prompt-file")
    return decode_utf8(sys.stdin.buffer.read(), "stdin")
