"""What a run was measured on, as names and values for people and for comparisons."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from ppsd_cli import __version__
from ppsd_cli.runtime.children import allowed_cores


def environment(devices: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Machine and versions; what cannot be read is left out."""
    cores, gpus = allowed_cores(), _gpus(devices)
    values = {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": str(os.cpu_count() if cores is None else len(cores)),
        "cpu_mhz": _from_cpuinfo("cpu MHz"),
        "memory_bytes": _memory(),
        "load_before": _load(),
        "gpus": ", ".join(gpus),
        "ppsd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpus else None,
        "transformers": _version("transformers"),
        "kernel": ".".join(platform.release().split(".")[:2]),
    }
    return tuple((name, value) for name, value in values.items() if value)


def cpu_name() -> str:
    """The processor, as the system calls it."""
    return _from_cpuinfo("model name") or platform.processor()


def _from_cpuinfo(field: str) -> str | None:
    """The first value of a field of /proc/cpuinfo (the clock is that of this moment)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        return None
    return None


def _memory() -> str | None:
    try:
        return str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return None


def _load() -> str | None:
    """Processes that wanted to run in the last minute: other work spoils times."""
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (AttributeError, OSError):
        return None


def _gpus(devices: Sequence[str]) -> list[str]:
    """Name, memory and highest clock of each GPU that is used."""
    found = []
    for device in sorted({each for each in devices if each.startswith("cuda")}):
        facts = torch.cuda.get_device_properties(device)
        found.append(f"{device} {facts.name} {facts.total_memory >> 30} GiB{_clock(facts)}")
    return found


def _clock(facts: object) -> str:
    kilohertz = getattr(facts, "clock_rate", None)  # newer versions of torch have it
    return f" {kilohertz // 1000} MHz" if isinstance(kilohertz, int) else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
