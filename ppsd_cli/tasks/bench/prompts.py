"""Questions of a benchmark: from a known task, or from the user's own file."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ppsd_cli.assets import offline_by_environment
from ppsd_cli.bench_records import Question, TaskInfo
from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.tasks.bench.catalog import find_task, measured

Progress = Callable[[str], None]
OWN_CATEGORY = "prompts"
_JSON_LINES = (".jsonl", ".ndjson")


def load_task(
    name: str, *, offline: bool = False, progress: Progress | None = None
) -> tuple[TaskInfo, tuple[Question, ...]]:
    """A known task with all its questions, in the order of its file; fetched on first use.

    ConfigError for an unknown name; AssetError when the file cannot be had (``offline`` and
    HF_HUB_OFFLINE forbid downloads) or is not the expected one.
    """
    task = find_task(name)
    path = task.fetch(offline=offline or offline_by_environment(), progress=progress)
    data = _read(path)
    text = _decode(gzip.decompress(data) if path.suffix == ".gz" else data, str(path))
    records = (
        (number, task.read(record, index))
        for index, (number, record) in enumerate(_objects(text, str(path)))
    )
    questions = _questions(records, str(path))
    assert len(questions) == task.info.questions
    return measured(task.info, path), questions


def load_prompt_file(path: Path) -> tuple[TaskInfo, tuple[Question, ...]]:
    """The user's own prompts: JSON lines, or plain text with one prompt a line.

    A JSON line has ``turns`` (a list of texts) or ``prompt`` (one text), and may have
    ``question_id`` and ``category``. A file is read as JSON lines when it is called ``.jsonl`` or
    its first line begins with ``{``, unless it is called ``.txt``. AssetError, with the line's
    number or the byte's offset, for anything else; also for a file without a prompt. The record
    has the file's name and checksum but not its folder, which is nobody else's business.
    """
    where = str(path)
    data = _read(path)
    text = _decode(data, where)
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES or (suffix != ".txt" and text.lstrip().startswith("{")):
        questions = _questions(_objects(text, where), where)
    else:
        questions = tuple(
            Question(str(number), OWN_CATEGORY, (line,)) for number, line in _lines(text)
        )
    if not questions:
        raise AssetError(f"{where} holds no prompt; write one a line")
    digest = hashlib.sha256(data).hexdigest()
    info = TaskInfo(
        name=path.name,
        about="prompts of your own",
        source=f"{path.name} (sha256 {digest[:16]})",
        licence="not known",
        questions=len(questions),
        size=len(data),
        sha256=digest,
    )
    return info, questions


def spread(questions: Sequence[Question], limit: int | None) -> tuple[Question, ...]:
    """``limit`` of the questions, taken evenly over the categories, in their own order.

    The first of every category comes first, then the second of every category, and so on; so a
    larger limit only adds. None: all of them. ConfigError for a limit below 1.
    """
    if limit is None:
        return tuple(questions)
    if limit < 1:
        raise ConfigError(f"--limit {limit}: must be 1 or more")
    met: dict[str, int] = {}
    ranks = []
    for index, question in enumerate(questions):
        rank = met.get(question.category, 0)
        met[question.category] = rank + 1
        ranks.append((rank, index))
    chosen = sorted(index for _, index in sorted(ranks)[:limit])
    return tuple(questions[index] for index in chosen)


def encode_without_tokenizer(text: str, vocabulary: int) -> tuple[int, ...]:
    """Token ids for a model that has no tokenizer: one for each 4 bytes of the UTF-8 text.

    About as many as a tokenizer would give; the same bytes give the same id, from 0 to
    ``vocabulary`` - 1.
    """
    data = text.encode()
    return tuple(zlib.crc32(data[at : at + 4]) % vocabulary for at in range(0, len(data), 4))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise AssetError(f"no prompts at {path}; check the path") from error
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise AssetError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines that say something, with their numbers from 1. Only line feeds end a line."""
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def _objects(text: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    """The JSON object of each line, with the line's number."""
    records = []
    for number, line in _lines(text):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            at_fault = error.msg if isinstance(error, json.JSONDecodeError) else None
            reason = at_fault or "nested too deep, or a number too long"
            raise AssetError(f"{where}, line {number}: not JSON ({reason})") from error
        if not isinstance(record, dict):
            raise AssetError(
                f"{where}, line {number}: expected an object with 'turns' or 'prompt', "
                f"not {type(record).__name__}"
            )
        records.append((number, record))
    return records


def _questions(records: Iterable[tuple[int, dict[str, Any]]], where: str) -> tuple[Question, ...]:
    """Questions of (line number, record); AssetError names the line of a bad or repeated one."""
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, record in records:
        try:
            question = _question(record, number)
        except ValueError as error:
            raise AssetError(f"{where}, line {number}: {error}") from error
        first = lines.setdefault(question.question_id, number)
        if first != number:
            raise AssetError(
                f"{where}, line {number}: question_id {question.question_id!r} is also that of "
                f"line {first}; give each its own"
            )
        questions.append(question)
    return tuple(questions)


def _question(record: dict[str, Any], number: int) -> Question:
    """One question; ValueError says what is wrong with it. The id defaults to the line number."""
    if ("turns" in record) == ("prompt" in record):
        raise ValueError("give 'turns' (a list of texts) or 'prompt' (one text)")
    turns = record["turns"] if "turns" in record else [record["prompt"]]
    if not isinstance(turns, list) or not turns:
        raise ValueError("'turns' must be a list of at least one text")
    identity = record.get("question_id", number)
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise ValueError(f"'question_id' must be a number or text, not {identity!r}")
    category = record.get("category", OWN_CATEGORY)
    if not isinstance(category, str):
        raise ValueError(f"'category' must be text, not {category!r}")
    texts = tuple(_text(turn) for turn in turns)
    return Question(_text(str(identity)), _text(category), texts)


def _text(value: Any) -> str:
    """``value`` if it is text that can be encoded and says something."""
    if not isinstance(value, str):
        raise ValueError(f"a prompt must be text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError("a prompt, id or category is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character pair (a lone surrogate)") from error
    return value
