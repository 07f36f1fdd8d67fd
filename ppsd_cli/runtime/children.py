"""Starting and ending stage processes. Nothing of a child outlives ``stop``."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

import ppsd_cli
from ppsd_cli.errors import ResourceError
from ppsd_cli.runtime.control import SETUP, Channel
from ppsd_cli.runtime.failures import stage_name
from ppsd_cli.runtime.pipeline import PipelineConfig

_GRACE_SECONDS = 1.0
_LOG_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Child:
    """One stage process. ``name`` says which layers it runs; ``log`` holds what it printed."""

    stage: int
    name: str
    process: subprocess.Popen[bytes]
    channel: Channel
    log: IO[bytes]

    def printed(self) -> str:
        """The end of what the process wrote to stdout and stderr."""
        size = os.fstat(self.log.fileno()).st_size
        data = os.pread(self.log.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES))
        return data.decode(errors="replace")


def start(config: PipelineConfig, *, port: int | None) -> list[Child]:
    """One child for each stage. ResourceError when the port is taken."""
    listener = _listen(port or 0)
    children: list[Child] = []
    try:
        shares = core_shares(config.stages)
        for stage in range(config.stages):
            children.append(_spawn(config, stage, listener, shares))
    except BaseException:
        stop(children)
        raise
    finally:
        listener.close()
    return children


def stop(children: list[Child]) -> None:
    """End all children, whatever state they are in. Safe to call twice."""
    for child in children:
        _signal(child, signal.SIGTERM)
    deadline = monotonic() + _GRACE_SECONDS
    while monotonic() < deadline and any(c.process.poll() is None for c in children):
        sleep(0.005)
    for child in children:
        _signal(child, signal.SIGKILL)
    for child in children:
        child.process.wait()
        child.channel.close()
        child.log.close()


def allowed_cores() -> list[int] | None:
    """The cores that this process may use; None where the platform does not say (macOS)."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return sorted(os.sched_getaffinity(0))


def core_shares(stages: int) -> list[list[int] | None]:
    """The cores of each stage: contiguous shares of the allowed ones, or one each in turn."""
    cores = allowed_cores()
    if cores is None:
        return [None] * stages
    count = len(cores)
    if count < stages:
        return [[cores[stage % count]] for stage in range(stages)]
    return [cores[s * count // stages : (s + 1) * count // stages] for s in range(stages)]


def place(stage: int, shares: list[list[int] | None]) -> dict[str, Any]:
    """Where a child is to run, for ``stage_main.set_up``."""
    cores = shares[stage]
    shared = cores is not None and shares.count(cores) > 1
    return {"stage": stage, "cores": cores, "shares_core": shared}


def _listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1 and nowhere else."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise ResourceError(
            f"port {port} is taken or not allowed ({error}); "
            "choose another with --port, or leave it out for a free one"
        ) from error
    return listener


def _spawn(
    config: PipelineConfig, stage: int, listener: socket.socket, shares: list[list[int] | None]
) -> Child:
    setup = place(stage, shares) | {"port": listener.getsockname()[1]}
    shared = listener.fileno() if stage == 0 else None
    return launch("stage_main", config, setup, arguments=[listener.fileno()], shared=shared)


def launch(
    module: str,
    config: PipelineConfig,
    setup: dict[str, Any],
    *,
    arguments: Sequence[int] = (),
    shared: int | None = None,
) -> Child:
    """Start ``runtime.module`` with a control channel and give it ``setup`` and the config.

    ``setup["stage"]`` names the child; ``arguments`` follow the channel's descriptor on its
    command line; ``shared``: one more descriptor that it inherits.
    """
    ours, theirs = socket.socketpair()
    stage: int = setup["stage"]
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by ``stop``)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"ppsd_cli.runtime.{module}"]
            + [str(number) for number in (theirs.fileno(), *arguments)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(config),
            pass_fds=[theirs.fileno()] + ([] if shared is None else [shared]),
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        log.close()
        raise
    finally:
        theirs.close()
    child = Child(stage, stage_name(config, stage), process, Channel(ours), log)
    # The kernel's parent-death signal follows the thread that started the child.
    lasting = threading.current_thread() is threading.main_thread()
    told = setup | {"config": config.to_json(), "die_with": os.getpid() if lasting else None}
    # A child that is dead already shows that to whoever listens to its channel.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        child.channel.send(SETUP, json.dumps(told).encode())
    return child


def _environment(config: PipelineConfig) -> dict[str, str]:
    """The child's environment: this package importable from wherever it is, torch's threads."""
    package = str(Path(ppsd_cli.__file__).resolve().parent.parent)
    paths = [package, os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(config.threads),
    }


def _signal(child: Child, number: signal.Signals) -> None:
    """Signal a child and what it may have started (it leads its own process group)."""
    if child.process.returncode is None:
        try:
            os.killpg(child.process.pid, number)
        except ProcessLookupError:
            return
