"""The commands of an installed package: ``wn-rl train …`` and ``wn-rl evaluate …``, or ``python -m wn_rl train …``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from wn_rl import __version__, cli
from wn_rl.errors import UsageError, closest

COMMANDS = ("train", "evaluate")
HELP = """usage: {program} COMMAND …

Commands:
  train      train a DQN with a weight parameterization of your choice on an Atari game
  evaluate   score trained networks, report on runs, write videos, export

{program} COMMAND --help lists a command's flags; --version prints the version.
"""


def _command(program: str, words: Sequence[str]) -> int:
    if not words:
        raise UsageError(f"no command is named: {program} {' or '.join(COMMANDS)}")
    name, *arguments = words
    if name in ("-h", "--help"):
        print(HELP.format(program=program), end="")
        return 0
    if name == "--version":
        print(f"wn_rl {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"unknown command '{name}'.{closest(name, COMMANDS)} There are: {', '.join(COMMANDS)}.")
    sys.argv[0] = f"{program} {name}"  # --help and messages say what was typed
    return int(importlib.import_module(f"wn_rl.commands.{name}").main(arguments))


def main() -> None:
    """Run the command that stands on the command line and exit."""
    program = "python -m wn_rl" if Path(sys.argv[0]).name == "__main__.py" else "wn-rl"
    cli.run(lambda words: _command(program, words))


if __name__ == "__main__":
    main()
