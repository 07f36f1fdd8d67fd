"""Trees of guesses through the commands: ``--width`` in ``generate`` and ``bench``."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from cli_model import Ppsd, save_cli_model, save_deep_head

import ppsd_cli
from ppsd_cli.commands import bench_setup
from ppsd_cli.tasks.bench import measure, pool, trials
from ppsd_cli.tasks.bench.decoders import EngineDecoder
from ppsd_cli.tasks.bench.forced import ForcedTree

SCHEMAS = Path(ppsd_cli.__file__).parent / "data" / "schema"
PROMPT = ("--prompt", "hello world", "-n", "24")
TREE = ("--split", "2,2,2", "--devices", "cpu", "--width", "4")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("tree-model"))


@pytest.fixture
def ppsd(capsys, monkeypatch, model, tmp_path) -> Ppsd:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    return Ppsd(capsys, monkeypatch, model)


def report_of(ppsd, *args):
    result = ppsd.generate(*PROMPT, "--json", *args)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    schema = json.loads((SCHEMAS / "generate.json").read_text())
    jsonschema.validate(report, schema)
    assert list(report) == list(schema["properties"]), "fields in the order of the schema"
    return report


def test_the_text_is_the_models_and_the_report_says_how_wide(ppsd):
    plain = report_of(ppsd, "--decoder", "ar")
    chain = report_of(ppsd, *TREE[:4])
    tree = report_of(ppsd, *TREE)
    sampled = ("--temperature", "0.8", "--seed", "5")
    assert tree["token_ids"] == chain["token_ids"] == plain["token_ids"]
    assert (plain["width"], chain["width"], tree["width"]) == (1, 1, 4)
    assert (plain["nodes_per_tick"], chain["nodes_per_tick"]) == (None, 1)
    assert 1 < tree["nodes_per_tick"] <= 4
    assert (
        report_of(ppsd, *TREE, *sampled)["token_ids"]
        == (report_of(ppsd, "--decoder", "ar", *sampled)["token_ids"])
    )


def test_stage_processes_answer_the_same(ppsd):
    alone = report_of(ppsd, *TREE)
    apart = report_of(ppsd, "--split", "2,2,2", "--devices", "cpu,cpu,cpu", "--width", "4")
    names = ("token_ids", "ticks", "verified", "accepted", "flushes", "nodes_per_tick")
    assert [alone[name] for name in names] == [apart[name] for name in names]


@pytest.fixture(scope="session")
def deep_head(model, tmp_path_factory) -> str:
    return save_deep_head(model, tmp_path_factory.mktemp("depth2"))


def test_two_depths_say_the_models_text_in_one_process_and_in_several(ppsd, deep_head, tmp_path):
    plain = report_of(ppsd, "--decoder", "ar")
    trace = tmp_path / "trace.json"
    found = []
    for devices in ("cpu", "cpu,cpu,cpu"):
        shape = ("--split", "2,2,2", "--devices", devices, "--width", "4", "--head", deep_head)
        report = report_of(ppsd, *shape, "--depth", "2", "--trace", str(trace))
        assert report["token_ids"] == plain["token_ids"]
        assert (report["depth"], plain["depth"]) == (2, 1)
        found.append([report[name] for name in ("ticks", "verified", "accepted", "flushes")])
    assert found[0] == found[1]
    assert json.loads(trace.read_text())
    shown = ppsd.generate(*PROMPT, *TREE, "--head", deep_head, "--depth", "2", "--timeline")
    assert shown.code == 0
    assert "branch 4" in shown.err


def test_bench_of_two_depths(bench, deep_head):
    result = bench("--json", "--width", "2,4", "--depth", "2", "--head", deep_head)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    jsonschema.validate(data, json.loads((SCHEMAS / "bench.json").read_text()))
    assert list(data["decoders"]) == ["ar", "ppsd", "ppsd-w2-d2", "ppsd-w4-d2"]
    assert [data["decoders"][name]["depth"] for name in data["decoders"]] == [1, 1, 2, 2]
    assert data["settings"]["depth"] == "2"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--depth", "3", "--width", "4"), "--depth 3: 1 or 2"),
        (("--depth", "2", "--split", "2,2,2"), "needs a tree; add --width"),
        (("--depth", "2", *TREE), "the head raw guesses one depth"),
        (("--depth", "2", "--width", "4", "--decoder", "ar"), "this run's is ar"),
        (("--depth", "2", "--width", "4", "--split", "2,1,3"), "lag 2"),
    ],
    ids=str,
)
def test_depths_that_cannot_be(ppsd, deep_head, options, says):
    head = ("--head", deep_head) if "lag" in says else ()
    result = ppsd.generate(*PROMPT, *options, *head)
    assert result.code in (2, 3)
    assert result.out == ""
    assert says in result.err
    assert len(result.err.splitlines()) == 1


def test_timeline_and_trace_show_the_branches(ppsd, tmp_path):
    trace = tmp_path / "trace.json"
    result = ppsd.generate(*PROMPT, *TREE, "--timeline", "--trace", str(trace))
    assert result.code == 0
    lines = {line.split("  ")[0].strip(): line for line in result.err.splitlines()}
    assert {"branch 1", "branch 4", "stage 2"} <= {*lines}
    assert "branch 5" not in lines
    assert "tree of width 4" in result.err
    assert "tokens among the guesses" in result.err
    slices = [e for e in json.loads(trace.read_text()) if e["ph"] == "X" and "args" in e]
    levels = [e["args"]["branches"] for e in slices if "branches" in e["args"]]
    assert max(map(len, levels)) == 4
    assert {state for level in levels for *_, state in level} == {"live", "void"}


def test_width_and_scale_in_a_profile(ppsd, model, tmp_path):
    profile = tmp_path / "p.yaml"
    base = ("generate", "--profile", str(profile), *PROMPT, "--json")
    text = f"name: p\nmodel: {model}\nsettings: {{split: [2, 4], devices: [cpu], width: 3"
    profile.write_text(text + ", tree_scale: 1.5}\n")
    assert json.loads(ppsd.run(*base).out)["width"] == 3
    assert json.loads(ppsd.run(*base, "--width", "1").out)["width"] == 1
    assert json.loads(ppsd.run(*base, "--decoder", "ar").out)["width"] == 1
    profile.write_text(text + ", tree_scale: 0}\n")
    refused = ppsd.run(*base)
    assert refused.code == 2
    assert "tree_scale 0" in refused.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--width", "0"), "--width 0"),
        (("--width", "17"), "1 (a chain) to 16"),
        (("--width", "4", "--decoder", "ar"), "for --decoder ppsd, and this run's is ar"),
        (("--width", "4", "--decoder", "eesd"), "for --decoder ppsd, and this run's is eesd"),
    ],
    ids=str,
)
def test_widths_that_cannot_be(ppsd, options, says):
    result = ppsd.generate(*PROMPT, *options)
    assert (result.code, result.out) == (2, "")
    assert says in result.err
    assert len(result.err.splitlines()) == 1


@pytest.fixture
def bench(ppsd, monkeypatch, tmp_path):
    """``ppsd bench`` on two prompts, all engines in this process."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello world\nthe quick brown fox\n")
    real = pool.open_engine
    monkeypatch.setattr(pool, "open_engine", lambda config, **_: real(config, processes=False))
    for module in (measure, trials):  # one thread: nothing to wait for between answers
        monkeypatch.setattr(module, "settle", lambda: None)
    fixed = ("--prompts", str(prompts), "-n", "16", "--offline")

    def run(*args, shape=TREE[:4]):
        model = () if "--random-weights" in args else ("-m", ppsd.model)
        shape = shape if model else ("--stages", "2", "--devices", "cpu")
        return ppsd.run("bench", *fixed, *model, *shape, *args)

    return run


