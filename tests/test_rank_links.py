"""Which link and which devices ranks take, what is refused, and how a lost rank is noticed."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ppsd_cli.core.plan import Bubble, Prompt, Request, Sampling, Step
from ppsd_cli.errors import ConfigError, ResourceError
from ppsd_cli.runtime import engine
from ppsd_cli.runtime.cuda import rank_alarm
from ppsd_cli.runtime.cuda.rank_alarm import Alarm, Watched
from ppsd_cli.runtime.cuda.rank_links import Place, link_of
from ppsd_cli.runtime.failures import PeerLost
from ppsd_cli.runtime.orders import BROKEN, OrderCodec
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.rank_devices import rank_devices, sharing_notes


def places(*gpus, nccl=True, wish=None):
    found = [Place(gpu, nccl, None) for gpu in gpus[1:]]
    return [Place.from_json(p.to_json()) for p in (Place(gpus[0], nccl, wish), *found)]


@pytest.mark.parametrize(
    ("ranks", "link"),
    [
        (places("a 1", "a 2"), "nccl"),
        (places("a 1", "b 1"), "nccl"),
        (places("a 1", "a 2", wish="nccl"), "nccl"),
        (places("a 1", "a 2", wish="gloo"), "gloo"),
        (places("a 1", "a 1"), "gloo"),
        (places("a 1", "a 2", nccl=False), "gloo"),
        (places(None, None), "gloo"),
    ],
)
def test_the_link_of_all_ranks(ranks, link):
    assert link_of(ranks) == link
    assert link_of(ranks[::-1]) == link


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (places("a 1", "a 1", wish="nccl"), "two ranks share a GPU; use PPSD_LINK=gloo"),
        (places("a 1", "a 2", nccl=False, wish="nccl"), "built without it"),
        (places("a 1", "a 2", wish="mpi"), "PPSD_LINK=mpi: choose nccl or gloo"),
    ],
)
def test_links_that_cannot_be(ranks, says):
    with pytest.raises(ConfigError, match=says):
        link_of(ranks)


@pytest.fixture
def ranked(monkeypatch):
    """Rank 3 of four, two on each host, with two GPUs here."""
    environment = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
    for name, value in (environment | {"MASTER_ADDR": "x", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("ranked")
def test_devices_of_ranks():
    own = ("cuda:0", "cuda:1", "cuda:0", "cuda:1")
    assert rank_devices(None, stages=4) == own
    assert rank_devices(("cuda",), stages=4) == own
    assert rank_devices(("cuda:0",), stages=4) == ("cuda:0",) * 4
    assert engine.choose_devices(("cuda:7", "cuda", "cuda", "cuda:0"), stages=4) == (
        ("cuda:7", "cuda:1", "cuda:0", "cuda:0"),
        False,
    ), "only this rank's device can be known here"
    assert sharing_notes(own) == sharing_notes(("cpu",) * 4) == []
    with pytest.raises(ResourceError, match="cuda:2: this machine has 2.*rank 3 takes it"):
        rank_devices(("cuda:2",), stages=4)
    with pytest.raises(ConfigError, match="2 devices for 4 stages"):
        rank_devices(("cuda", "cuda"), stages=4)


@pytest.mark.usefixtures("ranked")
def test_ranks_that_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert rank_devices(None, stages=4) == ("cuda:0",) * 4
    (line,) = sharing_notes(("cuda:0",) * 4)
    assert line.startswith("2 ranks share cuda:0")


@pytest.mark.usefixtures("ranked")
def test_what_ranks_do_not_serve(monkeypatch):
    monkeypatch.setattr(engine, "has_graphs", lambda _config: True)
    config = PipelineConfig("x", "sha256:0", (1,) * 4, ("cuda:0",) * 4, "float32", 128)
    engine.check_engine(config)
    with pytest.raises(ConfigError, match="eesd.*drop torchrun"):
        engine.check_engine(config, draft_length=3)
    engine.check_engine(replace(config, width=2, depth=2))
    monkeypatch.setattr(engine, "find_spec", lambda _name: object())
    assert not engine.on_one_gpu(config.devices), "equal names on several hosts"


def test_orders():
    request = Request(Sampling(temperature=0.5, seed=3), True, 20, forced_drafts=(4, 5))
    codec = OrderCodec()
    prompt = Prompt((1, 2, 3), 0, True, request)
    for order in (Step(), Bubble(), prompt, Prompt((9,), 3, True, None), BROKEN, None):
        small, *more = codec.pack(order)
        assert small.numel() == codec.small_bytes
        assert codec.following(small) == [part.numel() for part in more]
        assert codec.unpack(small, more) == order


class Lost:
    """A device that never gets there, watched by an alarm that has not rung yet."""

    def __init__(self):
        self.looks = 0

    def query(self):
        self.looks += 1
        return False


def test_a_lost_rank_ends_the_wait_for_a_device(monkeypatch):
    """Rank 2's connection breaks while the main thread waits for its device."""
    broken, aborted, stuck = threading.Event(), [], []

    def receive(_tensor, rank, **_options):
        assert broken.wait(10)
        if rank == 2:
            raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(dist, "recv", receive)
    monkeypatch.setattr(rank_alarm, "_STUCK_SECONDS", 0.05)
    watch = SimpleNamespace(finished=False, cause=lambda lost: f"stage {lost.peer} died")
    config = PipelineConfig("x", "sha256:0", (1, 1, 1), ("cuda:0",) * 3, "float32", 128)
    alarm = Alarm(config, watch, lambda: aborted.append(True), stuck.append)
    alarm.check()
    device = Lost()
    threading.Timer(0.05, broken.set).start()
    with pytest.raises(PeerLost) as lost:
        Watched(device, alarm.check).synchronize()
    assert (lost.value.peer, aborted) == (2, [True])
    assert device.looks > 1
    with pytest.raises(PeerLost):
        Watched(SimpleNamespace(query=lambda: True), alarm.check).synchronize()
    for thread in alarm._threads:
        thread.join(10)
    alarm.join()
    assert stuck == ["stage 2 died"], "nobody said that the main thread had noticed"
