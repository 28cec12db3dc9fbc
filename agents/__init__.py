"""Agents: what decides and learns; the loop around them is in wn_rl."""
