"""``train-head`` on a tiny model: it learns, resumes, stops, and says what is wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from train_models import arguments, curve, save_chat_model, training
from typer.testing import CliRunner, Result

from ppsd_cli.commands.train_head import train_head
from ppsd_cli.core.choose import choose
from ppsd_cli.core.plan import Sampling
from ppsd_cli.errors import AssetError, ConfigError, StageError
from ppsd_cli.model.head_files import read_info
from ppsd_cli.model.heads import Tap
from ppsd_cli.model.one_pass import Backbone
from ppsd_cli.tasks.loss import DraftOutput, soft_cross_entropy, target_stats
from ppsd_cli.tasks.optimize import Schedule
from ppsd_cli.tasks.train import Trainer

Run = Callable[..., Result]
DEEP = ("--exit-layer", "2", "--stages", "2", "--lr", "3e-3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on the tiny model; whatever it raises is raised."""
    monkeypatch.setenv("PPSD_CACHE", str(cache))
    app = typer.Typer()
    app.command()(train_head)

    def call(output: Path, *more: str, on: Path = model) -> Result:
        result = CliRunner().invoke(app, arguments(on, output, *more))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return call


def test_acceptance_rises_clearly_above_the_raw_exit(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, *DEEP, "--steps", "60")
    assert "held-out acceptance top-1" in result.stdout
    figures = training(tmp_path)["figures"]
    assert figures["held_out"]["top1"] > figures["raw_exit"]["top1"] + 0.3
    tops = [figures["held_out"][f"top{k}"] for k in (1, 2, 4, 8)]
    assert tops == sorted(tops)
    records = curve(tmp_path)
    name = "deep-exit2-stages2"
    assert records[-1]["heads"][name]["loss"] < records[0]["heads"][name]["loss"]
    assert [r["step"] for r in records] == list(range(5, 61, 5))
    info = read_info(tmp_path)
    assert info.taps == (Tap(2, 0), Tap(4, 1))
    assert load_file(tmp_path / "head.safetensors")["norm"].dtype == torch.bfloat16


def test_several_heads_in_one_run(run: Run, tmp_path: Path) -> None:
    run(
        tmp_path,
        *("--steps", "10"),
        *("--spec", "name=three,split=1-1-2,blocks=1"),
        *("--spec", "name=small,exit=2,stages=2,vocab=32,lr=1e-4"),
        *("--spec", "name=plain,exit=1,stages=3,kind=block"),
        *("--spec", "name=mlp,exit=3,stages=2,kind=mlp,blocks=1"),
    )
    taps = {name: read_info(tmp_path / name).taps for name in ("three", "small", "plain", "mlp")}
    assert taps["three"] == (Tap(1, 0), Tap(2, 1), Tap(4, 2))
    assert taps["plain"] == (Tap(1, 0),)
    ids = load_file(tmp_path / "small" / "head.safetensors")["token_ids"]
    assert len(ids) == 32
    assert {0, 1, 2} <= set(ids.tolist()), "special tokens are always in"
    assert training(tmp_path / "small")["lr"] == 1e-4


def test_several_exit_layers(run: Run, tmp_path: Path) -> None:
    run(tmp_path, "--exit-layer", "1,2", "--stages", "2", "--kind", "block", "--steps", "2")
    assert (tmp_path / "block-exit1-stages2" / "head.json").exists()
    assert (tmp_path / "block-exit2-stages2" / "head.json").exists()


