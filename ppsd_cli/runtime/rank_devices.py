"""Which device each rank of ``torchrun`` takes, and whether a device is there."""

import os

import torch

from ppsd_cli.errors import ConfigError, ResourceError


def rank_devices(asked: tuple[str, ...] | None, *, stages: int) -> tuple[str, ...]:
    """A device for each stage, which is a rank: each as its own host calls it.

    ``cuda`` without a number, and no choice where there is a GPU, is the GPU of the rank's number
    on its host (``LOCAL_RANK``). One name serves all ranks. Only this rank's device can be checked
    here.
    """
    if asked is None:
        asked = ("cuda" if torch.cuda.is_available() else "cpu",)
    if len(asked) == 1:
        asked = asked * stages
    if len(asked) != stages:
        raise ConfigError(
            f"--devices names {len(asked)} devices for {stages} stages; "
            "name one for all, or one for each stage"
        )
    devices = tuple(_numbered(name, stage) for stage, name in enumerate(asked))
    own = int(os.environ["RANK"])
    if own < stages:
        check_device(devices[own], hint=f"; rank {own} takes it, start fewer ranks on this host")
    return devices


def check_device(device: str, *, hint: str = "") -> None:
    """ResourceError where this machine has no such device."""
    if device == "cpu":
        return
    count = torch.cuda.device_count()
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise ResourceError(f"--devices {device}: this machine has {count} CUDA devices{hint}")


def _numbered(name: str, rank: int) -> str:
    """``cuda`` with the number of the GPU on the rank's host; hosts have equally many ranks."""
    if name != "cuda":
        return name
    if rank == int(os.environ["RANK"]):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return f"cuda:{rank % int(os.environ.get('LOCAL_WORLD_SIZE', '1'))}"
