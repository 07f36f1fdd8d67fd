"""``ppsd bench`` as a user runs it, on a tiny model."""

import json
import os
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from cli_model import LAYERS, Ppsd, save_cli_model

import ppsd_cli
from ppsd_cli.assets import resolve_model
from ppsd_cli.commands import bench_setup
from ppsd_cli.errors import StageError
from ppsd_cli.model.head_files import HeadInfo, write_head
from ppsd_cli.model.heads import DeepWeights, HeadWeights, Tap
from ppsd_cli.model.load import Loader
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.stage import Output
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.runtime import front, worker
from ppsd_cli.runtime.engine import open_engine
from ppsd_cli.tasks.bench import contenders, decoders, measure, pool, rounding, trials
from ppsd_cli.tasks.bench.decoders import EngineDecoder
from ppsd_cli.tasks.bench.faults import memory_errors
from ppsd_cli.tasks.bench.journal import Journal
from ppsd_cli.tasks.bench.measure import Measurement
from ppsd_cli.tasks.bench.memory import GpuMeter
from ppsd_cli.tasks.bench.reference import TransformersDecoder

SCHEMA = json.loads((Path(ppsd_cli.__file__).parent / "data" / "schema" / "bench.json").read_text())
SHAPE = ("--split", "3,3", "--devices", "cpu")
ANSWERS = 3  # turns in the prompts


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("bench-model"))


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records = [
        {"question_id": 1, "category": "talk", "turns": ["hello world", "how are you?"]},
        {"question_id": 2, "category": "tale", "turns": ["the quick brown fox"]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class Bench(Ppsd):
    """Runs ``ppsd bench`` with the prompts, in this process."""

    prompts: Path

    def bench(self, *args: str, tokens: int = 12):
        """The command on the tiny model; the result."""
        fixed = ("--prompts", str(self.prompts), "-m", self.model, "-n", str(tokens), "--offline")
        return self.run("bench", *fixed, *SHAPE, *args)

    def data(self, *args: str, **options):
        """What ``--json`` says."""
        result = self.bench("--json", *args, **options)
        assert result.code == 0, result.err
        data = json.loads(result.out)
        jsonschema.validate(data, SCHEMA)
        return data


@pytest.fixture
def bench(capsys, monkeypatch, model, prompts, tmp_path) -> Bench:
    """All engines in this process: quicker to start, and within reach of faults."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    monkeypatch.setattr(
        pool, "open_engine", lambda config, **_processes: open_engine(config, processes=False)
    )
    for module in (measure, trials):  # one thread: nothing to wait for between answers
        monkeypatch.setattr(module, "settle", lambda: None)
    runner = Bench(capsys, monkeypatch, model)
    runner.prompts = prompts
    return runner


# A whole run


def test_json_of_a_whole_run(bench):
    data = bench.data(
        "--decoders", "ppsd,naive-split,eesd,hf,hf-early-exit", "--acceptance", "0.5,1",
        "--draft-length", "3",
    )  # fmt: skip
    assert next(iter(data)) == "schema_version"
    names = ["ar", "ppsd", "naive-split", "eesd-3", "hf", "hf-early-exit"]
    names += ["ppsd@0.5", "eesd-3@0.5", "ppsd@1", "eesd-3@1"]
    assert list(data["decoders"]) == names
    assert Counter(s["contender"] for s in data["samples"]) == dict.fromkeys(names, ANSWERS)
    for name, figures in data["decoders"].items():
        assert figures["identical"] == figures["answers"] == ANSWERS, name
        assert figures["speedup"]["low"] <= figures["speedup"]["high"]
        assert set(figures["categories"]) == {"talk", "tale"}
    assert data["decoders"]["ar"]["speedup"] == {"median": 1, "low": 1, "high": 1}
    assert data["decoders"]["ppsd@1"]["acceptance_rate"] == 1
    assert data["decoders"]["ppsd@1"]["ideal_speedup"] == 2
    assert 0.2 < data["decoders"]["ppsd@0.5"]["acceptance_rate"] < 0.8
    assert data["environment"]["torch"]
    assert data["settings"]["max_new_tokens"] == "12"
    assert not data["incomplete"]


def test_prompts_are_the_same_for_all_and_later_turns_hold_the_answer(bench, model):
    from transformers import AutoTokenizer

    data = bench.data("--decoders", "ppsd,hf")
    lengths = {}
    for sample in data["samples"]:
        key = sample["question_id"], sample["turn"]
        assert lengths.setdefault(key, sample["prompt_tokens"]) == sample["prompt_tokens"]
    first = next(s for s in data["samples"] if (s["question_id"], s["turn"]) == ("1", 1))
    tokenizer = AutoTokenizer.from_pretrained(model)
    talk = [
        {"role": "user", "content": "hello world"},
        {"role": "assistant", "content": tokenizer.decode(first["token_ids"])},
        {"role": "user", "content": "how are you?"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert lengths["1", 2] == len(tokenizer(text)["input_ids"])


def test_answers_are_those_of_generate(bench):
    data = bench.data()
    generated = bench.generate("-p", "the quick brown fox", "-n", "12", "--json", *SHAPE)
    expected = json.loads(generated.out)["token_ids"]
    found = [s["token_ids"] for s in data["samples"] if s["question_id"] == "2"]
    assert found == [expected, expected]


def test_stage_processes_and_their_memory(bench, monkeypatch):
    monkeypatch.setattr(pool, "open_engine", open_engine)
    data = bench.data("--devices", "cpu,cpu", "--limit", "1")
    assert list(data["decoders"]) == ["ar", "ppsd", "naive-split"]
    for figures in data["decoders"].values():
        assert figures["identical"] == figures["answers"]
        assert figures["peak_memory"] > 50 << 20
    assert data["decoders"]["naive-split"]["tokens_per_tick"] < 0.7


class Allocator:
    """The GPU's memory as torch counts it, in bytes."""

    def __init__(self, patch) -> None:
        self.used, self.highest = 1000, 1000  # something else is there
        patch.setattr(torch.cuda, "memory_allocated", lambda _device: self.used)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _device: self.highest)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, _device) -> None:
        self.highest = self.used

    def take(self, stays: int, passing: int) -> None:
        """Bytes that stay, and bytes that are needed for a while beside them."""
        self.used += stays
        self.highest = max(self.highest, self.used + passing)


