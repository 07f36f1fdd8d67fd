"""Chat templates as token ids: the opening of a conversation and the glue between its turns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd_cli.assets.tokenizer import encode, render
from ppsd_cli.model.spec_reader import read_eos_ids

_MARKS = ("QUESTIONMARK", "ANSWERMARK", "NEXTMARK")


@dataclass(frozen=True, slots=True)
class ChatGlue:
    """Token ids between turns. ``to_answer`` and ``to_question`` begin with the id that ends the
    turn before. ``chat`` is False for a base model: ``opening`` then starts a document and both
    kinds of glue start another.
    """

    chat: bool
    opening: tuple[int, ...]
    to_answer: tuple[int, ...]
    to_question: tuple[int, ...]
    ends: tuple[int, ...]
    """Ids that end a turn when the model chooses them."""
    banned: tuple[int, ...]
    """Special ids that the model must not write."""


def read_glue(tokenizer: Any, folder: Path) -> ChatGlue:
    """The glue of a model's chat template, or that of plain documents without one."""
    ends = read_eos_ids(folder) or ((tokenizer.eos_token_id,) if _has_eos(tokenizer) else ())
    special = set(tokenizer.all_special_ids)
    parts = _template_parts(tokenizer)
    if parts is None:
        start = tokenizer.bos_token_id
        if start is None:
            start = ends[0] if ends else 0
        again = (start,)
        banned = tuple(sorted(special - set(ends)))
        return ChatGlue(False, again, again, again, tuple(ends), banned)
    opening, to_answer, to_question = (tuple(encode(tokenizer, part)) for part in parts)
    if to_answer[:1] and to_answer[0] in special:
        ends = tuple(dict.fromkeys((*ends, to_answer[0])))
    if ends and to_question[0] not in ends:
        to_question = (ends[0], *to_question)
    banned = tuple(sorted(special - set(ends)))
    return ChatGlue(True, opening, to_answer, to_question, ends, banned)


def _has_eos(tokenizer: Any) -> bool:
    return tokenizer.eos_token_id is not None


def _template_parts(tokenizer: Any) -> tuple[str, str, str] | None:
    """Text before the first question, between question and answer, and between answer and next
    question; None when there is no template that can be cut so."""
    if not tokenizer.chat_template:
        return None
    question, answer, following = _MARKS
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": following},
    ]
    first = render(tokenizer, turns[:1])
    whole = render(tokenizer, turns)
    if first.count(question) != 1 or answer not in whole or following not in whole:
        return None
    opening, to_answer = first.split(question)
    to_question = whole.split(answer)[-1].split(following)[0]
    parts = opening, to_answer, to_question
    return parts if all(parts) else None
