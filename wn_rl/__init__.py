"""wn_rl: deep Q-networks for Atari with swappable weight parameterizations.

Names are imported when they are first used, so ``from wn_rl import reparameterize`` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "reinitialize": "wn_rl.parameterizations",
    "reparameterize": "wn_rl.parameterizations",
    "initialize_from_data": "wn_rl.parameterizations",
    "fold": "wn_rl.parameterizations",
    "project": "wn_rl.parameterizations",
    "register": "wn_rl.parameterizations",
    "Parameterization": "wn_rl.parameterizations",
    "WeightParameterization": "wn_rl.parameterizations",
    "OutputNormalization": "wn_rl.parameterizations",
    "make_atari": "wn_rl.atari.env",
    "game_names": "wn_rl.atari.games",
    "load": "wn_rl.api",
    "train": "wn_rl.api",
    "evaluate": "wn_rl.api",
}
__all__ = [
    "OutputNormalization",
    "Parameterization",
    "WeightParameterization",
    "__version__",
    "evaluate",
    "fold",
    "game_names",
    "initialize_from_data",
    "load",
    "make_atari",
    "project",
    "register",
    "reinitialize",
    "reparameterize",
    "train",
]

if TYPE_CHECKING:
    from wn_rl.api import evaluate, load, train
    from wn_rl.atari.env import make_atari
    from wn_rl.atari.games import game_names
    from wn_rl.parameterizations import (
        OutputNormalization,
        Parameterization,
        WeightParameterization,
        fold,
        initialize_from_data,
        project,
        register,
        reinitialize,
        reparameterize,
    )


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the type is that of the name
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name == "sb3":  # so that wn_rl.sb3.policy_kwargs needs no import of its own
        return importlib.import_module("wn_rl.sb3")
    raise AttributeError(f"module 'wn_rl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
