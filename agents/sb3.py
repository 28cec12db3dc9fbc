"""The bridge to Stable-Baselines3 under its former name: :mod:`wn_rl.sb3`, to which files saved before still refer."""

from __future__ import annotations

from wn_rl.sb3 import ReparameterizeThenOptimize, initialize_from_env, policy_kwargs

__all__ = ["ReparameterizeThenOptimize", "initialize_from_env", "policy_kwargs"]
