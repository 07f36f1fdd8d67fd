"""The token behind a prompt, as a graph: LM head and choice are those of the ticks.

Shapes: W tokens of a chunk, H hidden, V vocabulary.
"""

import torch
from torch import Tensor

from ppsd_cli.core.choose import signed_seed
from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda.lanes import Chooser, is_cut
from ppsd_cli.runtime.cuda.launch import Noise
from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Recorder, send


class FirstToken:
    """Static buffers for one state, and a graph for each way of choosing."""

    def __init__(self, chooser: Chooser, recorder: Recorder | Immediate, like: Tensor) -> None:
        """``like`` [W, H]: states after the last layer, by their format and device."""
        self._chooser, self._recorder = chooser, recorder
        self._state = torch.zeros_like(like[:1])
        self._facts = torch.zeros(3, dtype=torch.int64, device=like.device)
        temperature = torch.ones(1, dtype=torch.float32, device=like.device)
        self._place, seed = self._facts[:2].view(1, 2), self._facts[2:]
        self._noise = Noise(seed, temperature)
        self._token = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._graphs: dict[tuple[float, ...], Playable] = {}

    def choose(self, states: Tensor, position: int, sampling: Sampling) -> int:
        """The token at ``position``, which follows the last of ``states`` [W, H]; -1 for NaN."""
        with self._recorder.stream():
            graph = self._graph(sampling)
            self._state.copy_(states[-1:])
            send(self._facts, (position - 1, position - 1, signed_seed(sampling.seed)))
            if sampling.temperature > 0:
                self._noise.temperature.fill_(sampling.temperature)
            graph.replay()
            return int(self._token)

    def logits(self) -> Tensor:
        """The logits [V] that it was chosen from, on the host."""
        with self._recorder.stream():
            return self._chooser.logits[0].to("cpu", copy=True)

    def _graph(self, sampling: Sampling) -> Playable:
        cut = (sampling.top_k, sampling.top_p, sampling.min_p) if is_cut(sampling) else ()
        key = (float(sampling.temperature > 0), *cut)
        if key not in self._graphs:
            self._graphs[key] = self._recorder.record(lambda: self._launch(sampling))
        return self._graphs[key]

    def _launch(self, sampling: Sampling) -> None:
        self._chooser.run(self._state, self._place, sampling, self._noise, first=True)
        votes = self._chooser.votes(sampling)
        best = votes.scores == votes.scores.amax()  # as ``choice.elect``
        self._token.copy_(torch.where(best, votes.columns, 2**31 - 1).amin())