def test_bench_of_widths_and_fixed_acceptance(bench):
    result = bench("--json", "--width", "2,4", "--acceptance", "0.6/0.9", "--ignore-eos")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    jsonschema.validate(data, json.loads((SCHEMAS / "bench.json").read_text()))
    trees = ["ppsd-w2", "ppsd-w4"]
    fixed = ["ppsd-w2@0.6/0.9", "ppsd-w4@0.6/0.9"]
    assert list(data["decoders"]) == ["ar", "ppsd", *trees, "ppsd@0.6", *fixed]
    for name, width in zip(trees + fixed, (2, 4, 2, 4), strict=True):
        figures = data["decoders"][name]
        assert (figures["width"], figures["exact"]) == (width, False)
        assert figures["identical"] + 1 >= figures["answers"], "but for level tokens"
    assert data["settings"]["width"] == "1,2,4"
    assert data["decoders"][fixed[0]]["among"] == 0.9
    wide, chain = data["decoders"][fixed[1]], data["decoders"]["ppsd@0.6"]
    assert wide["acceptance_rate"] > chain["acceptance_rate"]
    assert wide["tokens_per_tick"] > chain["tokens_per_tick"]


def answers_of(monkeypatch, changed=None):
    """Notes every answer's decoder and forced guesses; ``changed`` may replace what it gave."""
    right, notes = EngineDecoder.answer, []

    def answer(self, prompt, limits, forced=None):
        notes.append((self, forced))
        found = right(self, prompt, limits, forced)
        return found if changed is None else changed(self, found)

    monkeypatch.setattr(EngineDecoder, "answer", answer)
    return notes


