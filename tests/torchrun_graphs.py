"""What each rank runs in the tests of the CUDA engine under torchrun: MODEL JOBS OUTPUT.

JOBS is a JSON file: pipelines one after the other, each with its answers. Rank 0 pickles the runs
of each pipeline into OUTPUT, and the error that the last one ends with. ``grouped``: exchanges as
NCCL has them, in a group of gloo (on CPUs). ``fails``: the last rank runs out of memory at the
order of that number. ``slow``: rank 0 takes so many seconds to notice that exchanges broke, and
half as many to write, and a signal of torchrun ends it meanwhile. ``fault``: one of ``FAULTS`` in
what ranks send; an answer that fails an assertion of the engine is None.
"""

import json
import pickle
import signal
import sys
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from time import sleep
from typing import Any

import torch
import torch.distributed as dist
import triton_cpu

triton_cpu.claim()

from cuda_cases import CHUNK, CONTEXT, ask, prompt  # noqa: E402
from models import MODEL_HASH, Run  # noqa: E402

from ppsd_cli.core.plan import Sampling  # noqa: E402
from ppsd_cli.errors import PpsdError  # noqa: E402
from ppsd_cli.runtime.cuda import rank_build, rank_crew, rank_runner  # noqa: E402
from ppsd_cli.runtime.cuda.rank_crew import RankCrew  # noqa: E402
from ppsd_cli.runtime.cuda.rank_links import GroupedLinks, Letter  # noqa: E402
from ppsd_cli.runtime.cuda.rank_runner import Follower  # noqa: E402
from ppsd_cli.runtime.pipeline import PipelineConfig  # noqa: E402
from ppsd_cli.runtime.store_watch import StoreWatch, leave  # noqa: E402
from ppsd_cli.runtime.torchrun import JoinedRunner, is_worker, join, serve_as_rank  # noqa: E402

_HOST_LINKS, _GOES = rank_build.links_of, RankCrew._goes


def main(model: str, told: str, output: str) -> None:
    jobs = json.loads(Path(told).read_text())
    configs = [settings(model, job) for job in jobs]

    def serve(watch: StoreWatch) -> None:
        for config, job in zip(configs, jobs, strict=True):
            prepare(job)
            if "fails" in job and dist.get_rank() == config.stages - 1:
                fail_at(job["fails"])
            rank_build.follow(config, watch)

    if is_worker():
        serve_as_rank(configs[0], serve, engine=rank_build.ENGINE)
        return
    if "fails" in jobs[-1] and "slow" not in jobs[-1]:
        # torchrun ends rank 0 a moment after the rank that fails; a busy machine needs longer.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch = join(configs[0], leave, engine=rank_build.ENGINE)
    runs, error = [], None
    try:
        for config, job in zip(configs, jobs, strict=True):
            prepare(job)
            lead = rank_build.Lead(config, watch, leave)
            runner = JoinedRunner(lead.runner, watch, stop=lead.stop)
            runs.append(answers(runner, job))
            lead.stop()
    except PpsdError as raised:
        error = f"{type(raised).__name__}: {raised}"
        sleep(jobs[-1].get("slow", 0) / 2)
    Path(output).write_bytes(pickle.dumps((runs, error)))
    if error is None:
        watch.finish()
        dist.destroy_process_group()


def fail_at(count: int) -> None:
    """Have this rank fail at its order of that number."""
    follow, orders = Follower.follow, []

    def fails(self: Follower, plan: object) -> None:
        orders.append(plan)
        if len(orders) == count:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        follow(self, plan)

    Follower.follow = fails


def answers(runner: JoinedRunner, job: dict[str, Any]) -> list[Run | None]:
    runs: list[Run | None] = []
    for options in job["answers"]:
        try:
            runs.append(answer(runner, **options))
        except AssertionError:
            if "fault" not in job:
                raise
            runs.append(None)
    return runs


def late_letters(self: RankCrew, row: int, keeps: bool) -> list[Letter]:
    """The letter of the tick before goes on with the states."""
    letters = _GOES(self, row, keeps)
    if self._onward is not None:
        letters[1] = (self.rank + 1, self._onward.header[1 - row % 2])
    return letters


def no_targets(self: RankCrew, row: int, keeps: bool) -> list[Letter]:
    """Targets stay where they are; what comes home in their place is 0."""
    return _without(self, row, keeps, "header")


def no_states(self: RankCrew, row: int, keeps: bool) -> list[Letter]:
    """The same with tapped states."""
    return _without(self, row, keeps, "states")


def _without(crew: RankCrew, row: int, keeps: bool, name: str) -> list[Letter]:
    letters, box = _GOES(crew, row, keeps), crew._homeward
    if box is None:
        return letters
    kept = getattr(box, name)[row % 2].data_ptr()
    return [(peer, torch.zeros_like(t) if t.data_ptr() == kept else t) for peer, t in letters]


FAULTS = {"late letters": late_letters, "no targets": no_targets, "no states": no_states}


def settings(model: str, job: dict[str, Any]) -> PipelineConfig:
    split, devices = tuple(job["split"]), tuple(job["devices"])
    most = {
        name: max(options.get(name, 1) for options in job["answers"]) for name in ("width", "depth")
    }
    return PipelineConfig(
        model, MODEL_HASH, split, devices, job["dtype"], CONTEXT, CHUNK, job["head"], **most
    )


def prepare(job: dict[str, Any]) -> None:
    """Links and faults of a job, on any rank."""
    rank_build.links_of = _grouped_links if job.get("grouped", False) else _HOST_LINKS
    RankCrew._goes = FAULTS[job["fault"]] if "fault" in job else _GOES
    if "slow" in job:
        # Behind NCCL rank 0 waits outside of what holds signals.
        rank_crew._LOSS_SECONDS, rank_runner._Held = job["slow"], nullcontext


def _grouped_links(_config: PipelineConfig, _watch: StoreWatch) -> GroupedLinks:
    group = dist.new_group(backend="gloo")
    links = GroupedLinks(group)
    links.close = lambda: dist.destroy_process_group(group)
    links.abort = lambda: _break_off(group)
    return links


def _break_off(group: dist.ProcessGroup) -> None:
    """Break the connection to rank 0, as a wait of gloo does that takes too long; its abort breaks
    none.
    """
    if group.rank() > 0:
        with suppress(RuntimeError):
            never = dist.irecv(torch.zeros(1), 0, group=group, tag=9)
            never.wait(timedelta(milliseconds=1))


def answer(runner: Any, *, length: int, seed: int = 1, sampling: Any = None, **options: Any) -> Run:
    """One answer, of settings that JSON can hold."""
    if sampling is not None:
        options["sampling"] = Sampling(**sampling)
    for name in {"forced", "ranks"} & options.keys():
        options[name] = tuple(options[name])
    return ask(runner, prompt(length, seed=seed), **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert torch.cuda.is_available() or triton_cpu.missing() is None
    main(*sys.argv[1:])
