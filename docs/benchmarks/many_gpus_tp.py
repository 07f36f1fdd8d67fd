"""A worker of ``many_gpus.py``: one rank of tensor parallelism, as strong as torch makes it here.

A decode step (``many_gpus_layers.py``) is one CUDA graph; the host only launches. Variants:
``eager``, kernel by kernel as torch has them; ``compiled``, all between the products and
all-reduces through ``torch.compile``; ``one-shot``, compiled and with all-reduces that read the
other devices' memory in one kernel in place of NCCL's. The fastest one is the rival.
"""

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from many_gpus_jobs import Job, say, worker
from many_gpus_layers import (
    Decoder,
    Pieces,
    Rank,
    Reduce,
    add_norm,
    attend,
    check_shape,
    gate,
    needed_bytes,
)
from many_gpus_links import linger
from many_gpus_plan import spec_for
from torch import Tensor

from ppsd_cli.calibration_records import DeviceMemory
from ppsd_cli.runtime.memory_plan import available_memory, check_memory

_REPEATS = 3


def pieces_of(variant: str, decoder: Decoder, delay: float) -> Pieces:
    """The parts of a variant, behind a link with that delay."""
    rank = decoder.rank
    through = _one_shot(decoder) if variant == "one-shot" else _nccl

    def reduce(y: Tensor) -> Tensor:
        y = through(y)
        linger(delay, rank.device)
        return y

    if variant == "eager":
        return Pieces(add_norm, attend, gate, reduce)
    fast = partial(torch.compile, dynamic=False, fullgraph=True)
    return Pieces(fast(add_norm), fast(attend), fast(gate), reduce)


def _nccl(y: Tensor) -> Tensor:
    dist.all_reduce(y)
    return y


def _one_shot(decoder: Decoder) -> Reduce:
    """All-reduces over memory that every device can read."""
    import torch.distributed._symmetric_memory as symmetric

    group = dist.group.WORLD
    assert group is not None
    rank = decoder.rank
    shared = symmetric.empty(1, decoder.spec.hidden, dtype=rank.dtype, device=rank.device)
    symmetric.rendezvous(shared, group.group_name)

    def reduce(y: Tensor) -> Tensor:
        shared.copy_(y)
        return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", group.group_name)

    return reduce


def recorded(decoder: Decoder, pieces: Pieces) -> Callable[[], None]:
    """A step as a graph; on a CPU the step itself."""
    step = partial(decoder.step, pieces)
    if decoder.rank.device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    decoder.position.zero_()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may ask the device while this one records.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def timed(decoder: Decoder, step: Callable[[], None], job: Job) -> tuple[list[float], list[int]]:
    """Milliseconds per token of some answers to one prompt, and the answer's tokens."""
    prompt, times = prompt_of(decoder, job), []
    for _ in range(_REPEATS):
        decoder.begin(prompt, step)
        _wait(decoder.rank)
        dist.barrier()
        begin = perf_counter()
        for _ in range(job.setup.tokens):
            step()
        _wait(decoder.rank)
        times.append(1e3 * (perf_counter() - begin) / job.setup.tokens)
    first = len(prompt)
    return times, decoder.said[first : first + job.setup.tokens].tolist()


def repeats(decoder: Decoder, pieces: Pieces, job: Job, ids: Sequence[int]) -> bool:
    """Whether the first of a graph's tokens are those of single launches."""
    step, few = partial(decoder.step, pieces), min(8, job.setup.tokens)
    decoder.begin(prompt_of(decoder, job), step)
    for _ in range(few):
        step()
    first = job.setup.prompt
    return decoder.said[first : first + few].tolist() == list(ids[:few])


def prompt_of(decoder: Decoder, job: Job) -> list[int]:
    """Random token ids."""
    draws, size = torch.Generator().manual_seed(0), (job.setup.prompt,)
    return torch.randint(decoder.spec.vocabulary, size, generator=draws).tolist()


def _wait(rank: Rank) -> None:
    if rank.device.type == "cuda":
        torch.cuda.synchronize()


def try_variants(decoder: Decoder, job: Job, delay: float, variants: Sequence[str]) -> dict:
    """Times of every variant; what cannot run says why. All ranks fail or none does."""
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        try:
            pieces = pieces_of(variant, decoder, delay)
            times, ids = timed(decoder, recorded(decoder, pieces), job)
            found[variant] = {
                "token_ms": statistics.median(times),
                "token_ms_of_each": times,
                "token_ids": ids,
                "as_single_launches": None if delay else repeats(decoder, pieces, job, ids),
            }
        except Exception as error:  # noqa: BLE001 (a variant less is no reason to lose the others)
            found[variant] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        if decoder.rank.number == 0:
            told = {k: v for k, v in found[variant].items() if k != "token_ids"}
            say(f"{job.part.name} {variant}: {told}")
    return found


def figures_of(decoder: Decoder, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fastest variant, and all of them."""
    ran = {name: each for name, each in found.items() if "token_ms" in each}
    if not ran:
        raise RuntimeError(f"no variant ran: {found}")
    chosen = [min(ran, key=lambda name: ran[name]["token_ms"])]
    dist.broadcast_object_list(chosen)  # all ranks go on with the same one
    best = chosen[0]
    return {
        "token_ms": ran[best]["token_ms"],
        "tokens_per_second": 1e3 / ran[best]["token_ms"],
        "variant": best,
        "variants": found,
        "peak_memory": _peaks(decoder.rank),
    }


def _peaks(rank: Rank) -> list[int]:
    """Most bytes that each rank had allocated."""
    cuda = rank.device.type == "cuda"
    mine = torch.cuda.max_memory_allocated() if cuda else 0
    all_ranks = torch.zeros(rank.world, dtype=torch.int64, device=rank.device)
    all_ranks[rank.number] = mine
    dist.all_reduce(all_ranks)
    return all_ranks.tolist()


def join(number: int, world: int, *, meeting: str, cuda: bool, dtype: torch.dtype) -> Rank:
    """Meet the other ranks, by a file."""
    device = torch.device("cuda", number) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{meeting}",
        rank=number,
        world_size=world,
        device_id=device if cuda else None,
    )
    return Rank(number, world, device, dtype)


@torch.no_grad()
def work(job: Job) -> None:
    """Measure every link of this group of processes."""
    setup, world, cuda = job.setup, job.part.count, job.setup.devices > 0
    spec = spec_for(job.part.shape, setup.layers)
    check_shape(spec, world)
    dtype = torch.bfloat16 if cuda else torch.float32
    slots = -(-(setup.prompt + setup.tokens) // 64) * 64
    number = int(os.environ["RANK"])
    device = f"cuda:{number}" if cuda else "cpu"
    memory = DeviceMemory(
        device,
        needed_bytes(spec, Rank(number, world, torch.device(device), dtype), slots),
        available_memory(device),
    )
    check_memory((memory,), f"tensor parallelism over {world} ranks")
    rank = join(number, world, meeting=os.environ["MEETING"], cuda=cuda, dtype=dtype)
    decoder = Decoder(spec, rank, slots)
    variants: Sequence[str] = setup.variants
    for link in job.links:
        if link.through_host:
            variants = [name for name in variants if name != "one-shot"]
        figures = figures_of(decoder, try_variants(decoder, job, link.delay, variants))
        if rank.number == 0:
            job.tell(facts={"needed_bytes": memory.needed})
            job.link(link, figures)
        variants = [figures["variant"]] if link.through_host else variants
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # NCCL may wait forever for graphs with its collectives when it is taken down


if __name__ == "__main__":
    worker(work)
