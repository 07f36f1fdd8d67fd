"""``ppsd calibrate`` of a head that guesses two depths per tick, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from cli_model import Ppsd, save_cli_model, save_deep_head

import ppsd_cli
from ppsd_cli.commands.calibrate_profile import profile_text, read_calibration
from ppsd_cli.commands.session import ModelChoice, make_plan
from ppsd_cli.config import Settings, read_profile
from ppsd_cli.tasks.calibrate import cpu_times, engine_times, probe, run
from ppsd_cli.tasks.calibrate.candidates import best_three

SCHEMA = Path(ppsd_cli.__file__).parent / "data" / "schema" / "calibration.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("depth-command-model"))


@pytest.fixture
def ppsd(capsys, monkeypatch, model, tmp_path) -> Ppsd:
    """Short windows; one tree of two depths is among what is run."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    monkeypatch.delenv("PPSD_PROFILE", raising=False)
    for module, name, value in (
        (cpu_times, "WARM", 0.01), (cpu_times, "SECONDS", 0.02), (cpu_times, "ROUNDS", 1),
        (cpu_times, "WIDE_WARM", 0.01), (cpu_times, "WIDE_SECONDS", 0.02),
        (probe, "TOKENS", 12), (engine_times, "TOKENS", 8), (engine_times, "_WARM", 4),
        (engine_times, "_SETTLED", 0.02),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)

    def some(candidates):
        deepest = [c for c in candidates if (c.width, c.depth) == (4, 2)]
        return [*deepest[:1], *best_three(candidates)[:1]]

    monkeypatch.setattr(run, "best_three", some)
    return Ppsd(capsys, monkeypatch, model)


def calibrated(ppsd, tmp_path, devices: str) -> dict:
    """What a calibration of the untrained head of two depths printed, and wrote as ``it.yaml``."""
    head = save_deep_head(Path(ppsd.model), tmp_path / "deep")
    (tmp_path / "own.txt").write_text("hello world\nhow are you today?\n")
    done = ppsd.run(
        "calibrate", "-m", ppsd.model, "--head", head, "--prompts", str(tmp_path / "own.txt"),
        "--devices", devices, "-n", "10", "--context", "96", "--offline", "--quiet", "--json",
        "-o", str(tmp_path / "it.yaml"), "--threads", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    data = json.loads(done.out)
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    return data


@pytest.mark.parametrize("devices", ["cpu,cpu", "cpu"], ids=["processes", "in process"])
def test_the_command_considers_two_depths(ppsd, tmp_path, monkeypatch, devices):
    data = calibrated(ppsd, tmp_path, devices)
    widths = {t["width"] for t in data["timings"] if t["depth"] == 2}
    assert widths in ({2, 4, 8}, {2, 4, 8, 16}, {4, 8})
    assert {c["width"] for c in data["candidates"] if c["depth"] == 2} == widths
    assert {c["head"] for c in data["candidates"] if c["depth"] == 2} != {"raw"}
    assert [len(head["second"]) for head in data["heads"]] == [4]
    ran = [c["candidate"] for c in data["checked"]]
    assert [(c["width"], c["depth"]) for c in ran[:2]] == [(1, 1), (4, 2)]
    assert data["checked"][1]["acceptance"] is not None
    profile = read_profile(tmp_path / "it.yaml")
    found = read_calibration(profile)
    tree = found.checked[1].candidate
    chosen = tmp_path / "chosen.yaml"
    text = profile_text(replace(found, chosen=tree), profile, Settings(context=96), name="chosen")
    chosen.write_text(text)
    plan = make_plan(ModelChoice(None, str(chosen), None, True), Settings(), lambda _: None)
    assert (plan.config.width, plan.config.depth) == (4, 2)
    assert plan.config.split == tree.split
    monkeypatch.setenv("COLUMNS", "400")
    shown = ppsd.run("calibrate", "--show", str(chosen)).out
    assert "4, depth 2" in shown
    assert "width 4, depth 2" in shown
    assert "deep, second depth" in shown
