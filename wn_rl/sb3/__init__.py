"""Parameterizations in Stable-Baselines3 models, and networks read from its files."""

from wn_rl.sb3.bridge import ReparameterizeThenOptimize as ReparameterizeThenOptimize
from wn_rl.sb3.bridge import initialize_from_env as initialize_from_env
from wn_rl.sb3.bridge import policy_kwargs as policy_kwargs