def test_every_contender_runs_in_stages_of_its_own_width(bench, monkeypatch):
    notes = answers_of(monkeypatch)
    assert bench("--width", "2,4", "--acceptance", "0.6", "--limit", "1").code == 0
    widths = {(decoder.width, decoder.engine.config.width) for decoder, _ in notes}
    assert widths == {(1, 1), (2, 2), (4, 4)}
    stages = {(len(decoder.engine.config.split), decoder.width) for decoder, _ in notes}
    assert stages == {(1, 1), (3, 1), (3, 2), (3, 4)}


def test_where_stages_serve_every_width_there_is_one_engine(bench, monkeypatch):
    """As on a GPU, where a second one would hold the weights again."""
    monkeypatch.setattr(bench_setup, "has_graphs", lambda _config: True)
    notes = answers_of(monkeypatch)
    assert bench("--width", "2,4", "--limit", "1").code == 0
    widths = {(decoder.width, decoder.engine.config.width) for decoder, _ in notes}
    assert widths == {(1, 1), (1, 4), (2, 4), (4, 4)}, "plain decoding has one stage of its own"


@pytest.mark.parametrize("decoders", [(), ("--decoders", "ar,ppsd")], ids=["alone", "with ppsd"])
def test_trees_at_fixed_acceptance_draw_from_their_own_answer(bench, monkeypatch, decoders):
    """A tree's text may leave plain decoding's; then guesses from that text would all be wrong."""

    def changed(decoder, found):
        own = (*found.token_ids[:3], found.token_ids[3] ^ 1)
        return replace(found, token_ids=own) if decoder.width > 1 else found

    notes = answers_of(monkeypatch, changed)
    args = ("--random-weights", "tiny", "--width", "3", "--acceptance", "0.5/0.8,1/1", *decoders)
    data = json.loads(bench("--json", "--limit", "1", "-r", "2", *args).out)
    free = ["ar", "ppsd", "ppsd-w3"] if decoders else ["ar"]
    fixed = ["ppsd@0.5", "ppsd-w3@0.5/0.8", "ppsd@1", "ppsd-w3@1/1"]
    assert set(data["decoders"]) == {*free, *fixed}
    texts = {s["contender"]: s["token_ids"] for s in data["samples"]}
    assert texts["ar"] != texts["ppsd-w3@1/1"]
    drawn = [list(forced.tokens) for _, forced in notes if isinstance(forced, ForcedTree)]
    assert drawn == [texts["ppsd-w3@1/1"]] * 4


def test_random_weights_say_the_same_in_wider_matrices(bench):
    """So trees and EESD are right as often as they are told to."""
    args = ("--random-weights", "tiny", "--acceptance", "0.7/0.9", "--width", "4", "-n", "48")
    others = ("--decoders", "ppsd,eesd", "--draft-length", "3", "--dtype", "bfloat16")
    result = bench("--json", *args, *others)
    assert result.code == 0, result.err
    found = json.loads(result.out)["decoders"]
    assert all(figures["identical"] == figures["answers"] for figures in found.values())
    shares = {name: figures["acceptance_rate"] for name, figures in found.items() if "@" in name}
    expected = {"ppsd@0.7": 0.7, "ppsd-w4@0.7/0.9": 0.9, "eesd-3@0.7": 0.7}
    assert shares == pytest.approx(expected, abs=0.12)


def test_two_shares_go_with_a_width_of_the_profile(ppsd, bench, tmp_path):
    profile = tmp_path / "wide.yaml"
    settings = "{split: [2, 2, 2], devices: [cpu], width: 3}"
    profile.write_text(f"name: wide\nmodel: {ppsd.model}\nsettings: {settings}\n")
    args = ("--profile", str(profile), "--limit", "1", "--acceptance", "0.6/0.9", "--json")
    result = bench(*args, shape=())
    assert result.code == 0, result.err
    assert "ppsd-w3@0.6/0.9" in json.loads(result.out)["decoders"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--width", "2,x"), "--width 2,x"),
        (("--width", "2,40"), "--width 40"),
        (("--width", "2", "--decoders", "eesd"), "--width is for ppsd"),
        (("--acceptance", "0.6/0.9"), "add --width"),
        (("--width", "2", "--acceptance", "0.6/0.5"), "give 0.6 to 1"),
        (("--width", "2", "--acceptance", "0.6/0.7,0.8"), "for trees all with a second one"),
        (("--width", "2", "--acceptance", "0.6/nan"), "give 0.6 to 1"),
    ],
)
def test_bench_mistakes(bench, args, says):
    result = bench(*args)
    assert (result.code, result.out) == (2, "")
    assert says in result.err
