"""Train a DQN: ``python train.py --game Breakout --param wn``; ``--help`` lists every key."""

from __future__ import annotations

from wn_rl import cli
from wn_rl.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    cli.run(main)
