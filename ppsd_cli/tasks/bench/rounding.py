"""How far rounding alone can move logits: wider matrices sum in another order."""

from torch import Tensor

RELATIVE_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Gap of two logits that rounding of other matrix shapes explains, over the larger of 1 and the
larger logit's size. About 2^13, 10 and 4 roundings of the format's last place."""
MEASURED_TOLERANCE = 8.0
"""The same gap, over the measured root mean square difference of logits between matrix shapes.
Weights that nobody trained are far noisier than their logits are large."""


def rounding_tolerance(
    stepped: Tensor, at_once: Tensor, tokens: tuple[int, int], dtype: str
) -> float:
    """The largest gap between the logits of two ``tokens`` that rounding explains.

    ``stepped`` and ``at_once`` [V]: plain decoding's logits of one text, token by token and as one
    prompt, so that their difference is rounding and nothing else.
    """
    size = max(1.0, *(abs(float(stepped[token])) for token in tokens))
    noise = float((stepped - at_once).square().mean().sqrt())
    return max(RELATIVE_TOLERANCE[dtype] * size, MEASURED_TOLERANCE * noise)
