"""Which layers go to which stage. Costs are in units of one decoder layer."""

from dataclasses import dataclass

from ppsd_cli.errors import ConfigError
from ppsd_cli.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Costs:
    """Work of one tick beside the layers: the LM matrix (last stage), the head (stage 0)."""

    lm: float
    head: float


def layer_parameters(spec: ModelSpec) -> int:
    """Weights of one decoder layer."""
    attention = spec.hidden * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    return attention + 3 * spec.hidden * spec.intermediate


def costs_of(
    spec: ModelSpec, *, blocks: int, draft_vocab: int | None, drafting: bool, depth: int = 1
) -> Costs:
    """Costs by bytes read, which is what batch-1 decoding takes its time for.

    ``depth`` 2: the head goes on from its own state, by one layer and the LM matrix once more.
    """
    per_token = spec.hidden / layer_parameters(spec)
    lm = spec.vocabulary * per_token
    if not drafting:
        return Costs(lm, 0.0)
    guess = (draft_vocab or spec.vocabulary) * per_token
    second = 1 + 2 * spec.hidden * per_token + guess if depth > 1 else 0.0
    return Costs(lm, blocks + guess + second)


def costs_in_step() -> Costs:
    """Costs where the stages share one GPU and go layer by layer in step: only layers count.

    There the LM matrix and the draft head run beside the layers of other stages.
    """
    return Costs(0.0, 0.0)


def choose_split(
    layers: int, *, stages: int, exit_layer: int | None, costs: Costs
) -> tuple[int, ...]:
    """Layers of each stage so that the slowest is as fast as can be.

    The first stage has ``exit_layer`` layers if that is given; the others share the rest.
    """
    _check_counts(layers, stages, exit_layer)
    if stages == 1:
        return (layers,)
    if exit_layer is not None:
        return (exit_layer, *balance(layers - exit_layer, [0.0] * (stages - 2) + [costs.lm]))
    return balance(layers, [costs.head] + [0.0] * (stages - 2) + [costs.lm])


def balance(layers: int, extra: list[float]) -> tuple[int, ...]:
    """Share out equal layers over parts that already carry ``extra`` work, one each at least."""
    counts = [1] * len(extra)
    for _ in range(layers - len(extra)):
        lightest = min(range(len(extra)), key=lambda i: counts[i] + 1 + extra[i])
        counts[lightest] += 1
    return tuple(counts)


def default_stages(layers: int, exit_layer: int) -> int:
    """Stages of about the first one's size, at least two."""
    return max(2, round(layers / exit_layer))


def check_split(split: tuple[int, ...], layers: int, exit_layer: int | None) -> None:
    """Raise ConfigError where an explicit split cannot be."""
    if sum(split) != layers:
        text = ",".join(map(str, split))
        raise ConfigError(f"--split {text} adds up to {sum(split)}; the model has {layers} layers")
    if exit_layer is not None and split[0] != exit_layer:
        raise ConfigError(
            f"--exit-layer {exit_layer} and --split {split[0]},... disagree: "
            "the exit layer is the end of the first stage"
        )


def _check_counts(layers: int, stages: int, exit_layer: int | None) -> None:
    if stages > layers:
        raise ConfigError(f"--stages {stages}: the model has only {layers} layers")
    if exit_layer is None:
        return
    if exit_layer == layers:
        raise ConfigError(
            f"--exit-layer {exit_layer} is the last layer of this {layers}-layer model; "
            f"choose 1 to {layers - 1}"
        )
    if exit_layer > layers:
        raise ConfigError(
            f"--exit-layer {exit_layer}: this model has {layers} layers; choose 1 to {layers - 1}"
        )
    if stages == 1:
        raise ConfigError("--exit-layer needs two stages or more; drop --stages 1")
    if layers - exit_layer < stages - 1:
        raise ConfigError(
            f"--exit-layer {exit_layer} leaves {layers - exit_layer} layers "
            f"for {stages - 1} stages; choose fewer stages or an earlier exit"
        )
