"""Prompts over ranks: chunks go from device to device, tapped states and the first token home.

Shapes: W tokens of a chunk, C rows of its buffer, H hidden, V vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ppsd_cli.core.plan import Node, Prompt, Request, Target
from ppsd_cli.errors import StageError
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.layers import Shape
from ppsd_cli.runtime.cuda.first_token import FirstToken
from ppsd_cli.runtime.cuda.prefill import not_numbers
from ppsd_cli.runtime.cuda.prompt_head import PromptHead
from ppsd_cli.runtime.cuda.prompts import PromptLane, bucket_of
from ppsd_cli.runtime.cuda.rank_crew import RankCrew
from ppsd_cli.runtime.cuda.rank_links import Exchange, Letter
from ppsd_cli.runtime.failures import PeerLost
from ppsd_cli.runtime.pipeline import PipelineConfig, tap_depths

_TAG = 3


class RankPrefill:
    """This rank's part of prompts (as ``prefill.Prefill``).

    ``first``: the token after the prompt and its position, which only rank 0 comes to know; None
    before the last chunk. ``failure``: what is wrong with that token, for rank 0 to raise when all
    ranks are through.
    """

    def __init__(
        self, config: PipelineConfig, crew: RankCrew, head: DraftHead | None, *, vocabulary: int
    ) -> None:
        pod, recorder = crew.home.pod, crew.home.recorder
        stage = pod.lanes[0].stage
        self._crew, self._rank, self._last = crew, crew.rank, config.stages - 1
        self._lane = PromptLane([stage], recorder, chunk=config.chunk)
        self._head = None
        if head is not None and head.weights.blocks:
            lane, shape = self._lane, Shape.of(stage.spec)
            self._head = PromptHead(head, shape, lane.rows, recorder, taps=lane.taps)
        self._choice = None
        if pod.chooser is not None:
            self._choice = FirstToken(pod.chooser, recorder, pod.states[0])
        room = torch.zeros(config.chunk, pod.hidden, dtype=stage.dtype, device=stage.device)
        self._come = room
        self._returned: list[tuple[int, int, Tensor]] = []
        if self._rank == 0:
            self._returned = [
                (rank, depth, torch.zeros_like(room))
                for rank in range(1, config.stages)
                for depth in sorted(tap_depths(config, rank))
            ]
        self._vocabulary = vocabulary
        self.first: tuple[int, int] | None = None
        self.failure: StageError | None = None

    def run(self, plan: Prompt, request: Request, serial: int) -> tuple[Node, Target]:
        """One chunk: its node, and the last stage's answer; at other ranks both mean nothing."""
        count, end = len(plan.token_ids), plan.start + len(plan.token_ids)
        node = Node(serial, plan.start, None, count, drafted=False, final=plan.last)
        self.failure = None
        with self._crew.stream():
            hidden = self._through(plan, request)
        if not plan.last:
            return node, Target(serial, None, ())
        if self._rank == self._last:
            self._choose(hidden, end, request)
        self.first = (0, end)
        if self._rank:
            return node, Target(serial, None, ())
        token_id, logits = self._hear(request)
        if token_id < 0:
            self.failure = StageError(not_numbers("logits are not numbers (NaN)", end))
            return node, Target(serial, None, ())
        self.first = (token_id, end)
        return node, Target(serial, token_id, (), logits)

    def _through(self, plan: Prompt, request: Request) -> Tensor:
        """This rank's states [W, H] of a chunk; what others need of them is on its way."""
        rank, lane, links = self._rank, self._lane, self._crew.links
        count, end = len(plan.token_ids), plan.start + len(plan.token_ids)
        head = self._head if request.drafting else None
        lane.prepare(bucket_of(end))
        if head is not None:
            head.prepare(bucket_of(end))
        source = None
        if rank:
            source = self._come[:count]
            links.run(Exchange((), ((rank - 1, source),)))
        hidden = lane.run(plan.token_ids, plan.start, source)
        sends: list[Letter] = [(rank + 1, hidden)] if rank < self._last else []
        if rank and request.drafting:
            sends += [(0, lane.taps[depth][:count]) for depth in sorted(lane.taps)]
        if sends:
            links.run(Exchange(tuple(sends), ()))
        if request.drafting and self._returned:
            links.run(Exchange((), tuple((r, room[:count]) for r, _, room in self._returned)))
        if head is not None:
            for _, depth, room in self._returned:
                head.take(depth, room[:count])
            head.run(end)
        return hidden

    def _choose(self, hidden: Tensor, position: int, request: Request) -> None:
        """The last rank: choose the token behind the prompt and tell rank 0."""
        assert self._choice is not None
        token_id = self._choice.choose(hidden, position, request.sampling)
        told = [torch.tensor([token_id])]
        if request.keep_logits:
            told.append(self._choice.logits())
        try:
            for message in told:
                dist.send(message, 0, tag=_TAG)
        except RuntimeError as error:
            raise PeerLost(0) from error

    def _hear(self, request: Request) -> tuple[int, Tensor | None]:
        """Rank 0: the token behind the prompt, and the logits [V] if they are kept."""
        token = torch.zeros(1, dtype=torch.int64)
        logits = torch.zeros(self._vocabulary) if request.keep_logits else None
        try:
            for message in (token,) if logits is None else (token, logits):
                dist.recv(message, self._last, tag=_TAG)
        except RuntimeError as error:
            raise PeerLost(self._last) from error
        return int(token), logits
