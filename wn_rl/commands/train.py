"""The command ``train``: one training run from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wn_rl import cli, config, layout
from wn_rl.atari.games import game_names
from wn_rl.output import notice, notices
from wn_rl.runs.directory import new_directory

HELP = """Train a DQN with a weight parameterization of your choice on an Atari game.

A flag beats the file of --config, which beats the preset. Three more flags:
  --config FILE.yaml   configuration keys from a file; the config.yaml of a run repeats it
  --resume RUN_DIR     go on from the run's last checkpoint, exactly (its replay buffer is restored first)
  --quiet              print nothing but errors

Units: a frame is one emulator frame; an agent step is one decision, 4 frames; an update is one optimizer step.
Counts may be written 200M, 2e6 or 500k. The defaults shown are those of the preset.

Games: """


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    config_file, arguments = cli.take_option(arguments, "--config")
    resume, arguments = cli.take_option(arguments, "--resume")
    quiet, arguments = cli.take_switch(arguments, "--quiet")
    with notices(shown=not quiet):
        return _train(arguments, config_file, resume, quiet=quiet)


def _train(arguments: Sequence[str], config_file: str | None, resume: str | None, *, quiet: bool) -> int:
    arguments, renamed = config.current_flags(arguments)
    if renamed:
        notice(renamed)
    preset = None if resume else cli.take_option(arguments, "--preset")[0]
    file = Path(config_file) if config_file else None
    base = config.load(preset, file)
    wanted = cli.parse(
        config.TrainConfig,
        arguments,
        default=base,
        description=HELP + ", ".join(game_names()) + ".",
        suggest=config.flag_suggestion,
    )
    given = {key: getattr(wanted, key) for key in cli.given_flags(arguments)}
    if "param" in given and ":" in wanted.param:
        config.import_parameterization(wanted.param)
    if "network" in given and ":" in wanted.network:
        config.import_network(wanted.network)
    if "backend" in given and ":" in wanted.backend:
        layout.import_agent("backends").load(wanted.backend)
    if resume:
        read = config.read_yaml(file) if file else {}
        return _resume(
            Path(resume), {key: value for key, value in read.items() if key != "chosen"} | given, quiet=quiet
        )
    wanted, stays = config.configure(preset, file, given)
    in_file = {f"{key}_in_file": file is not None and key not in given for key in ("param", "network")}
    wanted = config.resolve(wanted, **in_file)
    if stays and not quiet:
        print(stays)
    from wn_rl.training.session import train  # late: --help and wrong words need no torch

    agent = layout.import_agent("dqn").DQN
    if wanted.run_dir:
        return train(wanted, agent, Path(wanted.run_dir), quiet=quiet)
    with new_directory(wanted.game, wanted.param, wanted.preset, wanted.seed) as directory:
        return train(wanted, agent, directory, quiet=quiet)


def _resume(directory: Path, changes: dict[str, object], *, quiet: bool) -> int:
    from wn_rl.training.resume import open_for_resume
    from wn_rl.training.session import train

    resumed, checkpoint = open_for_resume(directory, changes)
    return train(resumed, layout.import_agent("dqn").DQN, directory, resume=checkpoint, quiet=quiet)