@pytest.mark.parametrize(("loading", "peak"), [(300, 800), (30, 500 + 70 + 40)])
def test_gpu_memory_counts_from_before_loading(bench, monkeypatch, loading, peak):
    """Graphs and buffers that the first answer makes stay, and are the contender's."""
    gpu, warm = Allocator(monkeypatch), []
    right_load, right_answer = pool.open_engine, EngineDecoder.answer

    def load(config, **options):
        gpu.take(500, loading)
        return right_load(config, **options)

    def answer(self, prompt, limits, forced=None):
        first = self.engine.runner not in warm
        warm.append(self.engine.runner)
        gpu.take(70 if first else 0, 40 if first else 20)
        return right_answer(self, prompt, limits, forced)

    monkeypatch.setattr(pool, "open_engine", load)
    monkeypatch.setattr(EngineDecoder, "answer", answer)
    monkeypatch.setattr(pool, "GpuMeter", lambda _devices: GpuMeter(["cuda:0"]))
    figures = bench.data("--limit", "1", tokens=4)["decoders"]
    assert {name: each["peak_memory"] for name, each in figures.items()} == {
        "ar": peak,
        "ppsd": peak,
    }


def test_both_heads_of_eesd_stay_in_the_json(bench, tmp_path, model):
    save_random_head(model, tmp_path / "deep", (3, 6))
    save_random_head(model, tmp_path / "block", (3,))
    profile = tmp_path / "two.yaml"
    profile.write_text(f"name: two\nmodel: {bench.model}\nheads: [deep, block]\n")
    page = tmp_path / "page.html"
    args = ("--profile", str(profile), "--decoders", "eesd", "--report", str(page))
    data = bench.data(*args, "--draft-length", "2")
    assert data["decoders"]["eesd-2"]["head"] == "deep"
    assert data["decoders"]["eesd-2 block"]["head"] == "block"
    printed = [each["printed"] for each in data["decoders"].values()]
    assert printed[0]
    assert sorted(printed[1:]) == [False, True]
    for text in (json.dumps(data), page.read_text()):
        assert "prompts.jsonl" in text
        for folder in (tmp_path, model, Path.home()):
            assert f"{folder}/" not in text, "folders of this machine are no part of a report"


