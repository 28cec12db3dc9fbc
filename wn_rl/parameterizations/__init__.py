"""Swappable parameterizations for any torch model. Imports only torch."""

# Importing a module registers its parameterizations, in this order.
from wn_rl.parameterizations import standard  # noqa: I001
from wn_rl.parameterizations import weight_norm
from wn_rl.parameterizations import batch_norm
from wn_rl.parameterizations import layer_norm
from wn_rl.parameterizations import spectral_norm
from wn_rl.parameterizations import projected
from wn_rl.parameterizations.api import (
    cannot_rescale,
    fold,
    forward,
    initialize_from_data,
    project,
    reparameterize,
    resolve,
)
from wn_rl.parameterizations.base import OutputNormalization, Parameterization, WeightParameterization
from wn_rl.parameterizations.reinitialization import reinitialize
from wn_rl.parameterizations.registry import get, load, names, register

__all__ = [
    "OutputNormalization",
    "Parameterization",
    "WeightParameterization",
    "batch_norm",
    "cannot_rescale",
    "fold",
    "forward",
    "get",
    "initialize_from_data",
    "layer_norm",
    "load",
    "names",
    "project",
    "projected",
    "register",
    "reinitialize",
    "reparameterize",
    "resolve",
    "spectral_norm",
    "standard",
    "weight_norm",
]
