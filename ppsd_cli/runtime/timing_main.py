"""A process that times parts of one stage: ``python -m ppsd_cli.runtime.timing_main CONTROL_FD``.

Started by ``runtime.timing_children``, one for each core share, so that each works while the
others do. torch is imported only after the pulse beats.
"""

import json
import os
import sys
from typing import Any

from ppsd_cli.runtime.control import PLAN, READY, RESULT, Channel
from ppsd_cli.runtime.stage_main import set_up


def main(control_fd: int) -> None:
    """Set this process up and answer windows of work until the driver is gone."""
    begun = set_up(control_fd)
    if begun is not None:
        _serve(*begun)


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
