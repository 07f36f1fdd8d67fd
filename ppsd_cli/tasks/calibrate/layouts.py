"""Which stages can be where on this machine, and which bench measures them."""

import os

from ppsd_cli.runtime.children import allowed_cores, core_shares
from ppsd_cli.runtime.engine import choose_devices, default_threads
from ppsd_cli.tasks.calibrate.candidates import Layout

MOST_STAGES = 4


def make_layout(
    asked: tuple[str, ...] | None, *, layers: int, threads: int | None, most: int = MOST_STAGES
) -> Layout:
    """2 to 4 stages on one device or on the cores; over several devices, 2 to all of them."""
    several = asked is not None and len(asked) > 1
    highest = min(len(asked) if several and asked is not None else most, layers)
    devices, processes = {}, False
    for stages in range(2, highest + 1):
        wanted = asked[:stages] if several and asked is not None else asked
        devices[stages], processes = choose_devices(wanted, stages=stages)
    own = {n: threads or default_threads(n) for n in devices}
    return Layout(layers, devices, own, processes)


def core_places(stages: int) -> tuple[int, ...]:
    """The core share of each stage as a number; stages with equal numbers share their cores."""
    shares = core_shares(stages)
    if shares[0] is None:
        return tuple(stage % (os.cpu_count() or 1) for stage in range(stages))
    known: dict[tuple[int, ...], int] = {}
    return tuple(known.setdefault(tuple(share or ()), len(known)) for share in shares)


def plain_threads(asked: int | None) -> tuple[int, ...]:
    """Thread counts of plain decoding worth comparing, the default first."""
    if asked is not None:
        return (asked,)
    cores = allowed_cores()
    every = (os.cpu_count() or 1) if cores is None else len(cores)
    return tuple(dict.fromkeys((default_threads(1), every)))
