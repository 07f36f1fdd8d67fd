"""``ppsd calibrate`` as a user runs it, on a tiny model, and profiles that it wrote."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from cli_model import LAYERS, Ppsd, save_cli_model
from typer.testing import CliRunner

import ppsd_cli
from ppsd_cli.calibration_records import Checked, DeviceMemory
from ppsd_cli.cli import app
from ppsd_cli.commands import calibrate_run, follow_profile
from ppsd_cli.commands.calibrate_profile import (
    check_place,
    default_place,
    profile_text,
    read_calibration,
)
from ppsd_cli.commands.session import ModelChoice, make_plan
from ppsd_cli.config import Profile, Settings, read_profile
from ppsd_cli.errors import AssetError, ConfigError, ResourceError, StageError
from ppsd_cli.runtime import children, memory_plan
from ppsd_cli.tasks.calibrate import cpu_times, engine_times, probe, run, shared_cores
from ppsd_cli.tasks.calibrate.export import calibration_data
from ppsd_cli.ui.calibration_svg import curve_svg

SCHEMA = Path(ppsd_cli.__file__).parent / "data" / "schema" / "calibration.json"
QUICK = ("-n", "10", "--context", "96", "--offline", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("calibrated-model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "own.txt"
    path.write_text("hello world\nhow are you today?\n")
    return path


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    """No profile of the person who runs the tests; short windows."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    monkeypatch.delenv("PPSD_PROFILE", raising=False)
    for module, name, value in (
        (cpu_times, "WARM", 0.01), (cpu_times, "SECONDS", 0.02), (cpu_times, "ROUNDS", 1),
        (cpu_times, "WIDE_WARM", 0.01), (cpu_times, "WIDE_SECONDS", 0.02),
        (probe, "TOKENS", 12), (engine_times, "TOKENS", 8), (engine_times, "_WARM", 4),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def ppsd(capsys, monkeypatch, folder) -> Ppsd:
    return Ppsd(capsys, monkeypatch, folder)


@pytest.fixture(scope="module")
def whole(folder, prompts, tmp_path_factory):
    """One calibration over stage processes, through the command line: its profile and its JSON."""
    place = tmp_path_factory.mktemp("profiles") / "tiny.yaml"
    plot = place.with_suffix(".svg")
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (cpu_times, "WARM", 0.01), (cpu_times, "SECONDS", 0.02), (cpu_times, "ROUNDS", 1),
            (cpu_times, "WIDE_WARM", 0.01), (cpu_times, "WIDE_SECONDS", 0.02),
            (probe, "TOKENS", 12),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        patch.setenv("XDG_CONFIG_HOME", str(place.parent))
        done = CliRunner().invoke(
            app,
            ["calibrate", "-m", str(folder), "--prompts", str(prompts), "--devices", "cpu,cpu"]
            + ["-o", str(place), "--plot", str(plot), "--json", *QUICK],
            catch_exceptions=False,
        )
    assert done.exit_code == 0
    return place, json.loads(done.stdout)


def test_json_and_profile_of_a_whole_run(whole):
    place, data = whole
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    assert [each["layer"] for each in data["layers"]] == list(range(1, LAYERS))
    assert {each["candidate"]["decoder"] for each in data["checked"]} == {"ar", "ppsd"}
    assert len(data["checked"]) == 4
    assert {len(c["split"]) for c in data["candidates"]} == {2}
    assert {t["length"] for t in data["timings"]} == {64, 96}
    widths = {t["width"] for t in data["timings"]}
    assert widths in ({1, 2, 4, 8}, {1, 2, 4, 8, 16})
    assert {part["width"] for part in data["parts"]} == widths
    assert {c["width"] for c in data["candidates"]} <= widths
    assert data["answers"] == 2
    assert data["answer_tokens"] == 20
    written = yaml.safe_load(place.read_text())
    assert written["model_hash"] == data["model_hash"]
    assert written["evidence"] == data
    assert written["settings"]["decoder"] == data["chosen"]["decoder"]
    profile = read_profile(place)
    assert calibration_data(read_calibration(profile)) == data
    svg = place.with_suffix(".svg").read_text()
    assert svg.startswith("<svg")
    assert svg.count("measured</title>") == 3
    assert not list(place.parent.glob(".*")), "no temporary file is left"


def test_a_tree_that_was_chosen_is_what_the_profile_runs(whole, ppsd, tmp_path, monkeypatch):
    profile = read_profile(whole[0])
    found = read_calibration(profile)
    chain = next(c for c in found.candidates if c.width == 1)
    tree = replace(chain, width=4, tokens_per_second=9876.5)
    ran = Checked(tree, 90.0, 80.0, 95.0, 0.5, 0.6, first_token=0.2, end_to_end=40.0)
    changed = replace(
        found, candidates=(tree, *found.candidates), checked=(found.checked[0], ran), chosen=tree
    )
    place = tmp_path / "tree.yaml"
    place.write_text(profile_text(changed, profile, Settings(context=96), name="tree"))
    assert read_profile(place).settings.width == 4
    jsonschema.validate(calibration_data(changed), json.loads(SCHEMA.read_text()))
    done = ppsd.run("generate", "--profile", str(place), "-p", "hello", "-n", "6", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["decoder"] == "ppsd"
    asked = make_plan(ModelChoice(None, str(place), None, True), Settings(), lambda _: None)
    assert asked.config.width == 4
    monkeypatch.setenv("COLUMNS", "400")
    shown = ppsd.run("calibrate", "--show", str(place)).out
    assert "Whole answers" in shown
    (row,) = [line for line in shown.splitlines() if "40.0" in line and "width 4" in line]
    assert "200" in row, "milliseconds to the first token"
    (predicted,) = [line for line in shown.splitlines() if "9876" in line.replace(",", "")]
    assert " 4 " in predicted


def test_generate_follows_the_profile(whole, ppsd):
    place, data = whole
    done = ppsd.run("generate", "--profile", str(place), "-p", "hello", "-n", "6", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["decoder"] == data["chosen"]["decoder"]
    assert f"decoder {data['chosen']['decoder']}: {data['reason']}" in done.err
    assert "(profile tiny, " in done.err


def test_bench_says_what_the_profile_decided(whole, ppsd, prompts):
    place, data = whole
    args = ("bench", "--profile", str(place), "--prompts", str(prompts), "-n", "8", "--limit", "1")
    done = ppsd.run(*args, "--devices", "cpu", "--split", "3,3", "--json", "--decoders", "ar")
    assert done.code == 0, done.err
    (note,) = [n for n in json.loads(done.out)["notes"] if data["reason"] in n]
    assert note.startswith(f"the profile's decoder is {data['chosen']['decoder']}: ")


def test_show(whole, ppsd, tmp_path, monkeypatch):
    place, data = whole
    monkeypatch.setenv("COLUMNS", "400")
    shown = ppsd.run("calibrate", "--show", str(place))
    assert shown.code == 0, shown.err
    for text in ("Times", "Candidates", "Exit layers", data["reason"], "Memory on cpu"):
        assert text in shown.out
    again = ppsd.run("calibrate", "--show", str(place), "--json", "--plot", str(tmp_path / "a.svg"))
    assert json.loads(again.out) == data
    assert (tmp_path / "a.svg").read_text() == curve_svg(read_calibration(read_profile(place)))
    plain = tmp_path / "hand.yaml"
    plain.write_text("name: hand\nevidence: {measured: here}\n")
    refused = ppsd.run("calibrate", "--show", str(plain))
    assert refused.code == 3
    assert "was not made by `ppsd calibrate`" in refused.err


def test_flags_that_mean_nothing_beside_show(ppsd, monkeypatch):
    monkeypatch.setenv("PPSD_DEVICES", "cpu")  # for other commands
    monkeypatch.setenv("PPSD_MODEL", ppsd.model)
    args = ("calibrate", "--show", "no-such-profile")
    allowed = ppsd.run(*args, "--json", "--plot", "x.svg", "--quiet")
    assert allowed.code == 3, allowed.err
    refused = ppsd.run(*args, "--json", "-n", "48", "--head", "raw", "--head", "x")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("ppsd: --head, --max-new-tokens have no meaning with --show")
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 99}, "calibration format 99"),
        ({"layers": 3}, "is no list"),
        ({"extra": 1}, "unknown 'extra'"),
        ({"seconds": "soon"}, "is no float"),
    ],
)
def test_damaged_evidence_is_named(whole, ppsd, tmp_path, change, says):
    place, _ = whole
    data = yaml.safe_load(place.read_text())
    data["evidence"] |= change
    damaged = tmp_path / "damaged.yaml"
    damaged.write_text(yaml.safe_dump(data))
    shown = ppsd.run("calibrate", "--show", str(damaged))
    assert shown.code == 3
    assert says in shown.err
    assert "Traceback" not in shown.err


