"""The best guesses behind each row of logits, with their log shares: buffers and launches.

Shapes: R rows, W guesses kept of each, C chunks of columns, V' draft vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.choose import restrict
from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda.lanes import Chooser, is_cut
from ppsd_cli.runtime.cuda.launch import Launcher
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two
from ppsd_cli.runtime.cuda.tree_board import TreeBoard
from ppsd_cli.runtime.cuda.tree_choice import chunk_kernel, rank_kernel

_CHUNK = 512


class Ranking:
    """``tokens`` and ``shares`` [R, W] of the best guesses behind what ``chooser`` has scored."""

    def __init__(
        self, launcher: Launcher, chooser: Chooser, board: TreeBoard, place: Tensor
    ) -> None:
        """``place`` [R, 2] or more rows: position (and slot) of each row."""
        self._launcher, self._chooser, self._board = launcher, chooser, board
        self._place = place
        rows, columns = chooser.logits.shape
        device, width = chooser.logits.device, board.width
        self._chunks = -(-columns // _CHUNK)
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self._keys = torch.zeros(rows, self._chunks, width, **whole)
        self._tops = torch.zeros(rows, self._chunks, **wide)
        self._totals = torch.zeros(rows, self._chunks, **wide)
        self.tokens = torch.zeros(rows, width, **whole)
        self.shares = torch.full((rows, width), -torch.inf, **wide)

    def run(self, sampling: Sampling) -> None:
        """Rank what was scored by the launches before."""
        board, noise, ids = self._board, self._board.noise, self._chooser.token_ids
        scores, cut, drawn = self._chooser.logits, is_cut(sampling), sampling.temperature > 0
        if cut:
            scores = restrict(scores / noise.temperature, sampling)
        known = ids if ids is not None else board.board
        (rows, width), count = self.tokens.shape, self._chunks * self.tokens.shape[1]
        chunk_kernel[(self._chunks, rows)](
            scores,
            known,
            self._place,
            noise.seed,
            noise.temperature,
            board.scale,
            self._keys,
            self._tops,
            self._totals,
            scores.shape[1],
            W=rows,
            KEEP=width,
            BN=_CHUNK,
            DIVIDE=drawn and not cut,
            NOISE=drawn,
            MAPPED=ids is not None,
            **self._launcher.flags(Tile(0, 0, 1), first=cut),
        )
        rank_kernel[(rows,)](
            self._keys,
            self._tops,
            self._totals,
            board.scale,
            known,
            board.board,
            self._place,
            board.forced,
            board.ranks,
            board.rank_shares,
            self.tokens,
            self.shares,
            self._chunks,
            KEEP=width,
            KP=power_of_two(width),
            BLOCK=power_of_two(count),
            MAPPED=ids is not None,
            **self._launcher.flags(Tile(0, 0, 1 if count <= 512 else 4), first=False),
        )