def save_random_head(model: Path, folder: Path, depths: tuple[int, ...]) -> None:
    """A head of the model's last layer, with deeper states where there are several depths."""
    loader = Loader(Checkpoint(model), read_spec(model), torch.float32, torch.device("cpu"))
    spec, lags = loader.spec, len(depths) - 1
    taps = tuple(Tap(depth, lag) for lag, depth in enumerate(depths))
    deep = None
    if lags:
        kv = torch.zeros(lags, spec.hidden, 2 * spec.kv_heads * spec.head_dim)
        fuse = torch.zeros(lags, spec.hidden, spec.hidden)
        deep = DeepWeights(norms=torch.ones(lags, spec.hidden), kv=kv, fuse=fuse)
    output = Output(torch.ones(spec.hidden), loader.lm_matrix(), spec.rms_eps)
    info = HeadInfo(
        kind="deep" if lags else "block",
        model_hash=resolve_model(str(model)).model_hash,
        model_name="tiny",
        hidden=spec.hidden,
        taps=taps,
        blocks=1,
        draft_vocabulary=None,
        stages=2,
        training={},
    )
    write_head(folder, info, HeadWeights(taps, output, (loader.layer(LAYERS - 1),), deep=deep))


def test_repetitions_repeat_and_rotate(bench):
    data = bench.data("-r", "2", "--decoders", "ppsd,naive-split")
    assert {s["repetition"] for s in data["samples"]} == {1, 2}
    assert len(data["samples"]) == 2 * 3 * ANSWERS


def test_ignore_eos(bench):
    data = bench.data("--ignore-eos")
    assert {len(s["token_ids"]) for s in data["samples"]} == {12}


def test_random_weights(bench):
    result = bench.run(
        "bench", "--prompts", str(bench.prompts), "--random-weights", "tiny", "-n", "6",
        "--devices", "cpu", "--acceptance", "0.8", "--json",
    )  # fmt: skip
    data = json.loads(result.out)
    jsonschema.validate(data, SCHEMA)
    assert list(data["decoders"]) == ["ar", "ppsd@0.8"]  # the head's own guesses are worthless
    assert data["decoders"]["ppsd@0.8"]["identical"] == ANSWERS
    assert data["decoders"]["ppsd@0.8"]["acceptance_rate"] > 0
    hf = bench.run(
        "bench", "--prompts", str(bench.prompts), "--random-weights", "tiny", "-n", "6",
        "--devices", "cpu", "--decoders", "ppsd,hf", "--json",
    )  # fmt: skip
    assert json.loads(hf.out)["skipped"] == {"hf": "transformers cannot load random weights"}


# Formats


def test_formats_and_files(bench, tmp_path):
    table = bench.bench()
    assert table.code == 0
    assert "naive-split" not in table.out
    assert "speed-up" in table.out
    page, written = tmp_path / "page.html", tmp_path / "out.md"
    result = bench.bench(
        "--format", "markdown", "-o", str(written), "--report", str(page), "--quiet"
    )
    assert (result.code, result.out, result.err) == (0, "", "")
    assert "| ppsd |" in written.read_text()
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    rows = bench.bench("--format", "csv").out.splitlines()
    assert any("ppsd" in row for row in rows)


def test_the_list_of_tasks(bench):
    result = bench.run("bench", "--list")
    assert result.code == 0
    for name in ("smoke", "mt-bench", "humaneval", "gsm8k", "spec-bench"):
        assert name in result.out


# Gates


def test_thresholds_both_ways(bench):
    args = ("--fail-under", "identical=1", "--fail-under")
    assert bench.bench(*args, "speedup=0.0001").code == 0
    failed = bench.bench(*args, "speedup=1000", "--fail-under", "acceptance@ar=0", "--json")
    assert failed.code == 6
    assert "speedup of ppsd is" in failed.err
    assert "ar has no acceptance" in failed.err
    failures = json.loads(failed.out)["failures"]
    assert {failure["gate"] for failure in failures} == {"speedup@ppsd=1000", "acceptance@ar=0"}


