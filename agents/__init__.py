"""Agents: they choose actions and learn; the loop around them is in wn_rl."""