# One process, and what is chosen


def test_in_one_process_nothing_pays(ppsd, folder, prompts, tmp_path):
    """Stages that take turns cannot be faster; raw exits of a random model guess nothing."""
    args = ("calibrate", "-m", str(folder), "--prompts", str(prompts), "--devices", "cpu")
    done = ppsd.run(*args, "--head", "raw", "--threads", "1", *QUICK)
    assert done.code == 0, done.err
    assert "decoder ar: nothing beats ar's" in done.out
    place = tmp_path / "config" / "ppsd" / "profiles" / f"{folder.name}-calibrated.yaml"
    profile = read_profile(place)
    assert profile.settings == Settings(decoder="ar", devices=("cpu",), threads=1, context=96)
    plan = make_plan(ModelChoice(None, str(place), None, True), Settings(), lambda _: None)
    assert plan.decoder == "ar"
    assert any("nothing beats" in note for note in plan.notes)
    forced = make_plan(
        ModelChoice(None, str(place), None, True), Settings(decoder="ppsd"), lambda _: None
    )
    assert forced.decoder == "ppsd"
    assert not any("nothing beats" in note for note in forced.notes)


# Profiles on other machines, for other models, under flags


AR = Settings(decoder="ar", threads=2, devices=("cpu",))
CHAIN = Settings(decoder="ppsd", split=(3, 3), devices=("cpu", "cpu"), head="h")


