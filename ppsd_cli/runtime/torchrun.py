"""Stages as the ranks of ``torchrun``, on one host or several. Every rank has the same settings.

Rank 0 drives and runs stage 0 (``joined_runner``); every other rank runs its stage until rank 0
closes the runner (``serve_worker``). Here frames travel over gloo, whatever the devices; GPUs that
the graph runner serves take ``cuda.rank_build`` instead, and only how ranks join, watch each other
and end is the same.
"""

import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ppsd_cli.core.plan import Plan, Runner, TickResult
from ppsd_cli.errors import ConfigError, ResourceError
from ppsd_cli.runtime.failures import PeerLost
from ppsd_cli.runtime.front import Front
from ppsd_cli.runtime.group import FOREVER, bind_to_loopback
from ppsd_cli.runtime.links import FrontLink, serve
from ppsd_cli.runtime.local import LocalRunner
from ppsd_cli.runtime.pipeline import PipelineConfig, load_head, load_worker, returning_stages
from ppsd_cli.runtime.store_watch import StoreWatch, leave

_JOIN_TIMEOUT = timedelta(minutes=10)
_SAYING_SECONDS = 10.0
"""For rank 0 to start and to say what is wrong with the settings of all ranks."""
_ENGINE = "stages without CUDA graphs"


def is_torchrun() -> bool:
    """Whether this process was started as a rank."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def is_worker() -> bool:
    """Whether this process is a rank other than 0, which only serves."""
    return is_torchrun() and _rank() != 0


def join_warnings() -> list[str]:
    """Lines that a user should see before ranks join."""
    address = os.environ["MASTER_ADDR"]
    if _is_loopback(address):
        return []
    return [
        f"torch.distributed over {address} has no authentication or encryption; "
        "use it only in a network that you trust"
    ]


def joined_runner(
    config: PipelineConfig, *, on_frozen: Callable[[str], None] = leave
) -> "JoinedRunner":
    """Rank 0: load stage 0, join the other ranks, and drive them.

    ConfigError when ranks and stages differ in number. ``on_frozen`` is called in another thread
    with a message when a rank gives no sign of life; the default prints it and exits with 5,
    because the main thread cannot be woken from a receive.
    """
    assert _rank() == 0
    watch = join(config, on_frozen, engine=_ENGINE)
    try:
        worker = load_worker(config, 0)
        head = load_head(config, worker.stage)
        link = FrontLink(config, worker)
    except BaseException:
        watch.finish()
        raise
    front = Front(worker, head, link, returning=returning_stages(config))
    return JoinedRunner(LocalRunner(front, stages=config.stages), watch, stop=link.stop)


def serve_worker(config: PipelineConfig) -> None:
    """Ranks after 0: run this rank's stage until rank 0 closes its runner.

    An error is reported to rank 0 and raised here too.
    """
    serve_as_rank(
        config, lambda _watch: serve(config, load_worker(config, _rank())), engine=_ENGINE
    )


def serve_as_rank(
    config: PipelineConfig, work: Callable[[StoreWatch], None], *, engine: str
) -> None:
    """Join as a rank after 0, do its ``work``, and leave; see ``serve_worker``."""
    assert _rank() > 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's
    try:
        watch = join(config, leave, engine=engine)
    except ConfigError:
        # Rank 0 finds the same, and torchrun ends it soon after this rank, said or not.
        time.sleep(_SAYING_SECONDS)
        raise
    try:
        with torch.inference_mode():
            work(watch)
    except BaseException as error:
        watch.report(error)
        raise
    finally:
        watch.finish()
    dist.destroy_process_group()


class JoinedRunner:
    """Drives the stages of other ranks in step (``core.plan.Runner``)."""

    def __init__(self, local: Runner, watch: StoreWatch, *, stop: Callable[[], None]) -> None:
        """``local``: rank 0's part. ``stop``: ends the loops of the others."""
        self._local, self._watch, self._stop = local, watch, stop
        self._open = True

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self._local.stages

    @property
    def lookahead(self) -> int:
        """Rank 0's: its part knows how far it runs ahead."""
        return self._local.lookahead

    @property
    def pending(self) -> int:
        """Plans not yet run."""
        return self._local.pending

    def submit(self, plan: Plan) -> None:
        """Ask for one tick; the error of whichever rank failed."""
        with self._blaming():
            self._local.submit(plan)

    def collect(self) -> TickResult:
        """The oldest tick that was asked for; the error of whichever rank failed."""
        with self._blaming():
            return self._local.collect()

    def close(self) -> None:
        """End the loops of the other ranks and leave the group. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        try:
            if self.stages > 1:
                self._stop()
        except PeerLost:
            return  # a rank is gone already; torchrun ends the rest
        finally:
            self._watch.finish()
        dist.destroy_process_group()

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Where a rank is lost, raise what ended it."""
        try:
            yield
        except PeerLost as lost:
            self._open = False
            self._watch.finish()
            raise self._watch.cause(lost) from lost


def join(config: PipelineConfig, on_frozen: Callable[[str], None], *, engine: str) -> StoreWatch:
    """Join the process group; the beating watch of this rank.

    ConfigError when ranks and stages differ in number, or ranks in their ``engine``.
    """
    rank, ranks = _rank(), int(os.environ["WORLD_SIZE"])
    if ranks != config.stages:
        raise ConfigError(
            f"torchrun started {ranks} processes for {config.stages} stages; "
            f"start {config.stages}, or choose --stages {ranks}"
        )
    torch.set_num_threads(config.threads)
    if _one_host(ranks):
        bind_to_loopback()
    try:
        store, _, _ = next(rendezvous("env://", rank, ranks, timeout=_JOIN_TIMEOUT))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=FOREVER)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ResourceError(f"cannot join the other ranks at {address}: {error}") from error
    watch = StoreWatch(config, rank, on_frozen=on_frozen)
    watch.start()
    try:
        _agree(watch, rank, ranks, engine)
    except BaseException:
        watch.finish()
        raise
    return watch


def _agree(watch: StoreWatch, rank: int, ranks: int, engine: str) -> None:
    """ConfigError where ranks would talk past each other."""
    watch.tell("engine", engine)
    for other in range(ranks):
        theirs = watch.ask("engine", other)
        if theirs != engine:
            raise ConfigError(
                f"rank {rank} runs {engine} and rank {other} {theirs}; give all ranks the same "
                "options, and install Triton on all hosts with GPUs or on none"
            )


def _rank() -> int:
    return int(os.environ["RANK"])


def _one_host(ranks: int) -> bool:
    local = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
    return local or _is_loopback(os.environ["MASTER_ADDR"])


def _is_loopback(address: str) -> bool:
    """Whether a host name or address means this host's loopback device."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback
    except (OSError, ValueError):
        return False