def test_a_chain_that_changes_one_token_fails(bench, monkeypatch):
    """The fault is in drafting answers only, at one position of one prompt."""
    right = worker.StageWorker._targets

    def targets(self, hidden, position):
        (token,), logits = right(self, hidden, position)
        request = self._request
        wrong = request.drafting and position == request.prompt_tokens + 4
        return (token + 1 if wrong else token,), logits

    monkeypatch.setattr(worker.StageWorker, "_targets", targets)
    result = bench.bench("--json")
    assert result.code == 6
    assert "must be equal" in result.err
    data = json.loads(result.out)
    jsonschema.validate(data, SCHEMA)
    assert data["failures"][0]["gate"] == "identical@ppsd"
    wrong = [s["difference"] for s in data["samples"] if s["contender"] == "ppsd"]
    assert [each["index"] for each in wrong] == [4] * ANSWERS
    assert all(each["logit_gap"] > 0 for each in wrong)


def test_another_decoder_may_differ_by_rounding_only(bench, monkeypatch):
    right = TransformersDecoder.answer

    def answer(self, prompt, limits, forced=None):
        found = right(self, prompt, limits, forced)
        ids = found.token_ids
        return replace(found, token_ids=(*ids[:3], 7 if ids[3] != 7 else 8, *ids[4:]))

    monkeypatch.setattr(TransformersDecoder, "answer", answer)
    result = bench.bench("--decoders", "hf", "--json")
    assert result.code == 6
    assert "beyond rounding" in result.err
    data = json.loads(result.out)
    for sample in data["samples"]:
        if sample["contender"] == "hf":
            found = sample["difference"]
            assert found["index"] == 3
            assert found["logit_gap"] > found["tolerance"] > 0


def test_drafts_of_a_decoder_that_rounds_otherwise_come_from_its_own_answer(bench, monkeypatch):
    """EESD's text may leave plain decoding's; then drafts from that text would all be wrong."""
    right, drafts = EngineDecoder.answer, {"eesd": [], "ppsd": []}

    def answer(self, prompt, limits, forced=None):
        if forced is not None:
            drafts["eesd" if self.draft_length else "ppsd"].append(forced)
        found = right(self, prompt, limits)
        ids = found.token_ids
        return replace(found, token_ids=(*ids[:3], ids[3] ^ 1)) if self.draft_length else found

    monkeypatch.setattr(EngineDecoder, "answer", answer)
    options = ["--decoders", "ppsd,eesd", "--draft-length", "2", "--acceptance", "1", "--json"]
    samples = json.loads(bench.bench(*options).out)["samples"]
    answers = {name: [s["token_ids"] for s in samples if s["contender"] == name] for name in
               ("ar", "eesd-2")}  # fmt: skip
    assert answers["ar"] != answers["eesd-2"]
    assert [list(each) for each in drafts["ppsd"]] == answers["ar"]
    assert [list(each) for each in drafts["eesd"]] == answers["eesd-2"]


def test_rounding_is_measured_where_it_is_larger_than_stated():
    logits = torch.tensor([3.0, 2.5, 0.5, 0.5])
    noisy = logits + torch.tensor([0.3, -0.3, 0.3, -0.3])
    stated = rounding.rounding_tolerance(logits, logits, (0, 1), "bfloat16")
    assert stated == pytest.approx(0.09)
    assert rounding.rounding_tolerance(logits, noisy, (0, 1), "bfloat16") == pytest.approx(2.4)
    assert rounding.rounding_tolerance(logits / 9, logits / 9, (0, 1), "float32") == 1e-3


@pytest.mark.parametrize(("tolerance", "code"), [(1e-3, 6), (1e3, 0)])
def test_another_thread_count_is_judged_by_rounding(bench, monkeypatch, tolerance, code):
    """One thread rounds so that a token changes, in plain decoding over the pipeline too."""
    right = worker.StageWorker._targets

    def targets(self, hidden, position):
        (token,), logits = right(self, hidden, position)
        here = torch.get_num_threads() == 1 and position == self._request.prompt_tokens + 4
        return (token + 1 if here else token,), logits

    monkeypatch.setattr(worker.StageWorker, "_targets", targets)
    monkeypatch.setattr(bench_setup, "_thread_counts", lambda *_: (2,))
    monkeypatch.setitem(rounding.RELATIVE_TOLERANCE, "float32", tolerance)
    try:
        result = bench.bench("--json")
    finally:
        torch.set_num_threads(1)
    assert result.code == code, result.err
    data = json.loads(result.out)
    assert data["settings"]["ar_threads"] == "2"
    found = [s["difference"] for s in data["samples"] if s["contender"] == "ppsd"]
    assert all(each["same_threads_equal"] for each in found)


