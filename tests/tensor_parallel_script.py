"""Tensor parallelism over forked gloo ranks against the same layers in one process; run by a test.

Usage: tensor_parallel_script.py FOLDER WORLD [WORLD ...]. Prints one line of JSON: for each number
of ranks the largest difference of logits, also with planted faults, and whether the text is equal.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # torch's sharding needs it: once here in place of once in every rank
import torch.distributed as dist
from many_gpus_layers import Decoder, Pieces, Rank, add_norm, attend, gate
from many_gpus_tp import join, pieces_of
from torch import Tensor

from ppsd_cli.model.cache import Rows
from ppsd_cli.model.load import Loader
from ppsd_cli.model.random_weights import RandomCheckpoint
from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.model.stage import Stage, StageRange

CPU, SLOTS, NEW = torch.device("cpu"), 32, 4
SPEC = replace(SHAPES["tiny"], layers=2, windows=(None,) * 2, heads=8, kv_heads=4)
PROMPT = [(11 * i * i + 5) % SPEC.vocabulary for i in range(6)]


def reference() -> tuple[list[int], Tensor]:
    """The greedy text, and the logits [T, V] of all its tokens, by one stage in one pass each."""
    loader = Loader(RandomCheckpoint(SPEC, 0, CPU), SPEC, torch.float32, CPU)
    stage = Stage.load(loader, StageRange(0, SPEC.layers, SPEC.layers), slots=SLOTS)
    assert stage.output is not None
    ids = list(PROMPT)
    for _ in range(NEW + 1):
        rows = Rows.chain(0, len(ids))
        logits = stage.output.logits(stage.forward(stage.embed(torch.tensor(ids)), rows)[0])
        ids.append(int(logits[-1].argmax()))
    return ids[:-1], logits


def fed(decoder: Decoder, ids: list[int], pieces: Pieces, late: int = 0) -> Tensor:
    """Logits [T, V] of a text that is given token by token; ``late``: at a wrong position."""
    rows = []
    for position, token in enumerate(ids):
        decoder.token.fill_(token)
        decoder.position.fill_(position + late)
        mine = decoder.logits(pieces)
        every = [torch.empty_like(mine) for _ in range(decoder.rank.world)]
        dist.all_gather(every, mine)
        rows.append(torch.cat(every, dim=-1))
    return torch.cat(rows)


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


@torch.no_grad()
def check(rank: Rank) -> dict[str, float | bool]:
    """One number of ranks."""
    ids, expected = reference()
    decoder = Decoder(SPEC, rank, SLOTS)
    right = pieces_of("eager", decoder, 0.0)
    alone = Pieces(add_norm, attend, gate, lambda y: y)
    found: dict[str, float | bool] = {"difference": off(fed(decoder, ids, right), expected)}
    decoder.begin(PROMPT, partial(decoder.step, right))
    for _ in range(NEW - 1):
        decoder.step(right)
    said = decoder.said[len(PROMPT) : len(PROMPT) + NEW].tolist()
    found["same_text"] = said == ids[len(PROMPT) :]
    found["without_all_reduce"] = off(fed(decoder, ids, alone), expected)
    found["at_another_slot"] = off(fed(decoder, ids, right, late=1), expected)
    return found


def ranks(world: int, folder: Path, work: Callable[[Rank], dict[str, float | bool]]) -> dict:
    """What rank 0 of ``world`` forked processes finds."""
    out, children = folder / f"{world}.json", []
    for number in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        meeting = str(folder / f"meet-{world}")
        rank = join(number, world, meeting=meeting, cuda=False, dtype=torch.float32)
        found = work(rank)
        if number == 0:
            out.write_text(json.dumps(found))
        dist.barrier()
        os._exit(0)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    return json.loads(out.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sys.stdout.write(json.dumps({w: ranks(int(w), folder, check) for w in sys.argv[2:]}) + "\n")