def test_resume_is_bit_exact(run: Run, tmp_path: Path) -> None:
    """Broken off at step 25 and resumed from that of 20: the weights of 40 steps at one go."""
    float32 = ("--save-dtype", "float32", "--accumulate", "2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, *DEEP, "--steps", "40", *float32)
    with pytest.MonkeyPatch.context() as patch:
        taken = Trainer._step

        def interrupted(self: Trainer, step: int, factor: float) -> None:
            if step == 25:
                raise InterruptedError
            taken(self, step, factor)

        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(InterruptedError):
            run(parts, *DEEP, "--steps", "40", *float32)
    run(parts, *DEEP, "--steps", "40", *float32, "--resume")
    one, other = (load_file(folder / "head.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_two_depths_are_learnt_beside_an_unchanged_head(run: Run, tmp_path: Path) -> None:
    """The second level rises by its own gradients; the head's are those of one depth."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = (*DEEP, "--kind", "block", "--steps", "120", "--save-dtype", "float32")
    run(one, *options)
    result = run(two, *options, "--depth", "2")
    assert "second level top-1" in result.stdout
    first, both = (load_file(folder / "head.safetensors") for folder in (one, two))
    assert all(torch.equal(tensor, both[name]) for name, tensor in first.items())
    assert {name.split(".")[0] for name in both.keys() - first.keys()} == {"second"}
    assert both["second.fuse"].abs().max() > 0, "the token is heard"
    figures = training(two)["figures"]
    assert figures["held_out"]["second"]["count"] == figures["held_out"]["count"]
    shares = [r["heads"]["block-exit2-stages2-depth2"]["second_acceptance"] for r in curve(two)]
    assert shares[-1] > shares[0] + 0.03
    assert read_info(two).depth == 2


def test_taps_of_two_depths(run: Run, tmp_path: Path) -> None:
    run(tmp_path, "--split", "2,1,1", "--depth", "2", "--steps", "1")
    info = read_info(tmp_path)
    assert info.taps == (Tap(2, 0), Tap(2, 1), Tap(3, 2), Tap(3, 3), Tap(4, 4))


def test_resume_takes_the_text_of_the_checkpoint(run: Run, tmp_path: Path, monkeypatch) -> None:
    """With more time than before, no round is written that the checkpoint has not seen."""
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    options = (*DEEP, "--steps", "4", "--checkpoint-every", "2")
    run(tmp_path / "head", *options, "--text-seconds", "0")
    run(tmp_path / "head", *options, "--text-seconds", "1000", "--resume")
    assert len(list((tmp_path / "cache").rglob("round-*.jsonl"))) == 1


def test_checkpoints_of_heads_of_one_vocabulary(run: Run, tmp_path: Path) -> None:
    """They share the list of its tokens in memory."""
    shape = "exit=2,stages=2,kind=block,vocab=32"
    run(tmp_path, "--spec", f"name=a,{shape}", "--spec", f"name=b,{shape}", "--steps", "2")
    run(
        tmp_path, "--spec", f"name=a,{shape}", "--spec", f"name=b,{shape}", "--steps", "2",
        "--resume",
    )  # fmt: skip
    assert (tmp_path / "b" / "head.safetensors").exists()


def test_resume_refuses_other_settings(run: Run, tmp_path: Path) -> None:
    run(tmp_path, *DEEP, "--steps", "2")
    with pytest.raises(ConfigError, match="continue it with --resume"):
        run(tmp_path, *DEEP, "--steps", "2")
    with pytest.raises(ConfigError, match="batch_tokens 512, now 256"):
        run(tmp_path, *DEEP, "--steps", "2", "--resume", "--batch-tokens", "256")
    with pytest.raises(AssetError, match="nothing to resume"):
        run(tmp_path / "new", *DEEP, "--steps", "2", "--resume")


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(run: Run, tmp_path: Path) -> None:
    run(tmp_path, *DEEP, "--steps", "20")
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        taken = Trainer._step

        def poisoned(self: Trainer, step: int, factor: float) -> None:
            taken(self, step, math.nan if step == 22 else factor)

        patch.setattr(Trainer, "_step", poisoned)
        with pytest.raises(StageError, match=r"step 24: .* not a number.*checkpoint is kept"):
            run(tmp_path, *DEEP, "--steps", "40", "--resume")
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept


def test_text_is_reused(run: Run, tmp_path: Path, cache: Path) -> None:
    run(tmp_path / "one", *DEEP, "--steps", "1")
    before = {p: p.stat().st_mtime_ns for p in cache.glob("texts/*/round-*.jsonl")}
    assert before
    run(tmp_path / "two", *DEEP, "--steps", "1")
    assert before == {p: p.stat().st_mtime_ns for p in cache.glob("texts/*/round-*.jsonl")}
    record = json.loads(next(iter(before)).read_text().splitlines()[0])
    assert set(record) == {"ids", "answers", "greedy"}
    assert len(record["ids"]) == 64


def test_base_model_without_a_template(run: Run, tmp_path: Path) -> None:
    base = save_chat_model(tmp_path / "base", template=False)
    run(tmp_path / "out", *DEEP, "--steps", "5", on=base)
    assert training(tmp_path / "out")["figures"]["held_out"]["count"] > 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "which head"),
        (("--exit-layer", "4"), "choose 1 to 3"),
        (("--exit-layer", "0"), "choose 1 to 3"),
        (("--exit-layer", "x"), "whole numbers"),
        (("--exit-layer", "2", "--stages", "0"), "--stages 0"),
        (("--exit-layer", "2", "--stages", "1"), "two stages"),
        (("--exit-layer", "3", "--stages", "3"), "leaves 1 layers"),
        (("--exit-layer", "2", "--stages", "9"), "only 4 layers"),
        (("--split", "2,1"), "adds up to 3"),
        (("--split", "2,x"), "10,10,10"),
        (("--split", "4,0"), "at least one layer"),
        (("--spec", "split=4-0"), "at least one layer"),
        (("--spec", "split=4"), "two stages"),
        (("--split", "2,2", "--stages", "3"), "not the split's 2"),
        (("--split", "2,2", "--exit-layer", "1"), "disagree"),
        (("--exit-layer", "2", "--kind", "tree"), "mlp, block, deep"),
        (("--exit-layer", "2", "--depth", "3"), "--depth 3: choose 1 or 2"),
        (("--exit-layer", "2", "--depth", "2", "--kind", "mlp"), "--kind block or deep"),
        (("--exit-layer", "2", "--depth", "2", "--blocks", "1"), "--blocks 2 or more"),
        (("--exit-layer", "2", "--blocks", "0"), "--blocks 0"),
        (("--exit-layer", "2", "--draft-vocab", "9999"), "--draft-vocab 9999"),
        (("--exit-layer", "2", "--lr", "nan"), "--lr nan"),
        (("--exit-layer", "2", "--steps", "0"), "--steps 0"),
        (("--exit-layer", "2", "--threads", "99999"), "--threads 99999"),
        (("--exit-layer", "2", "--seed", "-1"), "--seed -1"),
        (("--exit-layer", "2", "--weight-decay", "-1"), "--weight-decay -1"),
        (("--exit-layer", "2", "--weight-decay", "nan"), "--weight-decay nan"),
        (("--exit-layer", "2", "--text-seconds", "nan"), "--text-seconds nan"),
        (("--exit-layer", "2", "--context", "4096"), "model's own is 128"),
        (("--exit-layer", "2", "--dtype", "int8"), "--dtype int8"),
        (("--spec", "exit=2,colour=red"), "colour=red"),
        (("--spec", "exit=2,lr=fast"), "lr=fast"),
        (("--spec", "name=../up,exit=2"), "letters, digits"),
        (("--spec", "name=a,exit=2", "--spec", "name=a,exit=1"), "two heads are called a"),
        (("--spec", "exit=2", "--split", "2,2"), "leave out --exit-layer"),
    ],
)
def test_bad_options(run: Run, tmp_path: Path, options: tuple[str, ...], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        run(tmp_path, "--steps", "1", *options)


def test_the_model_may_be_an_alias(run: Run, model: Path, tmp_path: Path, monkeypatch) -> None:
    profiles = tmp_path / "ppsd" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "mine.yaml").write_text(f"name: mine\nmodel: {model}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    run(tmp_path / "out", *DEEP, "--steps", "1", on=Path("mine"))
    assert read_info(tmp_path / "out").model_name == model.name
    with pytest.raises(AssetError, match="known aliases: mine"):
        run(tmp_path / "out", *DEEP, on=Path("yours"))


def test_data_is_read_before_the_weights(run: Run, tmp_path: Path, monkeypatch) -> None:
    def load(_loader: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Backbone, "load", load)
    with pytest.raises(AssetError, match="No such file"):
        run(tmp_path, *DEEP, "--data", str(tmp_path / "none.jsonl"))


def test_measurements_between_reports(run: Run, tmp_path: Path) -> None:
    run(tmp_path, *DEEP, "--steps", "8", "--log-every", "5", "--eval-every", "3")
    scored = {r["step"]: "held_out" in next(iter(r["heads"].values())) for r in curve(tmp_path)}
    assert scored == {3: True, 5: False, 6: True}


def test_an_output_that_is_no_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AssetError, match="cannot write"):
        run(tmp_path / "file", *DEEP)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves(model: Path, cache: Path, tmp_path: Path, number: int, code: int) -> None:
    script = (
        "import typer, torch; torch.set_num_threads(1); "
        "from ppsd_cli.commands.train_head import train_head; typer.run(train_head)"
    )
    command = [sys.executable, "-c", script, *arguments(model, tmp_path, *DEEP)]
    command += ["--steps", "100000"]
    environment = {**os.environ, "PPSD_CACHE": str(cache)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "curve.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors.decode()
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert (tmp_path / "head.json").exists()


def test_schedule() -> None:
    by_steps = Schedule(steps=100, warmup=10)
    assert by_steps.factor(0, 0.0) == pytest.approx(0.1, rel=0.01)
    assert by_steps.factor(50, 0.0) == pytest.approx(0.525)
    assert by_steps.factor(100, 0.0) == pytest.approx(0.05)
    by_time = Schedule(steps=10_000, warmup=1, time_limit=60.0)
    assert by_time.factor(10, 30.0) == pytest.approx(0.525)
    assert by_time.progress(10, 60.0) == 1


def test_hits_are_counted_as_tokens_are_chosen() -> None:
    """Bfloat16 has many level logits; a draft is a hit where ``choose`` takes the target."""
    torch.manual_seed(0)
    rows, vocabulary, greedy = 400, 48, Sampling()
    target = torch.randn(rows, vocabulary).mul(4).round().div(4).bfloat16()
    draft = (target[:, ::2] + torch.randn(rows, vocabulary // 2)).mul(2).round().div(2).bfloat16()
    kept, positions = torch.arange(0, vocabulary, 2), torch.arange(rows)
    output = DraftOutput(torch.empty(8, vocabulary // 2), kept, vocabulary)
    lse, best = target_stats(target)
    weight = (positions % 5 > 0).float()
    found = soft_cross_entropy(draft, target[:, ::2], lse, output.columns(best), weight)[2]
    chosen = choose(draft, greedy, positions, token_ids=kept)
    right = (chosen == choose(target, greedy, positions)) & (weight > 0)
    level = (draft == draft.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    assert level.sum() > 50
    assert found == right.sum()
