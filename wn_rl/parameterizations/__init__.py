"""Swappable parameterizations for any torch model. Imports only torch."""

from wn_rl.parameterizations import standard, weight_norm  # noqa: F401  (their decorators fill the registry)
from wn_rl.parameterizations.api import initialize_from_data, reparameterize, resolve
from wn_rl.parameterizations.base import Parameterization
from wn_rl.parameterizations.registry import get, names, register

__all__ = ["Parameterization", "get", "initialize_from_data", "names", "register", "reparameterize", "resolve"]
