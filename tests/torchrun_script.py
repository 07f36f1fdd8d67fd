"""What each rank runs in the tests of torchrun: MODEL OUTPUT MODE.

Rank 0 writes its events and every rank its process id beside OUTPUT. MODE: ``once``; ``hold``
answers until it is ended; ``wrong-count`` and ``bad-device`` fail.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from distributed_models import answer, settings, timeless

from ppsd_cli.errors import PpsdError
from ppsd_cli.runtime.torchrun import is_worker, join_warnings, joined_runner, serve_worker


def main(model: str, output: str, mode: str) -> int:
    split = (1, 2, 1) if mode == "wrong-count" else (2, 2)
    config = settings(Path(model), split)
    if mode == "bad-device":
        # torchrun ends rank 0 a moment after the rank that fails; it may still be loading then.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        config = replace(config, devices=("cpu", "nonsense"))
    rank = os.environ["RANK"]
    Path(f"{output}.pid{rank}").write_text(str(os.getpid()))
    try:
        if is_worker():
            serve_worker(config)
            return 0
        runner = joined_runner(config)
        events = [timeless(event) for event in answer(runner)]
        again = [timeless(event) for event in answer(runner)]
        Path(output).write_text(json.dumps([repr(events), repr(again), join_warnings()]))
        while mode == "hold":
            answer(runner)
        runner.close()
        runner.close()
    except PpsdError as error:
        Path(f"{output}.error{rank}").write_text(f"{type(error).__name__}: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
