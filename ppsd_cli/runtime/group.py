"""Joining the process group: between processes of this host, on the loopback device only."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

FOREVER = timedelta(days=365)
"""Stages wait for the next frame as long as the user likes; failures show by other means."""


def join_local(stage: int, stages: int, *, port: int, listen_fd: int | None = None) -> None:
    """Join the group of the stages on this host.

    Stage 0 serves the rendezvous on ``listen_fd``, which is bound to 127.0.0.1:``port``: by
    itself TCPStore would listen on all interfaces.
    """
    bind_to_loopback()
    store = TCPStore(
        "127.0.0.1",
        port,
        stages,
        is_master=stage == 0,
        timeout=FOREVER,
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
    dist.init_process_group("gloo", store=store, rank=stage, world_size=stages, timeout=FOREVER)


def bind_to_loopback() -> None:
    """Have gloo and NCCL listen and connect on the loopback device. Before the group is joined."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = names[0] if names else "lo"