class Clock:
    """A clock that every reading moves on, a bit unevenly; ``wait`` moves it too."""

    def __init__(self, seed: int) -> None:
        self._random, self.now = random.Random(seed), 0.0

    def __call__(self) -> float:
        self.wait(0.001 * self._random.uniform(0.98, 1.02))
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def run_by_clock(bench, monkeypatch, *args: str, seed: int, slower: float = 0.0):
    """A run whose times are those of a ``Clock``; each tick takes ``slower`` seconds more."""
    clock, right = Clock(seed), front.Front._feed

    def feed(self, *rest):
        clock.wait(slower)
        return right(self, *rest)

    with monkeypatch.context() as patch:
        for module in (front, worker, decoders):
            patch.setattr(module, "perf_counter", clock)
        patch.setattr(front.Front, "_feed", feed)
        return bench.bench("--json", *args, tokens=24)


def test_a_slowed_engine_is_caught_by_the_baseline(bench, monkeypatch, tmp_path):
    old = tmp_path / "old.json"
    assert run_by_clock(bench, monkeypatch, "-o", str(old), seed=1).code == 0
    equal = run_by_clock(bench, monkeypatch, "--baseline", str(old), seed=2)
    assert equal.code == 0, equal.err
    verdicts = {move["verdict"] for move in json.loads(equal.out)["baseline"]}
    assert verdicts == {"same"}
    slow = run_by_clock(bench, monkeypatch, "--baseline", str(old), seed=3, slower=0.001)
    assert slow.code == 6
    assert "ppsd got slower: tokens_per_second" in slow.err
    jsonschema.validate(json.loads(slow.out), SCHEMA)


def test_a_baseline_of_other_prompts_is_refused(bench, tmp_path):
    old = tmp_path / "old.json"
    assert bench.bench("--json", "-o", str(old)).code == 0
    result = bench.bench("--baseline", str(old), "--limit", "1")
    assert result.code == 2
    assert result.err.count("sha256:") == 2
    assert bench.bench("--baseline", str(old), tokens=8).code == 2


# Interruption


def interrupt_after(monkeypatch, samples: int, number: int) -> None:
    """Send ourselves a signal once that many samples are in the journal."""
    right = Journal.add

    def add(self, sample):
        right(self, sample)
        if len(self.samples) == samples:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Journal, "add", add)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_goes_on_where_it_was(bench, monkeypatch, tmp_path, number, code):
    journal = tmp_path / "journal.jsonl"
    resume = ("--resume", str(journal))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, number)
        result = bench.bench("--json", *resume)
    assert result.code == code
    assert f"--resume {journal}" in result.err
    partial = json.loads(result.out)
    jsonschema.validate(partial, SCHEMA)
    assert partial["incomplete"]
    assert len(partial["samples"]) == 2  # of the third nobody knows yet whether it is equal
    kept = journal.read_text().splitlines()
    data = bench.data(*resume)
    assert not data["incomplete"]
    assert len(data["samples"]) == 2 * ANSWERS
    lines = journal.read_text().splitlines()
    assert lines[: len(kept)] == kept
    entries = [json.loads(line) for line in lines]
    places = [
        (e["contender"], e["question_id"], e["turn"]) for e in entries if e["kind"] == "sample"
    ]
    assert len(places) == len(set(places)) == 2 * ANSWERS
    again = bench.data(*resume)
    assert again["samples"] == data["samples"]
    assert journal.read_text().splitlines() == lines


def test_an_interrupted_run_without_a_journal_has_one_nevertheless(bench, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, signal.SIGINT)
        result = bench.bench()
    assert result.code == 130
    (journal,) = (tmp_path / "cache" / "bench").glob("*.jsonl")
    assert f"--resume {journal}" in result.err
    assert "ppsd" in result.out
    assert bench.bench("--resume", str(journal)).code == 0