@pytest.mark.parametrize(
    ("base", "flags", "expected"),
    [
        (AR, Settings(), AR),
        (AR, Settings(decoder="auto"), AR),
        (AR, Settings(decoder="ppsd"), Settings(decoder="ppsd")),
        (AR, Settings(head="h"), Settings(decoder="ppsd", head="h")),
        (AR, Settings(decoder="ar", threads=1), replace(AR, threads=1)),
        (CHAIN, Settings(), CHAIN),
        (CHAIN, Settings(decoder="auto"), CHAIN),
        (CHAIN, Settings(decoder="ar"), Settings(decoder="ar")),
        (CHAIN, Settings(decoder="eesd"), replace(CHAIN, decoder="eesd")),
        (CHAIN, Settings(stages=3), Settings(decoder="ppsd", stages=3)),
        (Settings(split=(2, 4)), Settings(decoder="ar"), Settings(decoder="ar", split=(2, 4))),
    ],
)  # fmt: skip
def test_flags_over_a_profile_with_a_decoder(base, flags, expected):
    assert follow_profile.follow(flags, Profile("p", base)) == expected


def test_another_machine_is_named(whole, monkeypatch):
    profile = read_profile(whole[0])
    assert follow_profile.machine_notes(profile, ("cpu", "cpu")) == []
    facts = (("cpu", "Other CPU"), ("cores", "64"))
    monkeypatch.setattr(follow_profile, "machine_facts", lambda _devices: facts)
    made = dict(profile.evidence["machine"])
    (note,) = follow_profile.machine_notes(profile, ("cpu", "cpu"))
    assert made["cpu"] in note
    assert "Other CPU, 64 cores" in note
    assert follow_profile.machine_notes(replace(profile, evidence={"measured": "here"}), ()) == []


