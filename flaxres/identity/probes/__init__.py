"""Measurements: pure functions from (model, variables, batch) to arrays, to be jitted or not.

Those by depth give arrays `[blocks]` in the order of `branches.table`; images are floats
`[batch, height, width, channels]`, already normalised. With `train=True` batch norm uses the
statistics of the batch at hand, which is what a net sees at its start.
"""

from flaxres.identity.probes.awakening import awakening
from flaxres.identity.probes.jacobian import (
    block_jacobian,
    log_determinant,
    network_jacobian,
    singular_values,
)
from flaxres.identity.probes.landscape import line, plane
from flaxres.identity.probes.learning import gradients, movement
from flaxres.identity.probes.paths import path_gradients
from flaxres.identity.probes.shattering import gradient_correlation
from flaxres.identity.probes.signal import activations, identity

__all__ = [
    "activations",
    "awakening",
    "block_jacobian",
    "gradient_correlation",
    "gradients",
    "identity",
    "line",
    "log_determinant",
    "movement",
    "network_jacobian",
    "path_gradients",
    "plane",
    "singular_values",
]
