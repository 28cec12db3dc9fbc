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
    """Score checkpoints: the raw return of whole episodes, played ε-greedily.

    A protocol defines how; single flags override it, and the score says which. Several checkpoints are compared: over
    the seeds of a group, and between groups.
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT_OR_RUN …")]
    """Checkpoint directories, run directories (the latest checkpoint of each is scored), .zip files of a
    Stable-Baselines3 DQN, directories of any of these, or patterns such as 'runs/Breakout-*'."""
    protocol: str = protocols.TRAINING
    """paper (Salimans & Kingma 2016: 125,000 agent steps, no cap), nature (Mnih et al. 2015: 30 episodes of at most
    5 minutes), machado (Machado et al. 2018: sticky actions, 100 episodes), or training: 30 episodes with the emulator
    settings of the checkpoint's training."""
    episodes: Count | None = None
    """Number of episodes to play; overrides the protocol."""
    steps: Count | None = None
    """Play for this number of agent steps and count the completed episodes; overrides the protocol."""
    epsilon: float | None = None
    """Probability of a random action; overrides the protocol."""
    max_frames_per_episode: Count | None = None
    """Frame cap: truncate an episode after this number of emulator frames; 0 disables it. Overrides the protocol.
    Default with --episodes, if nothing else sets a cap: 108000, since an episode need not end by itself."""
    noop_max: Count | None = None
    """An episode starts with 0 … noop_max no-ops; overrides the protocol."""
    sticky_actions: float | None = None
    """Probability that a frame repeats the previous action; overrides the protocol."""
    fire_reset: bool | None = None
    """Press FIRE at the start of an episode; overrides the protocol."""
    action_set: Literal["minimal", "full", "checkpoint"] | None = None
    """minimal, full (18 actions), or checkpoint (that of the training); overrides the protocol."""
    seed: Count = 0
    """Seed of the emulators and of the random actions."""
    num_envs: Count = 0
    """Emulators that play in parallel; 0: as many as episodes, at most 30. Short episodes are not favoured."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the network."""
    num_threads: Count = 0
    """Threads of the network's arithmetic on a CPU; 0: all cores."""
    game: str | None = None
    """Game of a Stable-Baselines3 file, which does not store it."""
    param: str | None = None
    """module:Name of your own parameterization: a checkpoint names it, but its module is imported only if it is given
    here. For a Stable-Baselines3 file: the parameterization of its training, e.g. wn, if the file does not store it."""
    param_options: Options = field(default_factory=dict)
    """Options of that parameterization, for a Stable-Baselines3 file."""
    network: str | None = None
    """module:Name of your own network: a checkpoint names it, but its module is imported only if it is given here."""
    by: str = "param"
    """Configuration key that defines the groups when several checkpoints are scored or runs are reported."""
    json: str | None = None
    """Write score and length of all episodes, and how they were played, to this file."""
    csv: str | None = None
    """Write one row per checkpoint to this file."""
    video: str | None = None
    """Score nothing and write a video of an episode: FILE.mp4, in colour at the console's 60 fps, with Q-values, score
    and action beside the screen. One episode is played, or --episodes N of which --pick chooses one."""
    gif: str | None = None
    """The same as FILE.gif for a README, at 20 fps: the 12 seconds with the highest score."""
    saliency: bool = False
    """Draw the gradient of the chosen Q-value with respect to the observation over the screen."""
    pick: str = "1"
    """Which of the episodes the video shows: its number, best or median."""
    start: float | None = None
    """Start of the video, in seconds from the start of the episode."""
    seconds: float | None = None
    """Largest length of the video; default 300, and 12 for a .gif."""
    replay_episode: str | None = None
    """--video shows an episode of a run's training, rebuilt from its action log: best, longest or its number in
    episodes.csv; without the Q-values, which are not stored."""
    report: str | None = None
    """Play nothing: write one HTML page about runs into this directory, with figures and CSV files beside it. Needs no
    checkpoints."""
    curves: str | None = None
    """Play nothing: draw the learning curves of runs, FILE.png, .svg or .pdf."""
    smooth: Count = 5
    """Evaluations in the running mean of --curves and --report, at most a tenth of a curve; 1: no smoothing."""
    export: tuple[Literal["sb3", "torch", "onnx"], str] | None = None
    """Play nothing: write the network to a file, sb3 OUT.zip (for stable_baselines3.DQN.load), torch OUT.pt2
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
        from wn_rl.evaluation import comparison
        from wn_rl.report import report_directory

        comparison.check_key(wanted.by)
        return report_directory.report_command(
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
    from wn_rl.evaluation import comparison, scoring  # late: --help and usage errors need no torch
    from wn_rl.evaluation import policies as trained

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
    if wanted.video is not None or wanted.gif is not None:
        from wn_rl.video import episode_video

    if wanted.replay_episode is not None and wanted.video is not None:
        return episode_video.training_video_command(paths, wanted.replay_episode, Path(wanted.video))
    if wanted.video is not None or wanted.gif is not None:
        options = episode_video.VideoOptions(wanted.pick, wanted.saliency, wanted.start, wanted.seconds)
        files = {"video_path": _path(wanted.video), "gif_path": _path(wanted.gif)}
        return episode_video.video_command(paths, episode_video.one_episode(how), options, **files)
    if wanted.export is not None:
        from wn_rl.evaluation import export

        return export.export_command(paths, how, *wanted.export)
    from wn_rl.report import score_tables

    files = {"json_file": _path(wanted.json), "csv_file": _path(wanted.csv)}
    return score_tables.score_and_report(paths, how, by=wanted.by, **files)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _check_plays_nothing(given: set[str]) -> None:
    """Refuse flags about playing together with those that only read files."""
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
    _check_video(wanted)
    if wanted.json and wanted.csv and Path(wanted.json).absolute() == Path(wanted.csv).absolute():
        raise UsageError(f"--json and --csv both name {wanted.json}: one would replace the other")
    exported = wanted.export[1] if wanted.export else None
    outputs = {"--json": wanted.json, "--csv": wanted.csv, "--export": exported}
    for flag, file in (outputs | {"--video": wanted.video, "--gif": wanted.gif, "--curves": wanted.curves}).items():
        if file is not None:
            _check_writable(flag, Path(file))


def _check_video(wanted: EvaluateArguments) -> None:
    makes_video = wanted.video is not None or wanted.gif is not None
    if wanted.replay_episode is not None and wanted.video is None:
        raise UsageError("--replay-episode and --video FILE.mp4 belong together: add the other one")
    if makes_video and (wanted.json or wanted.csv or wanted.export):
        what = "--replay-episode" if wanted.replay_episode is not None else "a video"
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
        raise UsageError(
            f"{given[0]} is for episodes played now, --replay-episode for one of the training: leave one out"
        )
    if given and not makes_video:
        raise UsageError(f"{given[0]} needs --video FILE.mp4 or --gif FILE.gif")


def _check_writable(flag: str, path: Path) -> None:
    """Check, before an hour of play, that its result can be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: not a file in an existing directory")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot write there: {error.strerror}") from None
