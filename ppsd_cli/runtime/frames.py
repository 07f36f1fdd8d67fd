"""What travels between stages.

Shapes: W rows, H hidden, K taps of one stage.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ppsd_cli.core.events import Span
from ppsd_cli.core.plan import Request


@dataclass(frozen=True, slots=True)
class Frame:
    """A node on its way to the next stage: its header and hidden states [W, H].

    ``final``: the last stage chooses the token after the last row. ``request`` comes with the
    first chunk of a prompt and holds until the next one.
    """

    serial: int
    position: int
    final: bool
    hidden: Tensor
    spans: tuple[Span, ...]
    request: Request | None = None


@dataclass(frozen=True, slots=True)
class Return:
    """What a stage hands to stage 0 after a node: tapped states, and from the last the target.

    ``taps`` maps a depth to states [W, H]. ``token_id`` is None where no target was wanted.
    """

    stage: int
    serial: int
    position: int
    taps: dict[int, Tensor] = field(default_factory=dict)
    token_id: int | None = None
    spans: tuple[Span, ...] = ()
    logits: Tensor | None = None
