"""Pairs of output activation and loss that name every one of either, for tests of all of them."""

from jaxnn.batch import CROSSENTROPIES
from jaxnn.model.activations import ACTIVATIONS
from jaxnn.model.losses import ERROR_LOSSES, OUTPUT_LOSSES

OUTPUTS, ERRORS = list(ACTIVATIONS), list(ERROR_LOSSES)
PAIRS = [
    pair
    for pair in OUTPUT_LOSSES
    if pair[1] in CROSSENTROPIES
    or pair[0] in ("identity", "softmax")
    or OUTPUTS.index(pair[0]) % len(ERRORS) == ERRORS.index(pair[1])
]
