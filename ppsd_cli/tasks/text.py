"""Training text written by the model itself: it asks, answers and goes on until the context ends.

Rows of a round run in lockstep (``batch_decode``). A row is a little state machine on the device:
free tokens are sampled, the glue of the chat template is forced. Questions are sampled at
temperatures from 0.7 to 1.0; half of the rows answer greedily, half at their question's
temperature. A base model writes documents at temperature 1.

Shapes: B rows, S positions, G glue tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppsd_cli.model.one_pass import PLAIN, Backbone, Pieces, compiled
from ppsd_cli.tasks.batch_decode import LockstepDecoder
from ppsd_cli.tasks.chat import ChatGlue

_SHORTEST_QUESTION = 4
_LONGEST_QUESTION = 128
_GREEDY_LIMIT = 320
_SAMPLED_LIMIT = 1024
_REPORT_EVERY = 16


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """One round: ``rows`` texts of ``length`` tokens, random numbers from ``seed``."""

    rows: int
    length: int
    seed: int


@dataclass(frozen=True, slots=True)
class Round:
    """Texts of one round, on the CPU: token ids [B, S] and which of them answer [B, S]."""

    token_ids: Tensor
    answers: Tensor
    greedy: Tensor


def write_round(
    backbone: Backbone,
    glue: ChatGlue,
    plan: RoundPlan,
    *,
    pieces: Pieces = PLAIN,
    progress: Callable[[int], bool] | None = None,
) -> Round | None:
    """Let the model write one round. ``progress`` gets the tokens written since its last call
    and returns False to stop, which gives None."""
    decoder = LockstepDecoder(backbone, rows=plan.rows, length=plan.length, pieces=pieces)
    writer = _Writer(glue, plan, backbone.device, fuse=pieces != PLAIN)
    for position in range(plan.length - 1):
        writer.take(position, decoder.step(writer.token_ids[:, position], position))
        if progress is not None and (position + 1) % _REPORT_EVERY == 0:
            _wait(backbone.device)
            if not progress(plan.rows * _REPORT_EVERY):
                return None
    return Round(writer.token_ids.cpu(), writer.answers.cpu(), (writer.temperature == 0).cpu())


def free_memory(device: torch.device) -> None:
    """Give cached memory of finished rounds back, for what follows in other sizes."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def _wait(device: torch.device) -> None:
    """Let the device catch up, so that progress is real and the queue stays short."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


class _Writer:
    """State of all rows of a round, on the device; nothing of it is read by the host."""

    def __init__(self, glue: ChatGlue, plan: RoundPlan, device: torch.device, *, fuse: bool):
        self._chat, self._plan = glue.chat, plan
        self._generator = torch.Generator(device).manual_seed(plan.seed)
        self._glue = _glue_table(glue).to(device)  # [4, G]
        self._ends = torch.tensor(glue.ends, dtype=torch.int64, device=device)
        self._banned = torch.tensor(glue.banned, dtype=torch.int64, device=device)
        self._pick = compiled(_pick) if fuse else _pick
        rows, width = plan.rows, self._glue.shape[1]
        size = (rows, plan.length + width + 1)
        self._forced = torch.full(size, -1, dtype=torch.int64, device=device)
        opening = torch.tensor(glue.opening, device=device)[: plan.length]
        self._forced[:, : len(opening)] = opening
        self.token_ids = torch.zeros(rows, plan.length, dtype=torch.int64, device=device)
        self.token_ids[:, 0] = opening[0]
        self.answers = torch.zeros(rows, plan.length, dtype=torch.bool, device=device)
        row = torch.arange(rows, device=device)
        warm = 0.7 + 0.3 * torch.rand(rows, generator=self._generator, device=device)
        self._warm = warm if glue.chat else torch.ones_like(warm)
        self.temperature = torch.where((row % 2 == 0) & glue.chat, 0.0, self._warm)
        self._limit = torch.where(row % 2 == 0, _GREEDY_LIMIT, _SAMPLED_LIMIT)
        self._answering = torch.full((rows,), not glue.chat, device=device)
        self._length = torch.zeros(rows, dtype=torch.int64, device=device)

    def take(self, position: int, logits: Tensor) -> None:
        """Choose the token of ``position + 1`` from logits [B, V] and move the rows' states on."""
        sampled = self._sample(logits)
        forced = self._forced[:, position + 1]
        free = forced < 0
        token = torch.where(free, sampled, forced)
        self.token_ids[:, position + 1] = token
        self.answers[:, position + 1] = free & self._answering
        self._length = torch.where(free, self._length + 1, 0)
        ended = free & torch.isin(token, self._ends)
        limit = torch.where(self._answering, self._limit, _LONGEST_QUESTION)
        cut = free & ~ended & (self._length >= limit) & self._chat
        self._turn(position + 2, ended | cut, cut)

    def _turn(self, position: int, over: Tensor, cut: Tensor) -> None:
        """Where a turn is over [B], force the glue from ``position`` on and change roles."""
        width = self._glue.shape[1]
        kind = self._answering.long() + 2 * cut.long()
        ahead = self._forced[:, position : position + width]
        ahead.copy_(torch.where(over[:, None], self._glue[kind, : ahead.shape[1]], ahead))
        if self._chat:
            self._answering = self._answering ^ over

    def _sample(self, logits: Tensor) -> Tensor:
        logits[:, self._banned] = -torch.inf
        least = torch.where(self._answering, 1, _SHORTEST_QUESTION)
        fresh = (self._length < least)[:, None]
        logits[:, self._ends] = logits[:, self._ends].masked_fill(fresh, -torch.inf)
        temperature = torch.where(self._answering, self.temperature, self._warm)
        noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        noise.exponential_(generator=self._generator)
        return self._pick(logits, noise, temperature)


def _pick(logits: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """Sampled tokens [B] by the Gumbel-max trick: -log of exponential noise is Gumbel noise."""
    gumbel = -noise.clamp(min=1e-30).log()
    return (logits.float() + temperature[:, None] * gumbel).argmax(dim=-1)


def _glue_table(glue: ChatGlue) -> Tensor:
    """Forced ids [4, G], -1 for none: after a question, an answer, a cut question, a cut answer.

    A turn that the model ended has its end id already.
    """
    if not glue.chat:
        return torch.tensor([list(glue.opening)] * 4)
    rows = [glue.to_answer, glue.to_question]
    began = [list(r[1:] if r[0] in glue.ends else r) for r in rows]
    table = [*began, *(list(r) for r in rows)]
    width = max(map(len, table))
    return torch.tensor([row + [-1] * (width - len(row)) for row in table])
