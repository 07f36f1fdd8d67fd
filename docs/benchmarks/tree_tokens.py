"""Tokens per tick of trees by width and stages, simulated from measured ranks and run for real.

For each question of MT-Bench (first turns, spread over its categories) plain decoding answers
greedily; one pass over the answer gives the head's best tokens at every position. The simulation
(``core.tree_simulation``) lets these ranks run through the tree's rule: on the true text the
guesses are those measured there, on any other text those of a position drawn at random, none of
which is right. The real runs are
in-process; their texts are compared with plain decoding's.

    python docs/benchmarks/tree_tokens.py --questions 16 --tokens 128 -o tree_tokens.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from mtbench_cpu import questions

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.prompts import encode_chat
from ppsd_cli.commands.report import hardware, versions
from ppsd_cli.commands.session import ModelChoice, Plan, make_plan
from ppsd_cli.config import DEFAULT_TREE_SCALE, Settings
from ppsd_cli.core.choose import best_tokens
from ppsd_cli.core.events import Committed
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.stats import RunStats, StatsBuilder
from ppsd_cli.core.tree_simulation import TreeSimulation
from ppsd_cli.model.head_files import read_head, read_info
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone, backbone_states, head_one_pass
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.runtime.engine import Drafting, Engine, open_engine

CONTEXT, MOST = 2048, 16
ARRANGEMENTS = {
    2: Settings(head="smollm2-135m-2stage"),
    3: Settings(head="smollm2-135m-3stage"),
    5: Settings(head="smollm2-135m-block", stages=5),
}
Candidates = list[list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt with plain decoding's tokens."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def main() -> int:
    """Measure, print a table a stage count, write JSON."""
    options = options_of(sys.argv[1:])
    answers = answers_of(options)
    report: dict[str, Any] = {
        "questions": len(answers),
        "tokens": sum(len(a.tokens) for a in answers),
        "greedy": True,
        "arrangements": {},
        "versions": versions(),
        "hardware": hardware(("cpu",), options.threads),
    }
    for stages in options.stages:
        report["arrangements"][stages] = _arrangement(stages, answers, options)
        _save(report, options.output)
    return 0


def _arrangement(stages: int, answers: Sequence[Answer], options: argparse.Namespace) -> dict:
    """Simulated and real tokens per tick of one split."""
    plan = plan_of(
        options, replace(ARRANGEMENTS[stages], decoder="ppsd", width=max(options.widths))
    )
    record: dict[str, Any] = {"split": list(plan.config.split), "head": plan.head_name}
    head = Measured(plan)
    for scale in options.scales:
        lists = [head.candidates(answer, scale) for answer in answers]
        record[f"simulated at scale {scale:g}"] = {
            width: round(_simulated(lists, answers, stages, width), 4) for width in options.widths
        }
    lists = [head.candidates(answer, 1.0) for answer in answers]
    record["in the best k"] = {k: round(_hits(lists, answers, k), 4) for k in (1, 2, 4, 8, 16)}
    _note(f"{stages} stages: {json.dumps(record)}")
    if options.real:
        with open_engine(plan.config, processes=False) as engine:
            record["real"] = {
                width: _real(engine, answers, width, options) for width in options.widths
            }
    return record


class Measured:
    """A head's best tokens on whole answers, from one pass over each."""

    def __init__(self, plan: Plan) -> None:
        assert plan.config.head is not None
        folder = Path(plan.config.head)
        checkpoint = Checkpoint(plan.files.folder)
        loader = Loader(checkpoint, plan.spec, torch.float32, torch.device("cpu"))
        self._backbone = Backbone.load(loader)
        self._weights = read_head(
            folder, read_info(folder), loader, self._backbone.output.lm_matrix
        )
        self._known: dict[Answer, torch.Tensor] = {}

    @torch.inference_mode()
    def candidates(self, answer: Answer, scale: float) -> Candidates:
        """For each token of the answer but the first, the best guesses with their log shares."""
        if answer not in self._known:
            self._known[answer] = self._logits(answer)
        ids = self._weights.output.token_ids
        return best_tokens(self._known[answer], MOST, scale=scale, token_ids=ids)

    def _logits(self, answer: Answer) -> torch.Tensor:
        text = (*answer.prompt, *answer.tokens)[:-1]
        tables = self._backbone.tables(len(text))
        depths = {tap.depth for tap in self._weights.taps}
        states = backbone_states(self._backbone, torch.tensor([text]), depths, tables)
        taps = [states[tap.depth] for tap in self._weights.taps]
        shape = Shape.of(self._backbone.spec)
        hidden = head_one_pass(self._weights, taps, shape, tables)
        return self._weights.output.logits(hidden[0, len(answer.prompt) :])