def test_fewer_gpus_of_the_same_sort_are_the_same_machine(whole, monkeypatch):
    profile = read_profile(whole[0])
    basis = [["cpu", "C"], ["cores", "8"]]
    two = {"machine": [*basis, ["gpus", "cuda:0 H200 139 GiB, cuda:1 H200 139 GiB"]]}
    profile = replace(profile, evidence=dict(profile.evidence) | two)
    for gpus, notes in (("cuda:1 H200 139 GiB", 0), ("cuda:0 A100 79 GiB", 1), ("", 0)):
        here = tuple(map(tuple, [*basis, ["gpus", gpus]]))
        monkeypatch.setattr(follow_profile, "machine_facts", lambda _devices, here=here: here)
        assert len(follow_profile.machine_notes(profile, ("cuda:1",))) == notes


def test_another_model_is_an_error_that_names_both(whole, tmp_path):
    other = tmp_path / "other.yaml"
    data = yaml.safe_load(whole[0].read_text())
    own = data["model_hash"]
    data["model_hash"] = "sha256:" + "1" * 64
    other.write_text(yaml.safe_dump(data))
    with pytest.raises(AssetError, match="1111.*" + own[:19]):
        make_plan(ModelChoice(None, str(other), None, True), Settings(), lambda _: None)


def test_packaged_profiles_are_read_only(whole, tmp_path):
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "hand.yaml").write_text("name: hand\n")
    (packaged / "made.yaml").write_text(whole[0].read_text())
    with pytest.raises(ConfigError, match="read-only"):
        check_place(packaged / "hand.yaml", (packaged,))
    check_place(packaged / "made.yaml", (packaged,))
    check_place(packaged / "new.yaml", (packaged,))
    check_place(packaged / "hand.yaml", (tmp_path,))
    assert default_place(tmp_path, "/a/b-calibrated").name == "b-calibrated.yaml"
    assert default_place(tmp_path, "models/x.gguf").name == "x-calibrated.yaml"


# Mistakes and ends


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("-n", "3"), 2, "--max-new-tokens 3: at least 8"),
        (("--head", "nowhere"), 3, "no draft head 'nowhere'"),
        (("--head", "smollm2-135m-2stage"), 3, "the head was trained for"),
        (("--context", "9", "-n", "8"), 2, "fit into the context of 9"),
        (("-o", "missing/x.yaml"), 3, "folder missing does not exist"),
        (("--devices", "cuda:9"), 4, "CUDA devices"),
        (("--prompts", "none.jsonl"), 3, "no prompts at none.jsonl"),
    ],
)
def test_mistakes_are_named_first(ppsd, monkeypatch, prompts, args, code, says):
    monkeypatch.setattr(calibrate_run, "calibrate", lambda *_: pytest.fail("it began"))
    own = ("--prompts", str(prompts), "-n", "10")
    done = ppsd.run("calibrate", "-m", ppsd.model, "--offline", *own, *args)
    assert done.code == code
    assert says in done.err
    assert "Traceback" not in done.err


def test_too_little_memory_is_said_before_weights_load(ppsd, monkeypatch, prompts):
    monkeypatch.setattr(run, "open_engine", lambda *_a, **_k: pytest.fail("weights were loaded"))
    monkeypatch.setattr(memory_plan, "available_memory", lambda _device: 1 << 20)
    done = ppsd.run("calibrate", "-m", ppsd.model, "--prompts", str(prompts), *QUICK)
    assert done.code == 4
    assert "cpu needs 0.1 GiB and has 0.0 GiB free" in done.err
    assert done.err.count("\n") == 1


