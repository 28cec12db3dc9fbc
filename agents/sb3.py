"""The former name of :mod:`wn_rl.sb3`, the bridge to Stable-Baselines3, to which older saved files still refer."""

from __future__ import annotations

from wn_rl.sb3 import ReparameterizeThenOptimize, initialize_from_env, policy_kwargs

__all__ = ["ReparameterizeThenOptimize", "initialize_from_env", "policy_kwargs"]
