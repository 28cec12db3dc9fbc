"""The command ``train``: one training run from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wn_rl import cli, config, layout
from wn_rl.atari.games import game_names
from wn_rl.runs import directory as runs

HELP = """Train a DQN with a weight parameterization of your choice on an Atari game.

A flag beats the file of --config, which beats the preset. Three more flags:
  --config FILE.yaml   configuration keys from a file; the config.yaml of a run repeats it
  --resume RUN_DIR     go on from the run's last checkpoint, exactly (what its replay held is played again first)
  --quiet              print nothing but errors

Units: a frame is one emulator frame; an agent step is one decision, 4 frames; an update is one optimizer step.
Counts may be written 200M, 2e6 or 500k. The defaults shown are those of the preset.

Games: """


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    config_file, arguments = cli.take_option(arguments, "--config")
    resume, arguments = cli.take_option(arguments, "--resume")
    quiet, arguments = cli.take_switch(arguments, "--quiet")
    preset = None if resume else cli.take_option(arguments, "--preset")[0]
    base = config.load(preset, Path(config_file) if config_file else None)
    wanted = cli.parse(config.TrainConfig, arguments, default=base, description=HELP + ", ".join(game_names()) + ".")
    typed = "param" in cli.given_flags(arguments)
    if typed and ":" in wanted.param:
        config.import_parameterization(wanted.param)
    if resume:
        given = cli.given_flags(arguments) | (config.read_yaml(Path(config_file)).keys() if config_file else set())
        return _resume(Path(resume), {key: getattr(wanted, key) for key in given}, quiet=quiet)
    wanted = config.resolve(wanted, param_in_file=config_file is not None and not typed)
    name = runs.default_directory(wanted.game, wanted.param, wanted.preset, wanted.seed)
    from wn_rl.training.run import train  # late: --help and wrong words need no torch

    return train(wanted, layout.import_agent("dqn").DQN, Path(wanted.run_dir) if wanted.run_dir else name, quiet=quiet)


def _resume(directory: Path, changes: dict[str, object], *, quiet: bool) -> int:
    from wn_rl.training.run import open_for_resume, train

    resumed, checkpoint = open_for_resume(directory, changes)
    return train(resumed, layout.import_agent("dqn").DQN, directory, resume=checkpoint, quiet=quiet)
