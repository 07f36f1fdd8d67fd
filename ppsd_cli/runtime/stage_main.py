"""The process of one stage: ``python -m ppsd_cli.runtime.stage_main CONTROL_FD LISTEN_FD``.

Started by ``runtime.children``; settings come over the control channel. torch is imported only
after the pulse beats, and nothing is imported that stages do not need.
"""

import json
import os
import signal
import socket
import sys
import traceback
from types import TracebackType
from typing import Any

from ppsd_cli.runtime.control import FAILED, PLAN, READY, RESULT, SETUP, Channel
from ppsd_cli.runtime.failures import pack_failure
from ppsd_cli.runtime.heartbeat import Pulse, die_with


def main(control_fd: int, listen_fd: int) -> None:
    """Set this process up and run its stage until the driver is gone."""
    begun = set_up(control_fd)
    if begun is not None:
        _run(*begun, listen_fd)


def set_up(control_fd: int) -> tuple[dict[str, Any], Channel] | None:
    """Take this process's settings from the driver, and let it know how this process fares.

    None where the driver is gone before it has sent any.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    channel = Channel(socket.socket(fileno=control_fd))
    message = channel.receive()
    if message is None:
        return None
    assert message[0] == SETUP
    setup = json.loads(message[1])
    if setup["die_with"] is not None:
        die_with(setup["die_with"])
    if setup["cores"] is not None:
        os.sched_setaffinity(0, setup["cores"])
    if setup["shares_core"]:
        _wait_for_turns()
    Pulse(channel).start()
    _report_to(channel)
    return setup, channel


def _wait_for_turns() -> None:
    """Have the kernel let a process that wakes wait until the one at work is done or has used up
    its slice.

    gloo's thread asks for a connection's lock again and again while the sender holds it. A stage
    that woke in the middle of a send to it would halt the sender there, and both would share the
    core with that thread until the sender's next slice: 3 to 5 ms of a 30 ms token.
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _report_to(channel: Channel) -> None:
    """Have whatever ends this process told to the driver."""

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        traceback.print_exception(kind, error, trace)
        sys.stderr.flush()
        channel.send(FAILED, pack_failure(error))
        os._exit(1)

    sys.excepthook = report


def _run(setup: dict[str, Any], channel: Channel, listen_fd: int) -> None:
    import torch

    from ppsd_cli.runtime.group import join_local
    from ppsd_cli.runtime.links import serve
    from ppsd_cli.runtime.pipeline import PipelineConfig, load_worker

    config = PipelineConfig.from_json(setup["config"])
    stage = setup["stage"]
    torch.set_num_threads(config.threads)
    torch.set_num_interop_threads(1)
    worker = load_worker(config, stage)
    with torch.inference_mode():
        if stage:
            join_local(stage, config.stages, port=setup["port"])
            channel.send(READY)
            serve(config, worker)
        else:
            _lead(config, worker, channel, (setup["port"], listen_fd))


def _lead(config: Any, worker: Any, channel: Channel, listening: tuple[int, int]) -> None:
    """Stage 0: answer the driver's plans, in order."""
    from ppsd_cli.runtime.front import Front
    from ppsd_cli.runtime.group import join_local
    from ppsd_cli.runtime.links import FrontLink
    from ppsd_cli.runtime.messages import pack_result, unpack_plan
    from ppsd_cli.runtime.pipeline import load_head, returning_stages

    head = load_head(config, worker.stage)
    port, listen_fd = listening
    join_local(0, config.stages, port=port, listen_fd=listen_fd)
    link = FrontLink(config, worker)
    front = Front(worker, head, link, returning=returning_stages(config))
    channel.send(READY)
    while (message := channel.receive()) is not None:
        assert message[0] == PLAN
        channel.send(RESULT, *pack_result(front.tick(unpack_plan(message[1]))))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # gloo's threads need no farewell
