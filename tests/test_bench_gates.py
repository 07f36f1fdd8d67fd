"""Thresholds, equal answers and baselines, from hand-made samples."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_samples import BURST, CHAIN, PLAIN, counts, difference, sample

from ppsd_cli.bench_records import BenchReport
from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.tasks.bench.baseline import (
    check_same,
    check_settings,
    missing,
    movements,
    read_baseline,
    slowdowns,
)
from ppsd_cli.tasks.bench.export import report_data, sample_data, sample_from
from ppsd_cli.tasks.bench.gates import (
    first_difference,
    identity_failures,
    parse_gate,
    threshold_failures,
)
from ppsd_cli.tasks.bench.report import Demands, judge, make_rows

CHECKSUM = "sha256:" + "0" * 64


def rows_of(samples, contenders=(PLAIN, CHAIN, BURST)):
    return make_rows(contenders, samples, ideal={}, memory={}, seed=0)


def run(speed=1.0, first=0.1):
    """Twelve questions of different speed; ppsd is a bit faster than ar."""
    found = []
    for i in range(12):
        rate = speed * (20 + i) * (1 + 0.01 * ((7 * i) % 5))
        found.append(sample(i, "ar", rate, first_token_seconds=first))
        found.append(sample(i, "ppsd", 1.2 * rate, counts=counts(), first_token_seconds=first))
    return found


# Thresholds


@pytest.mark.parametrize(
    ("gate", "fails"),
    [
        ("speedup=1.1", False),
        ("speedup=1.3", True),
        ("acceptance=0.6", False),
        ("acceptance=0.7", True),
        ("tokens_per_second=20", False),
        ("tokens_per_second=1000", True),
        ("tokens_per_tick=1.05", False),
        ("tokens_per_tick=1.2", True),
        ("identical=1", False),
        ("tokens_per_second@ar=20", False),
        ("speedup@ar=1.01", True),
    ],
)
def test_threshold(gate, fails):
    failures = threshold_failures(rows_of(run()), [parse_gate(gate)])
    assert bool(failures) == fails


def test_all_failures_are_reported():
    gates = [parse_gate(text) for text in ("speedup=9", "acceptance=0.1", "identical=1.5")]
    failures = threshold_failures(rows_of(run()), gates)
    assert [failure.gate for failure in failures] == ["speedup@ppsd=9", "identical@ppsd=1.5"]
    assert "speedup of ppsd is 1.2, below 9" in failures[0].message


def test_missing_data_fails():
    rows = rows_of(run(), (PLAIN, CHAIN))
    gates = [parse_gate(text) for text in ("speedup@eesd=0", "acceptance@ar=0")]
    first, second = threshold_failures(rows, gates)
    assert "eesd was not run" in first.message
    assert "ar has no acceptance" in second.message


def test_a_decoders_name_means_its_printed_row():
    samples = [*run(), *(sample(i, "eesd-4", 10) for i in range(12))]
    assert threshold_failures(rows_of(samples), [parse_gate("speedup@eesd=0.9")])
    assert not threshold_failures(rows_of(samples), [parse_gate("speedup@eesd-4=0.1")])


@pytest.mark.parametrize(
    "text", ["speedup", "speed=1", "speedup=fast", "speedup=-1", "speedup=nan"]
)
def test_bad_thresholds(text):
    with pytest.raises(ConfigError, match="--fail-under"):
        parse_gate(text)


# Equal answers


@pytest.mark.parametrize(
    ("contender", "differs", "fails"),
    [
        ("ppsd", difference(0.0), True),
        ("ppsd", difference(0.05, same_threads_equal=True), False),
        ("ppsd", difference(0.5, same_threads_equal=True), True),
        ("eesd-4", difference(0.05), False),
        ("eesd-4", difference(0.1), False),
        ("eesd-4", difference(0.11), True),
        ("eesd-4", difference(None), True),
    ],
)
def test_which_differences_fail(contender, differs, fails):
    samples = [
        *run(),
        sample(3, "eesd-4", 10),
        replace(sample(5, contender, 9), difference=differs),
    ]
    failures = identity_failures(rows_of(samples), samples)
    assert bool(failures) == fails
    if fails:
        (failure,) = failures
        assert failure.gate == f"identical@{contender}"
        assert "question 5, turn 1, token 3" in failure.message


def test_an_answer_cut_off_by_the_context_may_be_shorter():
    short = sample(1, "eesd-4", 9, finish_reason="context", difference=difference(None))
    both = [sample(1, "ar", 9, finish_reason="context"), short]
    assert not identity_failures(rows_of(both), both)
    again = [both[0], replace(short, key=replace(short.key, repetition=2))]
    assert not identity_failures(rows_of(again), again)


@pytest.mark.parametrize(("context", "fails"), [(None, True), (17, True), (16, False)])
def test_a_context_that_only_the_contender_finds_full_fails(context, fails):
    """AR's answer ended for its length: five tokens of prompt and eleven of answer."""
    short = sample(1, "eesd-4", 9, finish_reason="context", difference=difference(None))
    samples = [sample(1, "ar", 9), short]
    assert bool(identity_failures(rows_of(samples), samples, context=context)) == fails


