"""A process that times parts of one stage: ``python -m ppsd_cli.runtime.timing_main CONTROL_FD``.

Started by ``runtime.timing_children``, one for each core share, so that each works while the
others do. torch is imported only after the pulse beats.
"""

import json
import os
import signal
import socket
import sys
from typing import Any

from ppsd_cli.runtime.control import PLAN, READY, RESULT, SETUP, Channel
from ppsd_cli.runtime.heartbeat import Pulse, die_with
from ppsd_cli.runtime.stage_main import report_to


def main(control_fd: int) -> None:
    """Set this process up and answer windows of work until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    channel = Channel(socket.socket(fileno=control_fd))
    message = channel.receive()
    if message is None:
        return
    assert message[0] == SETUP
    setup = json.loads(message[1])
    if setup["die_with"] is not None:
        die_with(setup["die_with"])
    if setup["cores"] is not None:
        os.sched_setaffinity(0, setup["cores"])
    Pulse(channel).start()
    report_to(channel)
    _serve(setup, channel)


def _serve(setup: dict[str, Any], channel: Channel) -> None:
    import torch

    from ppsd_cli.runtime.pipeline import PipelineConfig
    from ppsd_cli.runtime.timing import Parts, Window, Work

    config = PipelineConfig.from_json(setup["config"])
    torch.set_num_threads(config.threads)
    torch.set_num_interop_threads(1)
    parts = Parts(config, setup["stage"], tuple(setup["heads"]))
    channel.send(READY)
    while (message := channel.receive()) is not None:
        assert message[0] == PLAN
        asked = json.loads(message[1])
        work = None if asked["work"] is None else Work(**asked["work"])
        times = parts.run(work, Window(**asked["window"]))
        channel.send(RESULT, json.dumps(times).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)
