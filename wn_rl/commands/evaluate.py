"""The command ``evaluate``: scores, reports, videos and exports of trained networks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wn_rl import cli
from wn_rl.atari.games import find_game
from wn_rl.config import Count, Options, TrainConfig, import_network, import_parameterization
from wn_rl.errors import UsageError
from wn_rl.evaluation import protocols


@dataclass(frozen=True)
class EvaluateArguments:
    """Score checkpoints: raw points of whole games, played with a small probability of random actions.

    The protocol says how; single flags change it, and the score says that they did. Several checkpoints are compared:
    over the seeds of a group, and the groups with each other.
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT_OR_RUN …")]
    """Checkpoint directories, run directories (the latest checkpoint of each is scored), .zip files of a
    Stable-Baselines3 DQN, directories of any of these, or patterns such as 'runs/Breakout-*'."""
    protocol: str = protocols.TRAINING
    """paper (Salimans & Kingma 2016: 125,000 agent steps, no cap), nature (Mnih et al. 2015: 30 games of at most 5
    minutes), machado (Machado et al. 2018: sticky actions, 100 games), or training: 30 games with the emulator settings
    of the checkpoint's training."""
    episodes: Count | None = None
    """Whole games to play, instead of what the protocol says; so are the next seven."""
    steps: Count | None = None
    """Play for so many agent steps and count the games completed."""
    epsilon: float | None = None
    """Probability of a random action."""
    max_frames_per_episode: Count | None = None
    """End a game after so many emulator frames, 0: never. Where nothing says it and --episodes counts, 108000, since a
    game need not end."""
    noop_max: Count | None = None
    """At the start of a game 0 … noop_max no-ops are played."""
    sticky_actions: float | None = None
    """Probability that a frame repeats the previous action."""
    fire_reset: bool | None = None
    """Press FIRE at the start of a game."""
    action_set: Literal["minimal", "full", "checkpoint"] | None = None
    """checkpoint: the action set of the training where the protocol has another one; the score says so."""
    seed: Count = 0
    """Seed of the emulators and of the random actions."""
    num_envs: Count = 0
    """Emulators that play at a time; 0: as many as episodes, at most 30. It does not favour short games."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    num_threads: Count = 0
    """Threads of the network's arithmetic on a CPU; 0: all cores."""
    game: str | None = None
    """Game of a Stable-Baselines3 file, which does not name it."""
    param: str | None = None
    """module:Name of the parameterization, where it is your own: a checkpoint names it, but its module is imported only
    when it stands here. For a Stable-Baselines3 file: the parameterization with which it was trained, where the
    file does not name it, e.g. wn."""
    param_options: Options = field(default_factory=dict)
    """Its options, for a Stable-Baselines3 file."""
    network: str | None = None
    """module:Name of the network, where it is your own: a checkpoint names it, but its module is imported only when it
    stands here."""
    by: str = "param"
    """Configuration key whose values are compared where several checkpoints are scored or runs are drawn."""
    json: str | None = None
    """Write every episode's score and length, and how they were played, to this file."""
    csv: str | None = None
    """Write one row a checkpoint to this file."""
    video: str | None = None
    """Score nothing and film a game: FILE.mp4, in colour at the console's 60 frames a second, with the Q-values, the
    score and the action beside the screen. One game is played, or --episodes N of which --pick takes one."""
    gif: str | None = None
    """The same as FILE.gif for a README, 20 pictures a second: 12 seconds, those in which most points are made."""
    saliency: bool = False
    """Draw the gradient of the chosen Q-value by the observation over the screen."""
    pick: str = "1"
    """Which of the games is filmed: its number, best or median."""
    start: float | None = None
    """Begin the film so many seconds into the game."""
    seconds: float | None = None
    """Length of the film at most; otherwise 300, and 12 of a .gif."""
    replay_episode: str | None = None
    """Play nothing new: --video shows an episode of a run's training again, best, longest or its number in
    episodes.csv, without the Q-values, which nobody kept."""
    report: str | None = None
    """Play nothing: write one HTML page about runs into this directory, with figures and CSV files beside it. Needs no
    checkpoints."""
    curves: str | None = None
    """Play nothing: draw the learning curves of runs, FILE.png, .svg or .pdf."""
    smooth: Count = 5
    """Evaluations in the running mean of --curves and --report, but never more than a tenth of a curve's; 1: none."""
    export: tuple[Literal["sb3", "torch", "onnx"], str] | None = None
    """Play nothing and write the network to a file instead: sb3 OUT.zip (for stable_baselines3.DQN.load), torch OUT.pt2
    (a torch.export program) or onnx OUT.onnx, the parameterization folded into plain weights."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    wanted = cli.parse(EvaluateArguments, cli.fill_switch(arguments, "--saliency"))
    changes = {key: value for key in protocols.SETTINGS if (value := getattr(wanted, key)) is not None}
    _check(wanted, changes)
    if "smooth" in cli.given_flags(arguments) and wanted.report is None and wanted.curves is None:
        raise UsageError("--smooth belongs to --curves and --report")
    if wanted.report is not None or wanted.curves is not None:
        _check_plays_nothing(cli.given_flags(arguments))
        from wn_rl.report import comparison, directory

        comparison.check_key(wanted.by)
        return directory.report_command(
            wanted.checkpoints,
            report=_path(wanted.report),
            curves_file=_path(wanted.curves),
            by=wanted.by,
            window=wanted.smooth,
        )
    if wanted.param is not None and ":" in wanted.param:
        import_parameterization(wanted.param)
    if wanted.network is not None:
        import_network(wanted.network)
    from wn_rl.evaluation import policies as trained  # late: --help and wrong words need no torch
    from wn_rl.evaluation import scoring
    from wn_rl.report import batch, comparison

    comparison.check_key(wanted.by)
    trained.check_param(wanted.param, wanted.param_options)
    how = scoring.How(
        wanted.protocol,
        changes,
        seed=wanted.seed,
        num_envs=wanted.num_envs,
        device=wanted.device,
        num_threads=wanted.num_threads,
        game=wanted.game,
        param=wanted.param,
        param_options=wanted.param_options,
    )
    paths = scoring.expand(wanted.checkpoints)
    if wanted.replay_episode is not None and wanted.video is not None:
        from wn_rl.report import training_episode

        return training_episode.film_command(paths, wanted.replay_episode, Path(wanted.video))
    if wanted.video is not None or wanted.gif is not None:
        from wn_rl.report import game_film

        what = game_film.Wanted(wanted.pick, wanted.saliency, wanted.start, wanted.seconds)
        files = {"video_path": _path(wanted.video), "gif_path": _path(wanted.gif)}
        return game_film.film_command(paths, game_film.one_game(how), what, **files)
    if wanted.export is not None:
        from wn_rl.evaluation import export

        return export.export_command(paths, how, *wanted.export)
    return batch.score_and_report(paths, how, json=_path(wanted.json), csv=_path(wanted.csv), by=wanted.by)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _check_plays_nothing(given: set[str]) -> None:
    """Refuse flags that say how to play beside those that read what was played."""
    if others := sorted(given - {"report", "curves", "by", "smooth"}):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UsageError(f"--report and --curves read the runs' files and play nothing: leave out {flags}")


def _check(wanted: EvaluateArguments, changes: dict[str, Any]) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "episodes": (1, 10**6),
        "steps": (1, 10**12),
        "epsilon": (0.0, 1.0),
        "seed": (0, 2**31 - 1),
        "num_envs": (0, 4096),
        "num_threads": (0, 1024),
        "max_frames_per_episode": (0, 2**31 - 1),
        "noop_max": (0, 10_000),
        "smooth": (1, 10**6),
        "sticky_actions": (0.0, 0.999),
    }
    for name, (low, high) in ranges.items():
        value = getattr(wanted, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} must be from {low:,} to {high:,}, not {value}")
    protocols.find_protocol(wanted.protocol, changes, TrainConfig())
    if wanted.game is not None:
        find_game(wanted.game)
    if not wanted.checkpoints:
        raise UsageError("nothing to score is named: add a CHECKPOINT_OR_RUN")
    if wanted.export is not None and (wanted.json or wanted.csv):
        raise UsageError("--export plays nothing, so it has no scores for --json or --csv: leave one of them out")
    _check_film(wanted)
    if wanted.json and wanted.csv and Path(wanted.json).absolute() == Path(wanted.csv).absolute():
        raise UsageError(f"--json and --csv both name {wanted.json}: one would replace the other")
    exported = wanted.export[1] if wanted.export else None
    outputs = {"--json": wanted.json, "--csv": wanted.csv, "--export": exported}
    for flag, file in (outputs | {"--video": wanted.video, "--gif": wanted.gif, "--curves": wanted.curves}).items():
        if file is not None:
            _check_writable(flag, Path(file))


def _check_film(wanted: EvaluateArguments) -> None:
    films = wanted.video is not None or wanted.gif is not None
    if wanted.replay_episode is not None and wanted.video is None:
        raise UsageError("--replay-episode and --video FILE.mp4 belong together: add the other one")
    if films and (wanted.json or wanted.csv or wanted.export):
        what = "--replay-episode" if wanted.replay_episode is not None else "a film"
        raise UsageError(f"{what} scores nothing: leave out --json, --csv and --export")
    of_play = {
        "--gif": wanted.gif is not None,
        "--saliency": wanted.saliency,
        "--pick": wanted.pick != "1",
        "--start": wanted.start is not None,
        "--seconds": wanted.seconds is not None,
    }
    given = [flag for flag, stands in of_play.items() if stands]
    if given and wanted.replay_episode is not None:
        raise UsageError(f"{given[0]} is for games played now, --replay-episode for one of the training: leave one out")
    if given and not films:
        raise UsageError(f"{given[0]} needs --video FILE.mp4 or --gif FILE.gif")


def _check_writable(flag: str, path: Path) -> None:
    """Find out before an hour of play whether its result can be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: not a file in an existing directory")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot write there: {error.strerror}") from None