@pytest.mark.parametrize(
    ("expected", "found", "index"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (1, 3), 1),
        ((1, 2), (1,), 1),
        ((1,), (1, 2), 1),
        ((), (), None),
    ],
)
def test_first_difference(expected, found, index):
    assert first_difference(expected, found) == index


# Baselines


def verdicts(old, new):
    return {(m.contender, m.figure): m.verdict for m in movements(old, new, seed=0)}


def test_the_same_run_has_not_moved():
    assert set(verdicts(run(), run()).values()) == {"same"}
    assert slowdowns(movements(run(), run(), seed=0)) == []


def test_a_slower_run_is_caught():
    moves = movements(run(), run(speed=0.9), seed=0)
    failures = slowdowns(moves)
    assert {f.gate for f in failures} == {
        "baseline:tokens_per_second@ar",
        "baseline:tokens_per_second@ppsd",
    }
    assert "0.900 times" in failures[0].message
    assert verdicts(run(), run(speed=0.9))["ppsd", "speedup"] == "same"


def test_a_faster_run_is_no_failure():
    assert verdicts(run(), run(speed=1.2))["ppsd", "tokens_per_second"] == "faster"
    assert slowdowns(movements(run(), run(speed=1.2), seed=0)) == []


def test_a_later_first_token_is_caught():
    found = verdicts(run(), run(first=0.2))
    assert found["ppsd", "first_token_seconds"] == "slower"
    assert verdicts(run(), run(first=0.05))["ppsd", "first_token_seconds"] == "faster"
    assert slowdowns(movements(run(), run(first=0.2), seed=0))


def test_what_the_intervals_include_is_noise():
    """The median fell by a tenth, but so that as many questions got faster."""
    old = [sample(i, "ppsd", 10) for i in range(12)]
    new = [sample(i, "ppsd", 9 if i % 2 else 11) for i in range(12)]
    assert verdicts(old, new)["ppsd", "tokens_per_second"] == "same"


def test_less_than_three_percent_is_noise_however_certain():
    assert set(verdicts(run(), run(speed=0.98)).values()) == {"same"}
    assert verdicts(run(), run(speed=0.96))["ar", "tokens_per_second"] == "slower"


def test_contenders_of_one_run_only_are_left_out():
    old = [s for s in run() if s.contender == "ar"]
    assert {name for name, _ in verdicts(old, run())} == {"ar"}


def test_contenders_that_are_gone_fail():
    new = [s for s in run() if s.contender == "ar"]
    (failure,) = missing(run(), new)
    assert failure.gate == "baseline:missing@ppsd"
    assert missing(new, run()) == []


def burst_run(*names):
    return [*run(), *(sample(i, name, 10 + i) for i in range(12) for name in names)]


