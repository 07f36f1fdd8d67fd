"""Acceptance in one pass against what the pipeline itself counts, and engines timed in process."""

from dataclasses import replace
from random import Random

import pytest
import torch
from cli_model import LAYERS, save_cli_model

from ppsd_cli.assets import resolve_model
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.tree_simulation import TreeSimulation
from ppsd_cli.model.head_files import HeadInfo, read_head, read_info, write_head
from ppsd_cli.model.heads import DeepWeights, HeadWeights, Tap
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone
from ppsd_cli.model.places import open_checkpoint
from ppsd_cli.model.random_weights import RANDOM_DEEP
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.stage import Output
from ppsd_cli.runtime.engine import Engine, open_engine
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.timing import Parts, Window, Work, head_split
from ppsd_cli.tasks.bench.decoders import EngineDecoder
from ppsd_cli.tasks.calibrate import engine_times, exits
from ppsd_cli.tasks.calibrate.engine_forecast import Level
from ppsd_cli.tasks.calibrate.engine_times import EngineBench, HeadSize, time_devices, time_steps
from ppsd_cli.tasks.calibrate.exits import HeadRanks, answer_prompts, score_exits
from ppsd_cli.tasks.calibrate.guessers import Answer

CPU = torch.device("cpu")
PROMPTS = (tuple(range(5, 25)), tuple(range(40, 52)))
TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_cli_model(tmp_path_factory.mktemp("exits-model"))


def config(model, split, head=None) -> PipelineConfig:
    files = resolve_model(str(model))
    return PipelineConfig(
        str(files.folder), files.model_hash, split, ("cpu",) * len(split), "float32", 96, 16, head
    )


def texts(model):
    with open_engine(config(model, (LAYERS,)), processes=False) as engine:
        plain = EngineDecoder(engine, drafting=False)
        return answer_prompts(plain, PROMPTS, Limits(TOKENS, 96), lambda: None)


def counted(model, split, head, found, width=1) -> list[tuple[int, int]]:
    """Accepted and verified guesses of each answer in the real pipeline."""
    wide = replace(config(model, split, head), width=width)
    with open_engine(wide, processes=False) as engine:
        drafting = EngineDecoder(engine, drafting=True, width=width)
        answers = [drafting.answer(text.prompt, Limits(TOKENS, 96)) for text in found]
    assert [a.token_ids for a in answers] == [text.answer for text in found]
    return [(a.counts.accepted, a.counts.verified) for a in answers]


def backbone(model) -> tuple[Loader, Backbone]:
    files = resolve_model(str(model))
    checkpoint = open_checkpoint(files.folder, CPU)
    loader = Loader(checkpoint, read_spec(files.folder), torch.float32, CPU)
    return loader, Backbone.load(loader)


def test_raw_exits_are_those_of_the_pipeline(model, monkeypatch):
    monkeypatch.setattr(exits, "RAW_POSITIONS", 10_000)
    found = texts(model)
    layers, _ = score_exits(backbone(model)[1], {}, found, lambda: None)
    assert [score.layer for score in layers] == list(range(1, LAYERS))
    for score in layers:
        assert list(score.top) == sorted(score.top)
        assert 0 <= score.agreement <= 1
    # the last guess of an answer is never fed, so the pipeline verifies one less
    for score in (layers[1], layers[LAYERS - 2]):
        counts = counted(model, (score.layer, LAYERS - score.layer), "raw", found)
        accepted, verified = (sum(column) for column in zip(*counts, strict=True))
        every = verified + len(found)
        assert every == sum(len(text.guessed) for text in found)
        assert accepted / every <= score.top[0] <= (accepted + len(found)) / every


def test_heads_are_those_of_the_pipeline(model, tmp_path):
    folder = _own_head(model, tmp_path)
    info = read_info(folder)
    found = texts(model)
    loader, whole = backbone(model)
    weights = read_head(folder, info, loader, whole.output.lm_matrix)
    _, ranks = score_exits(whole, {"own": weights}, found, lambda: None)
    own = ranks["own"]
    split = (2, 4)
    counts = counted(model, split, str(folder), found)
    for (accepted, verified), hits in zip(counts, own.hits, strict=True):
        assert verified == len(hits) - 1
        assert accepted == sum(hits[:-1])
    assert 0 < own.share(8) < 1
    some = [Answer(text.answer, rows) for text, rows in zip(found, own.guesses, strict=True)]
    assert [answer.hits for answer in some] == list(own.hits)
    trees = counted(model, split, str(folder), found, width=4)
    for (accepted, verified), answer in zip(trees, some, strict=True):
        run = TreeSimulation(answer.guesses, answer.tokens, stages=2, width=4, random=Random(0))
        course = run.run()
        assert (course.accepted, course.verified) == (accepted, verified)


def _own_head(model, tmp_path):
    """A random deep head of this model, which guesses some tokens right by its raw norm."""
    loader, whole = backbone(model)
    spec = loader.spec
    torch.manual_seed(1)
    h, width = spec.hidden, 2 * spec.kv_heads * spec.head_dim
    deep = DeepWeights(torch.ones(1, h), torch.randn(1, h, width) / 4, torch.eye(h)[None])
    taps = (Tap(2, 0), Tap(LAYERS, 1))
    output = Output(whole.output.norm, whole.output.lm_matrix, spec.rms_eps)
    weights = HeadWeights(taps, output, blocks=(loader.layer(LAYERS - 1),), deep=deep)
    info = HeadInfo(
        kind="deep", model_hash=resolve_model(str(model)).model_hash, model_name="tiny",
        hidden=h, taps=taps, blocks=1, draft_vocabulary=None, stages=2, training={},
    )  # fmt: skip
    folder = tmp_path / "head"
    write_head(folder, info, weights)
    return folder


