"""Calibration of heads that guess two depths per tick: predictions, times, and the command."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from cli_model import save_cli_model, save_deep_head
from test_calibrate_exits import PROMPTS, bench, config
from test_calibrate_forecast import LAYOUT, guesser, process_times, wide_times

import ppsd_cli
from ppsd_cli.calibration_records import Checked, Timing
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.tree_simulation import TreeSimulation
from ppsd_cli.model.head_files import HeadInfo, read_head, read_info, write_head
from ppsd_cli.model.heads import HeadWeights, Tap
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone
from ppsd_cli.model.places import RandomModel, open_checkpoint
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.stage import Output
from ppsd_cli.runtime.engine import open_engine
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.timing import Parts, Window, Work
from ppsd_cli.tasks.bench.decoders import EngineDecoder
from ppsd_cli.tasks.calibrate.candidates import Predictor, best_three
from ppsd_cli.tasks.calibrate.cpu_times import fit_wide
from ppsd_cli.tasks.calibrate.engine_forecast import Level
from ppsd_cli.tasks.calibrate.engine_times import HeadSize, time_steps
from ppsd_cli.tasks.calibrate.exits import Text, score_exits
from ppsd_cli.tasks.calibrate.flow import hits_at, tick_seconds
from ppsd_cli.tasks.calibrate.forecast import Setting
from ppsd_cli.tasks.calibrate.guessers import Answer, Guesser, _steady
from ppsd_cli.tasks.calibrate.splits import by_stage, in_time
from ppsd_cli.tasks.calibrate.verdict import decide

CPU = torch.device("cpu")
SCHEMA = Path(ppsd_cli.__file__).parent / "data" / "schema" / "calibration.json"
TAPS = (6, 6)


def two_depths(name: str, first: list[bool], second: list[bool]) -> Guesser:
    """A head whose best guesses are right as the lists say, with wrong second ones."""
    answers = []
    for one, other in zip(guesser(name, TAPS, first).answers, [second], strict=True):
        rows = [((t if hit else -1, -0.2), (-9, -3.0)) for t, hit in enumerate(other, 1)]
        answers.append(replace(one, second=tuple(rows)))
    return Guesser.of(name, TAPS, (0.0, 1.0, 1.0, 1.0), answers)


# Tokens


def test_two_right_depths_bring_two_tokens_a_tick():
    some = two_depths("good", [True] * 60, [True] * 60)
    assert some.depth == 2
    assert guesser("g", TAPS, [True] * 60).depth == 1
    for stages in (2, 3):
        one, two = some.pace(stages, 4), some.pace(stages, 4, 2)
        assert one.tokens_per_tick == pytest.approx(1)
        assert 1.75 < two.tokens_per_tick < 2
        assert (one.acceptance, two.acceptance) == (1, 1)
        assert 0.9 < two.steady < 1, "only the first tick fed a known token"
        assert two.leaves > one.leaves, "the head runs on inner nodes, too"
    never = two_depths("good", [False] * 60, [False] * 60)
    assert never.pace(2, 2, 2).steady < 0.5


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
def test_the_steady_acceptance_of_a_chain_is_its_own(stages, acceptance):
    (answer,) = guesser("g", (1,), hits_at(acceptance, 3000)).answers
    rule = {"stages": stages, "width": 1, "random": Random(0)}
    levels = TreeSimulation(answer.guesses, answer.tokens, **rule).run().levels
    known = sum(not level.behind for level in levels) / len(levels)
    assert _steady(stages, known) == pytest.approx(acceptance, abs=0.04)
    assert _steady(stages, 0.0) == 1.0
    assert _steady(stages, 1 / (stages - 0.5)) == 0.0, "cut off by the answer's end"


# Times


def deep_times(going_on: float):
    """As ``wide_times`` at next to no cost of a level, and ``going_on`` for the second depth."""
    times = wide_times(1.02)
    parts = [
        {key: replace(p, second=(("good", going_on),) if key[1] > 1 else ()) for key, p in some}
        for some in (times.alone.items(), times.busy.items())
    ]
    return replace(times, alone=parts[0], busy=parts[1])


def test_every_tick_goes_on_also_behind_a_token_that_is_due():
    times = deep_times(2.0)
    assert times.deep_widths == (2, 4)
    assert process_times().deep_widths == ()
    one, two = (times.flow(Setting((6, 6), "good", TAPS, 4, 1.0, d)) for d in (1, 2))
    assert two.head.solo == pytest.approx(one.head.solo + 2.0)
    assert two.wide == one.wide
    behind_due = 2.0 / 1.02  # so much less as a draft behind one node takes
    assert two.turns[0].solo == pytest.approx(two.wide[0].solo + behind_due)
    assert two.turns[1:] == two.wide[1:]
    free = times.flow(Setting((6, 6), "good", TAPS, 4, 1.0, 2), free="stage 0")
    assert (free.head.solo, free.turns) == (0, free.wide)
    one, two = (times.flow(Setting((9, 3), "good", TAPS, 4, 1.0, d)) for d in (1, 2))
    assert tick_seconds(two, [True]) > tick_seconds(one, [True]) + 1.7


@pytest.mark.parametrize(("going_on", "best"), [(0.3, 2), (30.0, 1)])
def test_the_best_depth_follows_from_its_times(going_on, best):
    some = two_depths("good", [True, True, False] * 16, [True, False, True, True] * 12)
    raw = Guesser("raw", (6,), (0.3, 0.5, 0.6, 0.7))
    predictor = Predictor(deep_times(going_on), LAYOUT)
    found = predictor.candidates([some, raw], (1, 2, 4, 8))
    assert {(c.width, c.depth) for c in found if c.head == "good"} == {
        (1, 1), (2, 1), (4, 1), (2, 2), (4, 2),
    }  # fmt: skip
    assert {c.depth for c in found if c.head == "raw"} == {1}
    assert found[0].depth == best
    two = next(c for c in found if (c.width, c.depth) == (4, 2))
    assert two.needed is None
    assert two.tokens_per_tick > 1
    assert two.tokens_per_second == pytest.approx(two.tokens_per_tick / two.tick_seconds, rel=0.05)
    assert len({(c.head, c.stages, c.width, c.depth) for c in best_three(found)}) == 3
    chain = Predictor(wide_times(1.02), LAYOUT).candidates([some], (1, 2, 4))
    assert {c.depth for c in chain} == {1}, "no second depth was timed"


def test_what_limits_two_depths():
    right = two_depths("good", [True] * 60, [True] * 60)
    half = two_depths("good", [True] * 60, list(hits_at(0.5, 60)))
    predictor = Predictor(deep_times(0.3), LAYOUT)
    assert predictor.predict(half, (8, 4), 4, 2).limit == "acceptance"
    assert predictor.predict(right, (8, 4), 4, 2).limit != "acceptance"


def test_taps_of_two_depths_are_in_time():
    taps = (2, 2, 4, 4, 6)
    assert by_stage(taps, 1) == taps
    assert by_stage(taps, 2) == (2, 4, 6)
    assert by_stage((2, 4, 6), 2) == (4, 6)
    assert in_time((2, 2, 2), by_stage(taps, 2))
    assert not in_time((2, 1, 3), by_stage(taps, 2))
    assert not in_time((2, 2, 2), by_stage((2, 4, 6), 2)), "made for one depth"


def test_the_verdict_names_the_depth():
    tree = Predictor(deep_times(0.3), LAYOUT).predict(
        two_depths("good", [True] * 9, [True] * 9), (6, 6), 4, 2
    )
    plain = replace(tree, head=None, decoder="ar", split=(12,))
    fast, slow = (Checked(tree, s, s, s, 0.8, 1.2) for s in (50.0, 20.0))
    ran = Checked(plain, 30.0, 30.0, 30.0, None, 1.0)
    assert "good, width 4, depth 2 gave 50.0" in decide([ran, fast], names={}).reason
    assert decide([ran, slow], names={}).reason.endswith("with 80% of its guesses right")


def test_parts_of_a_second_depth_are_found_again():
    narrow = replace(process_times().busy[2, 1], heads=(("a", 1.0), ("b", 1.0)))

    def timing(seconds, **more):
        return Timing("cpu", 1, 2, 9, 64, seconds, 9, width=4, **more)

    some = [timing(18.0), timing(21.0, lm=True), timing(20.0, head="a")]
    some += [timing(27.0, head="a", depth=2)]
    wide = fit_wide(some, narrow, 4, {"a": "a", "b": "a"})
    assert dict(wide.heads) == pytest.approx({"raw": 3, "a": 2, "b": 2})
    assert dict(wide.second) == pytest.approx({"a": 7, "b": 7})
    assert wide.going_on("b") == pytest.approx(7)
    assert fit_wide(some[:3], narrow, 4, {"a": "a"}).second == ()


def test_engines_time_two_depths_with_a_head_that_can(model, monkeypatch):
    own = bench(model, lambda *_: 1.0, monkeypatch)
    heads = [HeadSize("plain", 2, 100, deep=True), HeadSize("deep", 2, 900, deep=True, depth=2)]
    levels = Level(4), Level(4, 2), Level(8, 2)
    times, timings = time_steps(own, layers=12, stages=(2, 3), heads=heads, levels=levels)
    assert (times.widths, times.deep_widths) == ((1, 4), (4, 8))
    assert times.wide[Level(4, 2)][2] == pytest.approx(times.wide[Level(4)][2] + 1)
    asked = {(t.width, t.depth): t.head for t in timings if t.width > 1}
    assert "100 tokens" in asked[4, 1]
    assert "900 tokens" in asked[4, 2]
    one, two = (times.tick(Setting((6, 6), "deep", TAPS, 4, 1.0, d), 0.8) for d in (1, 2))
    assert two > one


def test_parts_go_on(model, tmp_path):
    head = save_deep_head(model, tmp_path)
    parts = Parts(config(model, (3, 3)), 0, (head,))
    for width in (2, 8):
        times = parts.run(
            Work(2, 60, head=head, width=width, depth=2), Window.soon(warm=0, seconds=0.01)
        )
        assert min(times) > 0


# Against real runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_cli_model(tmp_path_factory.mktemp("depth-model"))


PLACE = RandomModel("tiny", 0)
TEXTS = [Text(p, tuple((p[-1] + i) % 512 for i in range(1, 61))) for p in PROMPTS]


def half_right_head(folder: Path) -> HeadWeights:
    """For the random model, whose token t + 1 follows t: both levels say so, but for much noise."""
    loader = Loader(open_checkpoint(PLACE.place, CPU), PLACE.spec, torch.float32, CPU)
    spec, h = PLACE.spec, PLACE.spec.hidden
    draw = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    layer = loader.layer(5)
    block = replace(layer, down=layer.down + noise(*layer.down.shape) * 0.6)
    fuse = torch.cat([-noise(h, h) * 0.25, torch.eye(h) * 2.8])
    output = Output(loader.final_norm(), loader.lm_matrix(), spec.rms_eps)
    ones = torch.ones(h)
    second = SecondLevel(ones, ones.clone(), fuse, loader.layer(4), ones.clone())
    weights = HeadWeights((Tap(3, 0),), output, (block,), second=second)
    info = HeadInfo(
        kind="block", model_hash=PLACE.model_hash, model_name="tiny", hidden=h, taps=weights.taps,
        blocks=1, draft_vocabulary=None, stages=2, training={}, depth=2,
    )  # fmt: skip
    write_head(folder, info, weights)
    return read_head(folder, read_info(folder), loader, loader.lm_matrix())


def counted(folder: Path, split: tuple[int, ...], width: int, depth: int):
    """Ticks from the first token to the last, right and verified guesses of the real pipeline."""
    some = PipelineConfig(
        PLACE.place, PLACE.model_hash, split, ("cpu",) * len(split), "float32", 128, 16,
        str(folder), width=width, depth=depth,
    )  # fmt: skip
    found = []
    with open_engine(some, processes=False) as engine:
        decoder = EngineDecoder(engine, drafting=True, width=width, depth=depth)
        for text in TEXTS:
            answer = decoder.answer(text.prompt, Limits(len(text.answer), 128))
            assert answer.token_ids == text.answer
            ticks = answer.counts.ticks - len(split)
            found.append((ticks, answer.counts.accepted, answer.counts.verified))
    return found


def test_predicted_tokens_of_two_depths_are_those_of_the_pipeline(tmp_path):
    weights = half_right_head(tmp_path)
    loader = Loader(open_checkpoint(PLACE.place, CPU), PLACE.spec, torch.float32, CPU)
    _, ranks = score_exits(Backbone.load(loader), {"own": weights}, TEXTS, lambda: None)
    own = ranks["own"]
    assert own.second is not None
    assert 0.3 < own.top[0] < 0.9
    assert 0.3 < own.second.top[0] < 0.9
    answers = [
        Answer(text.answer, *rows)
        for text, *rows in zip(TEXTS, own.guesses, own.second.guesses, strict=True)
    ]
    some = Guesser.of("own", (3,), own.top, answers)
    per_tick = {}
    for split in ((3, 3), (3, 2, 1)):
        for width, depth in ((2, 1), (2, 2), (4, 2), (8, 2)):
            found = counted(tmp_path, split, width, depth)
            pace = some.pace(len(split), width, depth)
            tokens = sum(len(text.answer) - 1 for text in TEXTS)
            real = tokens / sum(ticks for ticks, *_ in found)
            guessed = tokens / sum(ticks for _, ticks in pace.answers)
            assert guessed == pytest.approx(real, rel=0.03), (split, width, depth)
            assert depth == 1 or pace.tokens_per_tick == pytest.approx(guessed)
            per_tick[len(split), width, depth] = real
            if len(split) == 2 and width == 2:  # nothing is drawn
                courses = [
                    TreeSimulation(
                        a.guesses, a.tokens, stages=2, width=2, random=Random(0),
                        second=a.second if depth > 1 else None,
                    ).run()
                    for a in answers
                ]  # fmt: skip
                assert [(c.ticks - 2, c.accepted, c.verified) for c in courses] == found
    assert per_tick[2, 2, 2] > 1.1 * per_tick[2, 2, 1]
    assert all(per_tick[n, 8, 2] > per_tick[n, 2, 2] for n in (2, 3))
