"""Which device each rank of ``torchrun`` takes, and whether a device is there."""

import os

import torch

from ppsd_cli.errors import ConfigError, ResourceError


def rank_devices(asked: tuple[str, ...] | None, *, stages: int) -> tuple[str, ...]:
    """A device for each stage, which is a rank: each as its own host calls it.

    ``cuda`` without a number, and no choice where there is a GPU, is the GPU of the rank's number
    on its host (``LOCAL_RANK``); where there are fewer GPUs, ranks share them in turn. One name
    serves all ranks. Only this rank's device can be checked here.
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
        check_device(devices[own], hint=f"; rank {own} takes it")
    return devices


def check_device(device: str, *, hint: str = "") -> None:
    """ResourceError where this machine has no such device."""
    if device == "cpu":
        return
    count = torch.cuda.device_count()
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise ResourceError(f"--devices {device}: this machine has {count} CUDA devices{hint}")


def sharing_notes(devices: tuple[str, ...]) -> list[str]:
    """Lines that a user should see where ranks of this host share a GPU."""
    here = devices[: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
    shared = [name for name in dict.fromkeys(here) if here.count(name) > 1]
    return [
        f"{here.count(name)} ranks share {name}, so what they exchange goes through the host's "
        f"memory; without torchrun, --devices {name} is faster"
        for name in shared
        if name != "cpu"
    ]


def _numbered(name: str, rank: int) -> str:
    """``cuda`` with the number of the GPU on the rank's host; hosts are taken to be alike."""
    if name != "cuda":
        return name
    number = rank % int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if rank == int(os.environ["RANK"]):
        number = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{number % max(1, torch.cuda.device_count())}"
