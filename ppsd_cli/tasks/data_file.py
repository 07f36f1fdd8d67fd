"""``--data FILE``: JSONL with ``messages``, ``prompt`` and ``completion``, or ``text``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd_cli.assets.tokenizer import encode, render
from ppsd_cli.errors import AssetError
from ppsd_cli.tasks.dataset import Sample


@dataclass(frozen=True, slots=True)
class DataFile:
    """Samples of a file, and how many of its lines were left out."""

    samples: list[Sample]
    skipped: int


def read_data(path: Path, tokenizer: Any, *, context: int, skip_bad: bool) -> DataFile:
    """Read ``path``. A bad line is an AssetError with its number, or is counted (``skip_bad``)."""
    samples, skipped = [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    sample = _sample(line, tokenizer).cut(context)
                    if not len(sample.positions()):
                        raise _BadLine(f"no answer within the first {context} tokens")
                    samples.append(sample)
                except (_BadLine, AssetError) as error:
                    if not skip_bad:
                        raise AssetError(
                            f"{path}, line {number}: {error}; mend it or give --skip-bad"
                        ) from error
                    skipped += 1
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    if not samples:
        raise AssetError(f"{path} has no usable line; see `ppsd train-head --help` for the formats")
    return DataFile(samples, skipped)


class _BadLine(Exception):
    """A line that is no training text."""


def _sample(line: bytes, tokenizer: Any) -> Sample:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise _BadLine("not JSON") from error
    if not isinstance(record, dict):
        raise _BadLine(f"must be an object, not {type(record).__name__}")
    if "messages" in record:
        return _conversation(_messages(record["messages"]), tokenizer)
    if "prompt" in record or "completion" in record:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        if not tokenizer.chat_template:
            return _join(
                [(_start(tokenizer) + encode(tokenizer, prompt), False)], tokenizer, completion
            )
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        return _conversation(turns, tokenizer)
    if "text" in record:
        return _join([(_start(tokenizer), False)], tokenizer, _text(record, "text"))
    raise _BadLine("has none of messages, prompt and completion, text")


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value:
        raise _BadLine(f"{name} must be text that is not empty")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _BadLine("messages must be a list that is not empty")
    for message in value:
        if not isinstance(message, dict):
            raise _BadLine("each message must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise _BadLine("each message needs a role (system, user, assistant) and text content")
    if all(message["role"] != "assistant" for message in value):
        raise _BadLine("messages has no assistant turn to learn from")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _conversation(messages: list[dict[str, str]], tokenizer: Any) -> Sample:
    """The rendered conversation; what the assistant says, with its end of turn, answers."""
    if not tokenizer.chat_template:
        raise _BadLine("messages need a chat template, which this model has not; use text")
    pieces: list[tuple[list[int], bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index])
        after = render(tokenizer, messages[: index + 1], ask=False)
        if not before.startswith(done) or not after.startswith(before):
            raise _BadLine("the chat template changes earlier turns of this conversation")
        pieces.append((encode(tokenizer, before[len(done) :]), False))
        pieces.append((encode(tokenizer, after[len(before) :]), True))
        done = after
    return _joined(pieces)


def _start(tokenizer: Any) -> list[int]:
    start = tokenizer.bos_token_id
    return [] if start is None else [start]


def _join(pieces: list[tuple[list[int], bool]], tokenizer: Any, answer: str) -> Sample:
    ids = encode(tokenizer, answer)
    end = tokenizer.eos_token_id
    return _joined([*pieces, (ids if end is None else [*ids, end], True)])


def _joined(pieces: list[tuple[list[int], bool]]) -> Sample:
    ids: list[int] = []
    spans = []
    for part, answers in pieces:
        if answers:
            spans.append((len(ids), len(ids) + len(part)))
        ids += part
    return Sample.of(ids, spans, greedy=False)