def test_a_run_that_is_stopped_before_its_first_answer_leaves_no_journal(
    bench, monkeypatch, tmp_path
):
    """In the warm-up, of a contender whose peak memory is known already."""

    def stop(_self):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pool.Loaded, "peak_memory", lambda _self: 1 << 20)
    monkeypatch.setattr(Measurement, "_warm_up", stop)
    result = bench.bench("--json")
    assert result.code == 130
    assert "--resume" not in result.err
    assert json.loads(result.out)["incomplete"]
    assert list((tmp_path / "cache").rglob("*.jsonl")) == []


def test_a_stage_that_fails_ends_the_run_but_keeps_its_answers(bench, monkeypatch, tmp_path):
    journal, right = tmp_path / "journal.jsonl", Journal.add

    def add(self, sample):
        right(self, sample)
        if len(self.samples) == 3:
            raise StageError("stage 1 was killed by signal 9")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        result = bench.bench("--json", "--resume", str(journal))
    assert result.code == 5
    assert "stage 1 was killed" in result.err
    assert f"--resume {journal}" in result.err
    assert json.loads(result.out)["incomplete"]
    assert len(bench.data("--resume", str(journal))["samples"]) == 2 * ANSWERS


class Full:
    """Raises torch's error for a full device, or another, from the nth call on."""

    def __init__(self, right, call: int, error: Exception) -> None:
        self.right, self.left, self.error = right, call, error

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left <= 0:
            raise self.error
        return self.right(*args, **options)


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried much.\nSee the manual")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(NO_MEMORY, 4, "not enough device memory"), (RuntimeError("bad\nworse"), 1, "failed: bad\n")],
)
def test_generate_that_fails_keeps_the_answers(bench, monkeypatch, tmp_path, error, code, says):
    journal = tmp_path / "journal.jsonl"
    args = ("--decoders", "hf", "--resume", str(journal))
    right = Journal.add

    def add(self, sample):
        right(self, sample)
        if len(self.samples) == 3:
            patch.setattr(TransformersDecoder, "_settings", Full(None, 1, error))

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        result = bench.bench("--json", *args)
    assert result.code == code, result.err
    assert says in result.err
    assert "worse" not in result.err
    assert f"--resume {journal}" in result.err
    data = json.loads(result.out)
    assert data["incomplete"]
    assert len(data["samples"]) >= 2
    assert len(bench.data(*args)["samples"]) == 2 * ANSWERS


def test_an_engine_without_memory_keeps_the_answers(bench, monkeypatch, tmp_path):
    resume = ("--resume", str(tmp_path / "journal.jsonl"))
    whole = bench.data(*resume)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "open_engine", Full(pool.open_engine, 2, NO_MEMORY))
        result = bench.bench("--json", *resume)
    assert result.code == 4, result.err
    assert "not enough device memory" in result.err
    data = json.loads(result.out)
    assert data["incomplete"]
    assert len(data["samples"]) == len(whole["samples"])
    assert bench.data(*resume)["samples"] == whole["samples"]


def test_contenders_that_do_not_fit_are_skipped(bench, monkeypatch):
    monkeypatch.setattr(pool, "load_transformers", out_of_memory)
    monkeypatch.setattr(bench_setup, "_thread_counts", lambda *_: (1,))
    right, loads = pool.open_engine, []

    def load(config, **options):
        loads.append(config)
        if len(loads) == 2:  # after plain decoding's
            raise NO_MEMORY
        return right(config, **options)

    monkeypatch.setattr(pool, "open_engine", load)
    data = bench.data("--decoders", "eesd,hf", "--acceptance", "1", "--draft-length", "2")
    assert list(data["decoders"]) == ["ar", "ppsd@1"]
    assert set(data["skipped"]) == {"eesd", "hf"}
    assert all("not enough device memory" in reason for reason in data["skipped"].values())


def out_of_memory(*_):
    with memory_errors("loading"):
        raise NO_MEMORY


