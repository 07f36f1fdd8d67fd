"""What each rank runs in the tests of the CUDA engine under torchrun: MODEL JOBS OUTPUT.

JOBS is a JSON file: pipelines one after the other, each with its answers. Rank 0 pickles the runs
of each pipeline into OUTPUT, and the error that the last one ends with. ``grouped``: exchanges as
NCCL has them, in a group of gloo (on CPUs). ``fails``: the last rank runs out of memory at the
order of that number.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton_cpu

triton_cpu.claim()

from cuda_cases import CHUNK, CONTEXT, ask, prompt  # noqa: E402
from models import MODEL_HASH, Run  # noqa: E402

from ppsd_cli.core.plan import Sampling  # noqa: E402
from ppsd_cli.errors import PpsdError  # noqa: E402
from ppsd_cli.runtime.cuda import rank_build  # noqa: E402
from ppsd_cli.runtime.cuda.rank_links import GroupedLinks  # noqa: E402
from ppsd_cli.runtime.cuda.rank_runner import Follower  # noqa: E402
from ppsd_cli.runtime.pipeline import PipelineConfig  # noqa: E402
from ppsd_cli.runtime.store_watch import StoreWatch, leave  # noqa: E402
from ppsd_cli.runtime.torchrun import JoinedRunner, is_worker, join, serve_as_rank  # noqa: E402

_HOST_LINKS = rank_build.links_of


def main(model: str, told: str, output: str) -> None:
    jobs = json.loads(Path(told).read_text())
    configs = [settings(model, job) for job in jobs]

    def serve(watch: StoreWatch) -> None:
        for config, job in zip(configs, jobs, strict=True):
            choose_link(job)
            if "fails" in job and dist.get_rank() == config.stages - 1:
                fail_at(job["fails"])
            rank_build.follow(config, watch)

    if is_worker():
        serve_as_rank(configs[0], serve, engine=rank_build.ENGINE)
        return
    watch = join(configs[0], leave, engine=rank_build.ENGINE)
    runs = []
    try:
        for config, job in zip(configs, jobs, strict=True):
            choose_link(job)
            lead = rank_build.Lead(config, watch, leave)
            runner = JoinedRunner(lead.runner, watch, stop=lead.stop)
            runs.append([answer(runner, **options) for options in job["answers"]])
            lead.stop()
    except PpsdError as error:
        Path(output).write_bytes(pickle.dumps((runs, f"{type(error).__name__}: {error}")))


def fail_at(count: int) -> None:
    """Have this rank fail at its order of that number."""
    follow, orders = Follower.follow, []

    def fails(self: Follower, plan: object) -> None:
        orders.append(plan)
        if len(orders) == count:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        follow(self, plan)

    Follower.follow = fails


def settings(model: str, job: dict[str, Any]) -> PipelineConfig:
    split, devices = tuple(job["split"]), tuple(job["devices"])
    return PipelineConfig(
        model, MODEL_HASH, split, devices, job["dtype"], CONTEXT, CHUNK, job["head"]
    )


def choose_link(job: dict[str, Any]) -> None:
    grouped = job.get("grouped", False)
    rank_build.links_of = _grouped_links if grouped else _HOST_LINKS


def _grouped_links(_config: PipelineConfig, _watch: StoreWatch) -> GroupedLinks:
    group = dist.new_group(backend="gloo")
    links = GroupedLinks(group)
    links.close = lambda: dist.destroy_process_group(group)
    return links


def answer(runner: Any, *, length: int, seed: int = 1, sampling: Any = None, **options: Any) -> Run:
    """One answer, of settings that JSON can hold."""
    if sampling is not None:
        options["sampling"] = Sampling(**sampling)
    if "forced" in options:
        options["forced"] = tuple(options["forced"])
    return ask(runner, prompt(length, seed=seed), **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert torch.cuda.is_available() or triton_cpu.missing() is None
    main(*sys.argv[1:])
