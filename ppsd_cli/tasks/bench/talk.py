"""Conversations as token ids, by the model's chat template or as bare text."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ppsd_cli.assets.tokenizer import encode, render
from ppsd_cli.bench_records import Question
from ppsd_cli.tasks.bench.prompts import encode_without_tokenizer

Message = dict[str, str]


class Talk(Protocol):
    """Conversations as token ids, and answers as text."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Up to where the assistant's answer begins."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer."""


@dataclass(frozen=True, slots=True)
class TokenizerTalk:
    """With the model's tokenizer; ``chat`` false, or no template: turns joined by empty lines."""

    tokenizer: Any
    chat: bool

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Up to where the assistant's answer begins."""
        if self.chat and getattr(self.tokenizer, "chat_template", None):
            return tuple(encode(self.tokenizer, render(self.tokenizer, messages)))
        text = "\n\n".join(message["content"] for message in messages)
        return tuple(self.tokenizer(text)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


@dataclass(frozen=True, slots=True)
class NumberTalk:
    """For random weights, which have no tokenizer: texts of about the right length in tokens."""

    vocabulary: int

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """All turns one after the other."""
        text = "".join(message["content"] for message in messages)
        return encode_without_tokenizer(text, self.vocabulary)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Four letters for each token, which is how many make a token again."""
        return "".join(f"{token % 10_000:04d}" for token in token_ids)


def user(text: str) -> Message:
    """What a user says."""
    return {"role": "user", "content": text}


def prompt_checksum(talk: Talk, questions: Iterable[Question]) -> str:
    """sha256 over the token ids of all turns in order, each asked alone.

    Known before anything is measured; a later turn's real prompt also holds an answer.
    """
    digest = hashlib.sha256()
    for question in questions:
        for turn in question.turns:
            ids = talk.encode([user(turn)])
            digest.update((",".join(map(str, ids)) + "\n").encode())
    return f"sha256:{digest.hexdigest()}"
