"""The graph runner under ``torchrun``: from settings to rank 0's runner, and other ranks' loop."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist

from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.build import load_graph_runner, member_of
from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.cuda.crew import Member
from ppsd_cli.runtime.cuda.prompts import bucket_of
from ppsd_cli.runtime.cuda.rank_alarm import Alarm, Failing, farewell
from ppsd_cli.runtime.cuda.rank_clock import AwayClock, ToldClock
from ppsd_cli.runtime.cuda.rank_crew import RankCrew
from ppsd_cli.runtime.cuda.rank_links import GroupedLinks, HostLinks, Links, Place, link_of
from ppsd_cli.runtime.cuda.rank_runner import Follower, RankRunner
from ppsd_cli.runtime.failures import PeerLost
from ppsd_cli.runtime.links import Inbox, Outbox
from ppsd_cli.runtime.orders import BROKEN, Broken, Order, OrderCodec
from ppsd_cli.runtime.pipeline import PipelineConfig, load_head, load_worker
from ppsd_cli.runtime.store_watch import StoreWatch, leave
from ppsd_cli.runtime.torchrun import JoinedRunner, join, serve_as_rank

ENGINE = "CUDA graphs"
_WINDOW = 64
"""Orders that may be on their way to a rank; far more than ticks ahead of the host."""


def joined_graphs(
    config: PipelineConfig, *, on_frozen: Callable[[str], None] = leave
) -> JoinedRunner:
    """Rank 0: load stage 0, join the other ranks, and decide for them.

    As ``torchrun.joined_runner``, whose errors it shares.
    """
    watch = join(config, on_frozen, engine=ENGINE)
    try:
        if config.stages == 1:
            return JoinedRunner(load_graph_runner(config), watch, stop=lambda: None)
        lead = Lead(config, watch, on_frozen)
    except PeerLost as lost:
        watch.finish()
        raise watch.cause(lost) from lost
    except BaseException:
        watch.finish()
        raise
    return JoinedRunner(lead.runner, watch, stop=lead.stop)


def serve_graphs(config: PipelineConfig) -> None:
    """Ranks after 0: launch what rank 0 launches, until it closes its runner.

    An error is reported to rank 0 and raised here too.
    """
    serve_as_rank(config, lambda watch: follow(config, watch), engine=ENGINE)


class Lead:
    """Rank 0's runner with its lines to the others."""

    def __init__(
        self, config: PipelineConfig, watch: StoreWatch, on_frozen: Callable[[str], None]
    ) -> None:
        ranks = range(1, config.stages)
        self._links = links_of(config, watch)
        self._lines = [Outbox[Order](rank, OrderCodec(), window=_WINDOW) for rank in ranks]
        stage, head, member = _load(config, 0)
        self._alarm = None
        if not self._links.waits:
            self._alarm = Alarm(config, watch, self._give_up, on_frozen)
        with torch.inference_mode():
            crew = RankCrew(
                config, 0, member, self._links,
                vocabulary=stage.spec.vocabulary,
                watch=None if self._alarm is None else self._alarm.check,
            )  # fmt: skip
            for away in crew.members[1:]:
                cast(AwayClock, away.clock).meet()
            self.runner = RankRunner(config, stage, head, crew, tell=self._tell)

    def stop(self) -> None:
        """End the loops of the others, in good order where nothing waits."""
        self.runner.close()
        if self.runner.broken:
            self._give_up()
            return
        self._tell(None)
        for line in self._lines:
            line.flush()
        if self._alarm is not None:
            self._alarm.join()
        self._links.close()

    def _tell(self, order: Order | None) -> None:
        for line in self._lines:
            line.send(order)

    def _give_up(self) -> None:
        """Have nobody wait for what will not come. Safe to call twice."""
        self._links.abort()
        for line in self._lines:
            try:
                line.send(BROKEN)
            except PeerLost:
                continue  # it is gone already


def follow(config: PipelineConfig, watch: StoreWatch) -> None:
    """Ranks after 0, joined: the loop until rank 0 ends it."""
    rank = dist.get_rank()
    links = links_of(config, watch)
    inbox = Inbox[Order](0, OrderCodec())
    try:
        stage, head, member = _load(config, rank)
        told = ToldClock(member.clock)
        member = replace(member, clock=cast(DeviceClock, told))
        crew = RankCrew(config, rank, member, links, vocabulary=stage.spec.vocabulary)
        runner = Follower(config, stage, head, crew, tell=lambda _plan: None)
        told.meet()
        while (order := inbox.receive()) is not None:
            if isinstance(order, Broken):
                links.abort()
                return
            runner.follow(order)
        runner.close()
        if not links.waits:
            farewell()
    except BaseException as error:
        if links.waits or isinstance(error, PeerLost):  # rank 0 is told by links, or is gone
            links.abort()
            raise
        watch.report(error)  # before rank 0 hears of it and asks
        failing = Failing(inbox)
        links.abort()
        failing.wait()
        raise
    links.close()


def links_of(config: PipelineConfig, watch: StoreWatch) -> Links:
    """The link that all ranks can use."""
    device = torch.device(config.devices[dist.get_rank()])
    watch.tell("place", Place.of(device).to_json())
    places = [Place.from_json(watch.ask("place", rank)) for rank in range(config.stages)]
    return GroupedLinks.connect(device) if link_of(places) == "nccl" else HostLinks()


def _load(config: PipelineConfig, rank: int) -> tuple[Stage, DraftHead | None, Member]:
    """This rank's stage, and beside stage 0 the draft head, on its device."""
    roomy = replace(config, slots=bucket_of(config.slots) + 1)
    stage = load_worker(roomy, rank).stage
    head = None if rank else load_head(roomy, stage)
    with torch.inference_mode():
        return stage, head, member_of([stage], head, rank, config.stages)