def test_shares_and_hits_of_ranks():
    ranks = HeadRanks(((0, 1, 9), (3,)))
    assert ranks.top == (0.25, 0.5, 0.75, 0.75)
    assert ranks.hits == ((True, False, False), (False,))


def test_parts_do_what_a_stage_does(model):
    parts = Parts(config(model, (3, 3)), 1, ("raw", RANDOM_DEEP))
    window = Window.soon(warm=0.0, seconds=0.01)
    tree = Work(2, 90, width=4, lm=True, head=RANDOM_DEEP)
    for work in (Work(3, 50, lm=True), Work(1, 50), tree, Work(3, 9, head="raw")):
        times = parts.run(work, window)
        assert len(times) >= 3
        assert min(times) > 0
    assert parts.run(None, window) == []
    assert head_split("raw", (LAYERS,)) == (LAYERS - 1, 1)


class Clockwork:
    """In place of engines: ticks whose length is known."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def tick(self, run):
        self.asked.append(run)
        level = run.level
        growth = 1 if level.width == 1 else level.depth + level.width / 10 + len(run.split)
        return growth * self.seconds(run.split, run.devices, run.head, run.vocabulary)


def bench(model, seconds, monkeypatch) -> EngineBench:
    clock = Clockwork(seconds)
    monkeypatch.setattr(EngineBench, "tick", lambda _self, *args: clock.tick(*args))
    return EngineBench(config(model, (LAYERS,)), PROMPTS[0], lambda: None)


def test_stages_in_step_are_taken_apart(model, monkeypatch):
    def seconds(split, _devices, head, vocabulary):
        base = 1.0 + 0.5 * len(split)
        draft = 0.0 if head is None else vocabulary / 1000 + (0.2 if head != "raw" else 0.0)
        return base + max(split) * (1 + 0.1 * len(split)) + draft

    own = bench(model, seconds, monkeypatch)
    heads = [HeadSize("h", 4, 5000, deep=True), HeadSize("raw", 0, 9000, deep=False)]
    times, timings = time_steps(
        own, layers=12, stages=(2, 3), heads=heads, levels=(Level(2), Level(4))
    )
    assert times.step == pytest.approx({1: 1.1, 2: 1.2, 3: 1.3})
    assert times.base[1] == pytest.approx(1.5)
    assert times.base[2] == pytest.approx(2.0 + 0.064)
    assert times.heads == pytest.approx({"h": 4.936 + 0.4, "raw": 8.936})
    assert times.wide[Level(2)] == pytest.approx({2: 3.2, 3: 4.2})
    assert times.wide[Level(4)] == pytest.approx({2: 3.4, 3: 4.4})
    assert {t.width for t in timings} == {1, 2, 4}
    shares = {(t.busy, t.layers) for t in timings}
    assert (2, 6) not in shares, "no probe is the even split itself"
    assert (3, 4) not in shares


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_devices_are_taken_apart(model, monkeypatch, overlap):
    layer, fixed = {"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}

    def seconds(split, devices, head, vocabulary):
        times = [n * layer[d] for n, d in zip(split, devices, strict=True)]
        times[-1] += fixed[devices[-1]]
        if head is None:
            return sum(times)
        times[0] += (vocabulary - 64) / 1e4 + (0.5 if head != "raw" else 0.0)
        slowest = max(times)
        return slowest + (1 - overlap) * (sum(times) - slowest) + 0.25

    own = bench(model, seconds, monkeypatch)
    heads = [HeadSize("raw", 0, 64, deep=False)]
    times, _ = time_devices(own, ("a", "b"), layers=12, heads=heads, levels=(Level(8),))
    assert times.wide == pytest.approx({Level(8): 3.8})
    assert times.layer == pytest.approx(layer)
    assert times.fixed == pytest.approx(fixed)
    assert times.overlap == pytest.approx(overlap)
    assert times.hop == pytest.approx(0.25)
    assert [p.seconds for p in times.plain()] == pytest.approx([15.0, 28.0])


def test_real_engines_are_timed(model, monkeypatch):
    """All kinds of runs, on the in-process runner."""
    monkeypatch.setattr(engine_times, "TOKENS", 6)
    monkeypatch.setattr(engine_times, "_WARM", 3)
    opened: list[PipelineConfig] = []

    def watch(some: PipelineConfig) -> Engine:
        opened.append(some)
        return open_engine(some, processes=False)

    own = EngineBench(config(model, (LAYERS,)), PROMPTS[0], lambda: None, watch)
    heads = [HeadSize("h", 2, 100, deep=True)]
    times, timings = time_steps(own, layers=LAYERS, stages=(2,), heads=heads, levels=(Level(2),))
    assert times.plain()[0].seconds > 0
    assert {c.head for c in opened} == {None, "raw", RANDOM_DEEP}
    assert all(t.seconds > 0 for t in timings)
