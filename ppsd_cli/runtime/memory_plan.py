"""What a pipeline needs of each device and what there is, before any weights load."""

import torch

from ppsd_cli.calibration_records import DeviceMemory
from ppsd_cli.errors import ResourceError
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.placement import layer_parameters

_GIB = 1 << 30
_WORK = 64 << 20
"""For activations, rotary tables and logits of one stage."""


def plan_memory(
    spec: ModelSpec, config: PipelineConfig, *, blocks: int = 0, draft_vocab: int | None = None
) -> tuple[DeviceMemory, ...]:
    """Bytes of layers, caches, embedding, head and LM matrix on each device of a pipeline.

    ``blocks``, ``draft_vocab``: size of the draft head; no vocabulary of its own: it shares the
    model's LM matrix.
    """
    size = getattr(torch, config.dtype).itemsize
    matrix = spec.vocabulary * spec.hidden * size
    layer = layer_parameters(spec) * size
    cache = 2 * spec.kv_heads * spec.head_dim * config.cache_slots * size
    needed: dict[str, int] = {}
    last = config.stages - 1
    for stage, device in enumerate(config.devices):
        total = config.split[stage] * (layer + cache) + _WORK
        ends = int(stage == 0) + int(stage == last and not (spec.tied and last == 0))
        total += ends * matrix
        if stage == 0 and config.head is not None:
            own = 0 if draft_vocab is None else draft_vocab * spec.hidden * size
            shared = matrix if draft_vocab is None and not spec.tied else 0
            total += blocks * (2 * layer + cache) + own + shared
        needed[device] = needed.get(device, 0) + total
    return tuple(DeviceMemory(d, n, available_memory(d)) for d, n in needed.items())


def check_memory(plan: tuple[DeviceMemory, ...], doing: str) -> None:
    """ResourceError, in one line, where a device has less than is needed."""
    for each in plan:
        if each.available is not None and each.needed > each.available:
            raise ResourceError(
                f"{doing}: {each.device} needs {each.needed / _GIB:.1f} GiB and has "
                f"{each.available / _GIB:.1f} GiB free; use a smaller --context, another --dtype "
                "or more --devices"
            )


def fits(plan: tuple[DeviceMemory, ...]) -> bool:
    """Whether every device has what is needed, as far as that is known."""
    return all(each.available is None or each.needed <= each.available for each in plan)


def available_memory(device: str) -> int | None:
    """Free bytes of a device now; None where nobody says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None
