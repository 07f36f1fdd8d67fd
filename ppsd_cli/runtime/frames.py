"""What travels between stages.

Shapes: W rows, H hidden, K taps of one stage.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ppsd_cli.core.events import Span
from ppsd_cli.core.plan import Request


@dataclass(frozen=True, slots=True)
class Frame:
    """Nodes of one tick on their way to the next stage: a header and hidden states [W, H].

    The rows are consecutive positions from ``position`` on: a prompt chunk (one node), or tokens
    (a node each, ``serial`` is the first one's). The last stage chooses the tokens after the last
    ``wanted`` rows. ``tree``: the rows are instead the nodes of one level, all for ``position``,
    with slot and parent's slot of each. ``request`` comes with the first chunk of a prompt and
    holds until the next.
    """

    serial: int
    position: int
    wanted: int
    hidden: Tensor
    spans: tuple[Span, ...]
    request: Request | None = None
    tree: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Return:
    """What a stage hands to stage 0 after a frame: tapped states, and from the last the targets.

    ``taps`` maps a depth to states [W, H]. ``token_ids``: a target for each wanted row, in order;
    ``logits`` [targets, V] if they are kept.
    """

    stage: int
    serial: int
    position: int
    taps: dict[int, Tensor] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    logits: Tensor | None = None