def _hits(lists: Sequence[Candidates], answers: Sequence[Answer], count: int) -> float:
    """Share of tokens that are among the ``count`` best guesses."""
    hits = [
        token in [each for each, _ in row[:count]]
        for rows, answer in zip(lists, answers, strict=True)
        for row, token in zip(rows, answer.tokens[1:], strict=True)
    ]
    return sum(hits) / len(hits)


def _simulated(
    lists: Sequence[Candidates], answers: Sequence[Answer], stages: int, width: int
) -> float:
    """Tokens per tick, prompts included as in ``core.stats``."""
    random = Random(0)
    ticks = sum(
        TreeSimulation(rows, answer.tokens, stages=stages, width=width, random=random).run().ticks
        for rows, answer in zip(lists, answers, strict=True)
    )
    return sum(len(answer.tokens) for answer in answers) / ticks


def _real(
    engine: Engine, answers: Sequence[Answer], width: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Counts of real answers at one width, and how many tokens differ from plain decoding's."""
    ticks = tokens = verified = accepted = nodes = feeds = compared = differing = equal = 0
    scale = options.scale
    for answer in answers:
        ids, stats = _run(
            engine, answer.prompt, options, Drafting(True, width=width, tree_scale=scale)
        )
        ticks, tokens = ticks + stats.ticks, tokens + stats.tokens
        verified, accepted = verified + stats.verified, accepted + stats.accepted
        nodes, feeds = nodes + stats.nodes, feeds + stats.feeds
        pairs = list(zip(ids, answer.tokens, strict=False))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        compared += len(pairs) if first is None else first + 1
        differing += first is not None
        equal += ids == answer.tokens
    record = {
        "tokens_per_tick": round(tokens / ticks, 4),
        "acceptance_rate": round(accepted / verified, 4),
        "nodes_per_tick": round(nodes / feeds, 3),
        "equal_answers": equal,
        "tokens_until_a_difference": compared,
        "differences": differing,
    }
    _note(f"  width {width}: {json.dumps(record)}")
    return record


def _run(
    engine: Engine, prompt: tuple[int, ...], options: argparse.Namespace, drafting: Drafting
) -> tuple[tuple[int, ...], RunStats]:
    stats, ids = StatsBuilder(engine.runner.stages), []
    limits = Limits(options.tokens, CONTEXT, frozenset())
    for event in engine.answer(prompt, sampling=Sampling(), limits=limits, drafting=drafting):
        stats.add(event)
        if isinstance(event, Committed):
            ids.append(event.token_id)
    return tuple(ids), stats.snapshot()


def answers_of(options: argparse.Namespace) -> list[Answer]:
    """Plain decoding's answers."""
    plan = plan_of(options, Settings(decoder="ar"))
    tokenizer = load_tokenizer(plan.files.folder)
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": text}])
        for text in questions(options.questions)
    ]
    with open_engine(plan.config, processes=False) as engine:
        return [Answer(p, _run(engine, p, options, Drafting(False))[0]) for p in prompts]


def plan_of(options: argparse.Namespace, settings: Settings) -> Plan:
    """The pipeline of these settings, in this process."""
    choice = ModelChoice("smollm2-135m", None, None, offline=True)
    changes = replace(
        settings,
        devices=("cpu",),
        threads=options.threads,
        context=CONTEXT,
        dtype=options.dtype,
    )
    return make_plan(choice, changes, _note)


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=list(ARRANGEMENTS))
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.7, 1.0, 1.4])
    parser.add_argument("--scale", type=float, default=DEFAULT_TREE_SCALE, help="of the real runs")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--dtype", default="float32", help="of the real runs and their reference")
    return parser.parse_args(arguments)


def _save(report: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