def test_memory_of_a_pipeline():
    from test_placement import SPEC

    from ppsd_cli.runtime.pipeline import PipelineConfig

    config = PipelineConfig("", "", (16, 14), ("a", "b"), "float32", 1024, head="raw")
    first, second = memory_plan.plan_memory(SPEC, config, blocks=2, draft_vocab=16384)
    layer, matrix = 3_538_944 * 4, 49152 * 576 * 4
    cache = 2 * 3 * 64 * 1024 * 4
    work = memory_plan._WORK
    head = 2 * (2 * layer + cache) + 16384 * 576 * 4
    assert first.needed == 16 * (layer + cache) + matrix + head + work
    assert second.needed == 14 * (layer + cache) + matrix + work
    alone = replace(config, split=(30,), devices=("a",), head=None)
    (whole_model,) = memory_plan.plan_memory(SPEC, alone)
    assert whole_model.needed == 30 * (layer + cache) + matrix + work  # tied: one matrix
    full = (DeviceMemory("a", 5, 4), DeviceMemory("b", 5, None))
    assert not memory_plan.fits(full)
    assert memory_plan.fits(full[1:])
    with pytest.raises(ResourceError, match="a needs"):
        memory_plan.check_memory(full, "x")


def test_a_failing_stage_writes_nothing(ppsd, monkeypatch, prompts, tmp_path):
    def fail(*_args, **_kwargs):
        raise StageError("stage 1 was killed by signal 9")

    monkeypatch.setattr(run, "run_candidates", fail)
    place = tmp_path / "kept.yaml"
    place.write_text("name: kept\n")
    fixed = ("calibrate", "-m", ppsd.model, "--prompts", str(prompts), "--devices", "cpu")
    done = ppsd.run(*fixed, "-o", str(place), *QUICK)
    assert done.code == 5
    assert place.read_text() == "name: kept\n"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["kept.yaml"]


def test_ctrl_c_leaves_nothing(folder, prompts, tmp_path):
    place = tmp_path / "never.yaml"
    args = [sys.executable, "-m", "ppsd_cli", "calibrate", "-m", str(folder), "--offline"]
    args += ["--prompts", str(prompts), "--devices", "cpu,cpu", "-o", str(place), "-n", "40"]
    process = subprocess.Popen(
        args, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=dict(os.environ)
    )
    assert process.stderr is not None
    seen = b""
    while b"times" not in seen:
        part = os.read(process.stderr.fileno(), 4096)
        assert part, seen.decode()
        seen += part
    time.sleep(0.3)
    children = _children(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not place.exists()
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 5
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, children))


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_stages_of_one_core_are_timed_together(folder, monkeypatch):
    """Three real processes on two cores, or on as many as there are."""
    from ppsd_cli.assets import resolve_model
    from ppsd_cli.runtime.pipeline import PipelineConfig

    for name, value in (("WARM", 0.01), ("SECONDS", 0.03), ("ROUNDS", 1)):
        monkeypatch.setattr(shared_cores, name, value)
    monkeypatch.setattr(children, "allowed_cores", lambda: sorted(os.sched_getaffinity(0))[:1])
    files = resolve_model(str(folder))
    split, devices = (3, 3), ("cpu",) * 2
    config = PipelineConfig(str(files.folder), files.model_hash, split, devices, "float32", 96)
    seen = []
    found = shared_cores.time_shared(config, (0, 0), 64, lambda: seen.append(1))
    assert len(seen) == 6
    assert 1.0 <= found.alone < 3
    assert 1.0 <= found.busy < 3


def test_the_factor_of_a_shared_core():
    own = [{0: 8.0}, {2: 6.0}]
    fair = shared_cores._factor((0, 2), own, {0: 14.0, 2: 14.0})
    assert fair == 1.0
    slower = shared_cores._factor((0, 2), own, {0: 20.0, 2: 15.0})
    assert slower == pytest.approx(1 / (8 / 20 + 6 / 15))
    assert shared_cores._pair((0, 1, 0, 1)) == (1, 3)
    assert shared_cores._pair((0, 0, 1)) == (0, 1)
