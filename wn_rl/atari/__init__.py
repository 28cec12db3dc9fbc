"""Atari: the games, and the vector environment with its preprocessing."""