def test_eesd_at_fixed_acceptance_runs_as_the_trial_found_best(bench, monkeypatch):
    monkeypatch.setattr(bench_setup, "_thread_counts", lambda *_: (1, 2))
    monkeypatch.setattr(contenders, "trial", lambda tried, _probe: [*range(1, len(tried) + 1)])
    try:
        found = bench.data("--decoders", "eesd", "--acceptance", "1", "--draft-length", "2")
    finally:
        torch.set_num_threads(1)
    free, forced = (found["decoders"][name] for name in ("eesd-2", "eesd-2@1"))
    for name in ("threads", "head", "split", "devices"):
        assert free[name] == forced[name]
    assert forced["threads"] == 2


def test_a_finished_run_leaves_no_journal_behind(bench, tmp_path):
    assert bench.bench().code == 0
    assert list((tmp_path / "cache").rglob("*.jsonl")) == []


def test_a_journal_of_other_settings_is_refused(bench, tmp_path):
    resume = ("--resume", str(tmp_path / "journal.jsonl"))
    assert bench.bench(*resume).code == 0
    result = bench.bench(*resume, tokens=8)
    assert result.code == 2
    assert "max_new_tokens = 12" in result.err
    assert "max_new_tokens = 8" in result.err


def test_a_journal_whose_last_line_was_cut_is_repaired(bench, tmp_path):
    journal = tmp_path / "journal.jsonl"
    assert bench.bench("--resume", str(journal)).code == 0
    text = journal.read_text()
    lines = text.splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:20])
    data = bench.data("--resume", str(journal))
    assert len(data["samples"]) == 2 * ANSWERS


@pytest.mark.parametrize("text", ["what is this?\n", "{}\n", '{"kind": "sample"}\n', "\xff\n"])
def test_a_journal_that_is_none(bench, tmp_path, text):
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(text.encode("latin-1"))
    result = bench.bench("--resume", str(journal))
    assert result.code == 3
    assert str(journal) in result.err


# Mistakes


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--decoders", "ppsd,magic"), 2, "--decoders magic"),
        (("--decoders", "ppsd,,ar"), 2, "between commas"),
        (("--acceptance", "0.5,2"), 2, "--acceptance 2"),
        (("--acceptance", "much"), 2, "--acceptance much"),
        (("--acceptance", "nan"), 2, "--acceptance nan"),
        (("--draft-length", "3"), 2, "--draft-length is for eesd"),
        (("--decoders", "eesd", "--draft-length", "0"), 2, "--draft-length 0"),
        (("--decoders", "eesd", "--draft-length", "65"), 2, "--draft-length 65"),
        (("--repetitions", "0"), 2, "--repetitions 0"),
        (("--seed", "-1"), 2, "--seed -1"),
        (("--limit", "0"), 2, "--limit 0"),
        (("--format", "yaml"), 2, "--format yaml"),
        (("--json", "--format", "csv"), 2, "disagree"),
        (("--fail-under", "speed=1"), 2, "--fail-under speed=1"),
        (("--baseline", "/no/such.json"), 3, "/no/such.json"),
        (("--output", "/no/such/out.json"), 3, "/no/such"),
        (("--report", "/no/such/page.html"), 3, "/no/such"),
        (("--output", "x", "--report", "x"), 2, "the same file"),
        (("--context", "3"), 2, "no prompt fits"),
        (("smoke",), 2, "not both"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(bench, args, code, says):
    result = bench.bench(*args)
    assert result.code == code, result.err
    assert says in result.err
    assert "Traceback" not in result.err
    assert "internal error" not in result.err
    assert result.out == ""


def test_no_task_and_unknown_task(bench):
    assert "no task" in bench.run("bench", "-m", bench.model).err
    result = bench.run("bench", "mt-bnech", "-m", bench.model)
    assert result.code in (2, 3)
    assert "mt-bench" in result.err


def test_prompts_beyond_the_context_are_left_out_and_named(bench, tmp_path):
    bench.prompts = tmp_path / "long.txt"
    bench.prompts.write_text("hello\n" + "a b c " * 100 + "\n")
    data = bench.data()
    assert {s["question_id"] for s in data["samples"]} == {"1"}
    assert any("beyond the context" in note for note in data["notes"])


def test_the_model_has_enough_layers_for_these_tests():
    assert LAYERS == 6
