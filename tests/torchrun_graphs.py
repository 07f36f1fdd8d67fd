"""What each rank runs in the tests of the CUDA engine under torchrun: MODEL HEADS JOBS OUTPUT.

JOBS is a JSON file: pipelines one after the other, each with its answers. Rank 0 pickles the runs
of each pipeline into OUTPUT.
"""

import json
import pickle
import sys
from pathlib import Path

import torch
import triton_cpu

triton_cpu.claim()

from cuda_cases import CHUNK, CONTEXT, ask, prompt  # noqa: E402

from ppsd_cli.core.plan import Sampling  # noqa: E402
from ppsd_cli.runtime.pipeline import PipelineConfig  # noqa: E402
from ppsd_cli.runtime.store_watch import leave  # noqa: E402


def main(model: str, jobs: str, output: str) -> None:
    from ppsd_cli.runtime.cuda.rank_build import ENGINE, Lead, follow
    from ppsd_cli.runtime.torchrun import is_worker, join, serve_as_rank

    configs = [
        PipelineConfig(
            folder=model,
            model_hash=job["model_hash"],
            split=tuple(job["split"]),
            devices=("cpu",) * len(job["split"]),
            dtype="float32",
            slots=CONTEXT,
            chunk=CHUNK,
            head=job["head"],
        )
        for job in json.loads(Path(jobs).read_text())
    ]
    if is_worker():
        serve_as_rank(
            configs[0], lambda watch: [follow(c, watch) for c in configs] and None, engine=ENGINE
        )
        return
    watch = join(configs[0], leave, engine=ENGINE)
    runs = []
    for config, job in zip(configs, json.loads(Path(jobs).read_text()), strict=True):
        lead = Lead(config, watch, leave)
        runs.append([answer(lead.runner, **options) for options in job["answers"]])
        lead.stop()
    watch.finish()
    Path(output).write_bytes(pickle.dumps(runs))
    torch.distributed.destroy_process_group()


def answer(runner, *, length, seed=1, sampling=None, forced=None, **options):
    """One answer, with what JSON cannot hold."""
    if sampling is not None:
        options["sampling"] = Sampling(**sampling)
    if forced is not None:
        options["forced"] = tuple(forced)
    return ask(runner, prompt(length, seed=seed), **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert triton_cpu.missing() is None
    main(*sys.argv[1:])
