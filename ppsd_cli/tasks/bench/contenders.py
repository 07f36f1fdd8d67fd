"""Who takes part in a run: what was asked for, what can run here, and with which settings.

``decide`` picks settings by short probes; ``Stable.open`` makes a contender's decoder. Both are
apart, so that a resumed run takes part with the settings that were decided when it began.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from ppsd_cli.bench_records import Contender
from ppsd_cli.errors import AssetError, PpsdError, ResourceError
from ppsd_cli.runtime.engine import check_engine
from ppsd_cli.tasks.bench.decoders import Decoder, EngineDecoder, Metered
from ppsd_cli.tasks.bench.forced import (
    DRAFT_LENGTHS,
    best_draft_length,
    burst_speedup,
    chain_speedup,
)
from ppsd_cli.tasks.bench.pool import Loaded, Pool, Shape
from ppsd_cli.tasks.bench.reference import TransformersDecoder, refusal
from ppsd_cli.tasks.bench.trials import Probe, outcome, trial
from ppsd_cli.tasks.bench.wish import DECODERS, Wish

_PREFERRED_THREADS_LOSE = 0.97
"""The pipeline's own thread count is kept unless another is faster by more than 3%: with equal
counts plain decoding and the pipeline are equal bit by bit."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The pipelines of a run.

    ``plain``: one stage. ``threads``: the counts to try for what runs in one process, the
    preferred one first. ``chain``: PPSD's stages, with the head; those of trees are the same but
    for the width, where that is not the widest anyway. ``bursts``: EESD's, one for each head, the
    given head first. ``transformers``: None, or why it cannot run. ``tree_scale``: as in
    ``core.plan.Request``.
    """

    plain: Shape
    threads: tuple[int, ...]
    chain: Shape
    bursts: tuple[Shape, ...]
    layers: int
    transformers: str | None = None
    tree_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Rival:
    """A contender ready to answer. ``plain`` decodes without drafts on the same engine."""

    contender: Contender
    decoder: Decoder
    loaded: Loaded
    plain: Decoder | None = None


@dataclass(slots=True)
class Decision:
    """Who takes part, who cannot and why, and lines for the reader."""

    contenders: list[Contender] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Stable:
    """All contenders of a run and what they run on."""

    def __init__(self, shapes: Shapes, pool: Pool, tell: Callable[[str], None]) -> None:
        """``tell`` gets a line for each trial and its outcome."""
        self._shapes, self._pool, self._tell = shapes, pool, tell

    def open(self, contender: Contender) -> Rival:
        """Load what a contender needs."""
        if contender.decoder in ("hf", "hf-early-exit"):
            return self._open_transformers(contender)
        shape = self.shape(contender)
        loaded = self._pool.engine(shape)
        plain = EngineDecoder(loaded.thing, drafting=False)
        drafting = contender.decoder in ("ppsd", "eesd")
        decoder = EngineDecoder(
            loaded.thing,
            drafting,
            contender.draft_length or 0,
            width=contender.width,
            depth=contender.depth,
            tree_scale=self._shapes.tree_scale,
        )
        metered = [Metered(each, loaded.meter) for each in (decoder, plain)]
        return Rival(contender, metered[0], loaded, metered[1])

    def shape(self, contender: Contender) -> Shape:
        """The pipeline of one of our own contenders."""
        if contender.decoder == "eesd":
            burst = next(s for s in self._shapes.bursts if s.head == contender.head)
            config = replace(burst.config, split=contender.split, devices=contender.devices)
            shape = replace(burst, config=config)
        elif contender.decoder == "ar" and len(contender.split) == 1:
            shape = self._shapes.plain
        else:
            chain = self._shapes.chain
            width = max(contender.width, chain.config.width)
            shape = replace(chain, config=replace(chain.config, width=width))
        return shape.with_threads(contender.threads)

    def keep(self, contenders: list[Contender]) -> None:
        """Close engines that were only tried."""
        self._pool.keep([self.shape(c) for c in contenders if not c.decoder.startswith("hf")])

    def ideal_speedup(self, contender: Contender) -> float | None:
        """What the formula promises for a fixed acceptance."""
        if contender.acceptance is None or contender.width > 1:
            return None
        if contender.decoder == "ppsd":
            return chain_speedup(len(contender.split), contender.acceptance)
        assert contender.draft_length is not None
        return burst_speedup(
            contender.draft_length,
            contender.acceptance,
            exit_layer=contender.split[0],
            layers=self._shapes.layers,
        )

    def decide(self, wish: Wish, probe: Probe) -> Decision:
        """Settle what was left open, by trying. ``ar`` always takes part, and first."""
        decision = Decision()
        plain = self._decide_plain(probe, decision)
        decision.contenders.append(plain)
        for name in (n for n in DECODERS if n in wish.decoders):
            if name in ("ppsd", "naive-split"):
                decision.contenders.append(self._chain(name))
                if name == "ppsd":
                    decision.contenders += [self._tree(width) for width in wish.widths]
            elif name == "eesd":
                self._decide_bursts(wish, probe, decision)
            elif name in ("hf", "hf-early-exit"):
                self._decide_transformers(name, probe, decision)
        burst = next((c for c in decision.contenders if c.decoder == "eesd"), None)
        for acceptance, among in zip_longest(wish.acceptance, wish.among):
            decision.contenders += self._forced(acceptance, wish.draft_length, burst)
            decision.contenders += [
                self._forced_tree(width, acceptance, among) for width in wish.widths
            ]
        return decision

    def _decide_plain(self, probe: Probe, decision: Decision) -> Contender:
        """Plain decoding on one device with the thread count that is fastest."""
        shape = self._shapes.plain
        contender = _contender("ar", "ar", shape, exact=True)
        try:
            self.open(contender)
            return self._best_threads(contender, probe)
        except ResourceError:
            if len(set(self._shapes.chain.config.devices)) == 1:
                raise
        self._spread_bursts()
        decision.notes.append(
            "the model does not fit on one device: ar is plain decoding over the pipeline's "
            "devices (the naive split)"
        )
        return replace(_contender("ar", "ar", self._shapes.chain, exact=True), head=None)

    def _spread_bursts(self) -> None:
        """EESD over the pipeline's devices, where one device does not hold the model."""
        chain = self._shapes.chain.config
        bursts = tuple(
            replace(s, config=replace(s.config, split=chain.split, devices=chain.devices))
            for s in self._shapes.bursts
        )
        self._shapes = replace(self._shapes, bursts=bursts)

    def _chain(self, name: str) -> Contender:
        contender = _contender(name, name, self._shapes.chain, exact=True)
        return contender if name == "ppsd" else replace(contender, head=None)

    def _tree(self, width: int) -> Contender:
        chain = self._chain("ppsd")
        depth = self._shapes.chain.config.depth
        name = f"ppsd-w{width}" if depth == 1 else f"ppsd-w{width}-d{depth}"
        return replace(chain, name=name, width=width, depth=depth, exact=False)

    def _forced_tree(self, width: int, acceptance: float, among: float | None) -> Contender:
        """A tree with guesses of that quality; without ``among`` only the best may be right."""
        tag = f"@{acceptance:g}" if among is None else f"@{acceptance:g}/{among:g}"
        tree = self._tree(width)
        among = acceptance if among is None else among
        return replace(tree, name=f"{tree.name}{tag}", acceptance=acceptance, among=among)

    def _decide_bursts(self, wish: Wish, probe: Probe, decision: Decision) -> None:
        """EESD with each head, at the best of the draft lengths."""
        found: list[Contender] = []
        try:
            self._best_bursts(wish, probe, found)
        except PpsdError as error:
            decision.skipped.append(("eesd block" if found else "eesd", str(error)))
        decision.contenders += found

    def _best_bursts(self, wish: Wish, probe: Probe, found: list[Contender]) -> None:
        """Adds to ``found``, so that one head stays where the next cannot be loaded."""
        lengths = (wish.draft_length,) if wish.draft_length else DRAFT_LENGTHS
        for shape in self._shapes.bursts:
            check_engine(shape.config, draft_length=max(lengths))
            tried = replace(_contender("eesd", "eesd", shape, exact=False), draft_length=lengths[0])
            if found:
                tried = replace(tried, threads=found[0].threads)
            else:
                first = self.open(tried).decoder
                first.answer(probe.prompts[0], replace(probe.limits, max_new_tokens=4))
                tried = self._best_threads(tried, probe)
            best = self._best([replace(tried, draft_length=k) for k in lengths], probe)
            suffix = " block" if found else ""
            found.append(replace(best, name=f"eesd-{best.draft_length}{suffix}"))

    def _decide_transformers(self, name: str, probe: Probe, decision: Decision) -> None:
        if self._shapes.transformers is not None:
            decision.skipped.append((name, self._shapes.transformers))
            return
        contender = _contender(name, name, self._shapes.plain, exact=False)
        try:
            rival = self.open(contender)
        except (AssetError, ResourceError) as error:
            decision.skipped.append((name, str(error)))
            return
        limits = replace(probe.limits, max_new_tokens=4)
        kind = type(rival.loaded.thing).__name__
        reason = refusal(rival.decoder, probe.prompts[0], limits, kind=kind)
        if reason is not None:
            decision.skipped.append((name, reason))
            return
        try:
            decision.contenders.append(self._best_threads(contender, probe))
        except PpsdError as error:
            decision.skipped.append((name, str(error)))

    def _forced(
        self, acceptance: float, draft_length: int | None, burst: Contender | None
    ) -> list[Contender]:
        """PPSD, and EESD as its trials left it where it takes part, with drafts of that quality."""
        tag = f"@{acceptance:g}"
        chain = self._chain("ppsd")
        found = [replace(chain, name=f"ppsd{tag}", acceptance=acceptance)]
        if burst is not None:
            length = draft_length or best_draft_length(
                acceptance, exit_layer=burst.split[0], layers=self._shapes.layers
            )
            name = f"eesd-{length}{tag}"
            found.append(replace(burst, name=name, draft_length=length, acceptance=acceptance))
        return found

    def _best_threads(self, contender: Contender, probe: Probe) -> Contender:
        if contender.threads is None:
            return contender
        tried = [replace(contender, threads=count) for count in self._shapes.threads]
        return self._best(tried, probe, first_wins=_PREFERRED_THREADS_LOSE)

    def _best(self, tried: list[Contender], probe: Probe, *, first_wins: float = 1.0) -> Contender:
        """The fastest by a short trial; the first if it has ``first_wins`` of the best's speed."""
        if len(tried) == 1:
            return tried[0]
        rates = trial([self.open(contender).decoder for contender in tried], probe)
        best = 0 if rates[0] >= first_wins * max(rates) else rates.index(max(rates))
        self._tell(outcome(tried, rates, best))
        return tried[best]

    def _open_transformers(self, contender: Contender) -> Rival:
        config = self._shapes.plain.config
        loaded = self._pool.model(config.dtype, config.devices[0])
        exit_layer = self._shapes.chain.config.split[0]
        early = exit_layer if contender.decoder == "hf-early-exit" else None
        decoder = TransformersDecoder(loaded.thing, early, contender.threads or config.threads)
        return Rival(contender, Metered(decoder, loaded.meter), loaded)


def _contender(name: str, decoder: str, shape: Shape, *, exact: bool) -> Contender:
    config = shape.config
    return Contender(
        name,
        decoder,
        exact,
        head=shape.head,
        split=config.split,
        devices=config.devices,
        threads=config.threads if shape.on_cpu else None,
    )
