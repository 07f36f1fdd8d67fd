"""What the device remembers of an answer, and the host's view of it.

Shapes: n stages, L last lag of the draft head (0 without deeper taps), S slots.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ppsd_cli.core.choose import signed_seed
from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.runtime.cuda.control import BOARD_FIELDS, LEDGER_FIELDS, LOG_FIELDS, TICKS
from ppsd_cli.runtime.cuda.launch import Noise, Stamp
from ppsd_cli.runtime.cuda.recorder import send


@dataclass(frozen=True, slots=True)
class Entry:
    """What the host knows of one tick, from the device's log; times in device nanoseconds."""

    tick: int
    arrived: int
    serial: int
    target: int
    live: int
    entered: int
    entered_serial: int
    position: int
    token: int
    drafted: int
    boundary_time: int
    entry_time: int
    stage_times: tuple[int, ...]
    """When each stage was done."""

    @classmethod
    def of(cls, log: list[int], stamps: list[int]) -> "Entry":
        """From rows of the log and of the stamps."""
        return cls(**dict(zip(LOG_FIELDS, log, strict=True)), stage_times=tuple(stamps))


class Board:
    """Control tensors of the pipeline; see ``control.py`` for the fields."""

    def __init__(
        self, *, stages: int, lags: int, slots: int, device: torch.device, width: int = 1
    ) -> None:
        """``width``: rows of a tick. ``slots``: those of the context; the next one is spare."""
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.stages, self.lags, self.trash = stages, lags, slots
        self.board = torch.zeros(len(BOARD_FIELDS), **whole)
        self.ledger = torch.zeros(TICKS, len(LEDGER_FIELDS), **whole)
        self.log = torch.zeros(TICKS, len(LOG_FIELDS), **whole)
        self.stamps = torch.zeros(TICKS, stages, **whole)
        self.place = torch.zeros(stages, width, 2, **whole)
        self.place[:, :, 1] = slots
        self.left_place = torch.zeros(1, 2, **whole)
        self.head_place = torch.zeros(2 + lags, 2, **whole)
        self.forced = torch.zeros(slots, **whole)
        self.noise = Noise(
            torch.zeros(1, **whole), torch.ones(1, dtype=torch.float32, device=device)
        )
        self._answers = 0

    def stamp(self, stage: int) -> Stamp:
        """Where a stage notes when it was done."""
        return Stamp(self.stamps, stage, self.board)

    def idle(self) -> None:
        """Nothing is due and nothing in flight: a tick now changes nothing that is ever seen."""
        self.board.zero_()
        self.ledger.zero_()

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """A prompt is in the caches and its first ``token`` is due at ``position``.

        Nothing of an earlier answer stays in flight. No copy here waits for the device.
        """
        self._answers += 1
        forced = request.forced_drafts or ()
        values = {
            "tick": 0,
            "epoch": self._answers << 32,
            "due": 1,
            "due_position": position,
            "due_token": token,
            "serial": serial,
            "drafting": int(request.drafting),
            "feed_limit": request.feed_limit,
            "forced": len(forced),
            "prompt_tokens": request.prompt_tokens,
        }
        send(self.board, [values.get(name, 0) for name in BOARD_FIELDS])
        self.ledger.zero_()
        if forced:
            send(self.forced[: len(forced)], forced)
        self.choose_noise(request.sampling)

    def choose_noise(self, sampling: Sampling) -> None:
        """The noise of an answer's tokens."""
        self.noise.seed.fill_(signed_seed(sampling.seed))
        self.noise.temperature.fill_(max(sampling.temperature, 1e-30))
