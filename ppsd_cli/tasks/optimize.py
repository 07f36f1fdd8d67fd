"""AdamW over several heads, each with its own learning rate and clipping, and the schedule.

A second level is clipped by itself, so that it leaves its head's steps as they are.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ppsd_cli.tasks.head_init import TrainableHead

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_FLOOR = 0.05


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then a cosine to 5%, over steps or time, whichever is further on."""

    steps: int
    warmup: int
    time_limit: float | None = None

    def factor(self, step: int, elapsed: float) -> float:
        """Share of the learning rate at ``step`` (from 0), ``elapsed`` seconds into training."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        done = min(1.0, self.progress(step, elapsed))
        return warm * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))

    def progress(self, step: int, elapsed: float) -> float:
        """How much of the training is done, 1 or more at its end."""
        by_time = elapsed / self.time_limit if self.time_limit else 0.0
        return max(step / self.steps, by_time)


class Optimizer:
    """One AdamW with a parameter group for each head, and for each second level."""

    def __init__(self, heads: Sequence[TrainableHead], weight_decay: float) -> None:
        parts = [(head.plan.lr, part) for head in heads for part in head.parts() if part]
        self._groups, self._rates = [part for _, part in parts], [lr for lr, _ in parts]
        fused = self._groups[0][0].device.type != "cpu"
        self.adam = torch.optim.AdamW(
            [
                {"params": group, "lr": rate}
                for group, rate in zip(self._groups, self._rates, strict=True)
            ],
            betas=_BETAS,
            weight_decay=weight_decay,
            fused=fused,
        )

    def step(self, factor: float) -> Tensor:
        """Clip and apply the gradients at ``factor`` of each rate; gradient norms [groups]."""
        average_gradients([p for group in self._groups for p in group])
        norms = [torch.nn.utils.clip_grad_norm_(group, _CLIP) for group in self._groups]
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return torch.stack(norms)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one parameter: ``exp_avg``, ``exp_avg_sq``, ``step``."""
        state: dict[str, Tensor] = self.adam.state.get(parameter, {})
        return state

    def restore(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Put back what ``moments`` gave."""
        step = moments["step"]
        if self.adam.param_groups[0]["fused"]:
            step = step.to(parameter.device)
        self.adam.state[parameter] = {
            "step": step.clone(),
            "exp_avg": moments["exp_avg"].to(parameter.device),
            "exp_avg_sq": moments["exp_avg_sq"].to(parameter.device),
        }


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of ``torchrun``; one of one without it."""

    rank: int
    size: int

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Join the processes that ``torchrun`` started, if it did."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size < 2:
            return cls(0, 1)
        if not dist.is_initialized():
            import datetime

            backend = dist.get_default_backend_for_device(device)
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=3))
        return cls(dist.get_rank(), dist.get_world_size())

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """The end of what ``join`` began."""
        if self.size > 1:
            dist.destroy_process_group()

    def highest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each value over all processes: clocks and stop flags must agree."""
        if self.size < 2:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Make every process's gradients the mean of all; one transfer."""
    if not dist.is_initialized() or dist.get_world_size() < 2:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