def test_eesd_of_another_draft_length_is_compared():
    old, new = burst_run("eesd-4", "eesd-4@0.5"), burst_run("eesd-2", "eesd-6@0.5")
    found = verdicts(old, new)
    assert found["eesd-2", "tokens_per_second"] == found["eesd-6@0.5", "speedup"] == "same"
    assert missing(old, new) == []


def test_eesd_of_another_head_is_another_contender():
    old, new = burst_run("eesd-4", "eesd-4 block"), burst_run("eesd-4")
    assert [f.gate for f in missing(old, new)] == ["baseline:missing@eesd-4 block"]


def test_a_report_fails_for_what_is_gone(written):
    samples = tuple(s for s in run() if s.contender == "ar")
    report = BenchReport(
        1, (), CHECKSUM, "tiny", "sha256:aa", (), (), rows_of(samples, (PLAIN,)), samples, (), False
    )
    judged = judge(report, Demands(baseline=read_baseline(written)), seed=0)
    assert [f.gate for f in judged.failures] == ["baseline:missing@ppsd"]


def test_a_baseline_that_was_stopped_is_noted(written):
    old = read_baseline(written)
    notes = check_settings(replace(old, incomplete=True), old.settings, old.environment)
    assert notes == ["baseline: that run was stopped, so only what it measured is compared"]
    written.write_text(written.read_text().replace('"incomplete": false', '"incomplete": true'))
    assert read_baseline(written).incomplete


@pytest.fixture
def written(tmp_path) -> Path:
    samples = run()
    report = BenchReport(
        schema_version=1,
        tasks=(),
        prompt_checksum=CHECKSUM,
        model="tiny",
        model_hash="sha256:aa",
        environment=(("cpu", "Z80"), ("kernel", "1")),
        settings=(("max_new_tokens", "16"), ("ignore_eos", "false"), ("split", "2,2")),
        rows=rows_of(samples),
        samples=tuple(samples),
        failures=(),
        incomplete=False,
    )
    path = tmp_path / "old.json"
    path.write_text(json.dumps(report_data(report)))
    return path


def test_samples_survive_json():
    whole = sample(1, "ppsd", 7, counts=counts(), difference=difference(0.2))
    for each in (whole, sample(2, "hf", 3)):
        assert sample_from(json.loads(json.dumps(sample_data(each)))) == each


def test_read_baseline(written):
    assert read_baseline(written).samples == tuple(run())


@pytest.mark.parametrize(
    ("model", "tasks", "checksum", "says"),
    [
        (("other", "sha256:bb"), (), CHECKSUM, ("tiny", "other")),
        (("tiny", "sha256:aa"), ("smoke",), CHECKSUM, ("smoke",)),
        (("tiny", "sha256:aa"), (), "sha256:" + "1" * 64, ("sha256:00", "sha256:11")),
    ],
)
def test_a_baseline_of_something_else(written, model, tasks, checksum, says):
    with pytest.raises(ConfigError) as error:
        check_same(read_baseline(written), model=model, tasks=tasks, checksum=checksum)
    for part in says:
        assert part in str(error.value)


def test_other_machines_are_noted_and_other_lengths_refused(written):
    old = read_baseline(written)
    settings = {"max_new_tokens": "16", "ignore_eos": "false", "split": "1,3"}
    notes = check_settings(old, settings, {"cpu": "6502", "kernel": "2"})
    assert notes == [
        "baseline: split was 2,2, in this run 1,3",
        "baseline: cpu was Z80, in this run 6502",
    ]
    with pytest.raises(ConfigError, match="max_new_tokens was 16, in this run 32"):
        check_settings(old, {**settings, "max_new_tokens": "32"}, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 2, "samples": []}',
        '{"schema_version": 1, "samples": [1]}',
    ],
)
def test_a_baseline_that_is_none(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(AssetError, match=r"bad\.json"):
        read_baseline(path)


def test_a_baseline_that_is_not_there(tmp_path):
    with pytest.raises(AssetError, match="none"):
        read_baseline(tmp_path / "none.json")
