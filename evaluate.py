"""Score trained networks: ``python evaluate.py CHECKPOINT_OR_RUN …``; raw points of whole games."""

from __future__ import annotations

from wn_rl import cli
from wn_rl.commands.evaluate import EvaluateArguments, main

__all__ = ["EvaluateArguments", "main"]

if __name__ == "__main__":
    cli.run(main)
