"""The experiments of docs/reproduction.md: which runs the paper's table needs, in which order, and which are there.

A *configuration* is a game and a parameterization, a *budget* a number of training frames; the grid is every
configuration at every budget, with three seeds each. A longer run also counts at the smaller budgets: nothing in preset
``paper`` depends on where a run ends, so the beginning of a long run is the short run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from wn_rl.config import TrainConfig, load, recorded, resolve
from wn_rl.errors import WnRlError
from wn_rl.report.run_data import RunResult, read_run
from wn_rl.runs.directory import RunDirectory

PRESET = "paper"
SLACK = 0.001
"""Relative tolerance of a budget: an evaluation takes place at the end of a vector step, so slightly late."""
SEEDS = (1, 2, 3)
"""Of every configuration."""
IGNORED_KEYS = frozenset(
    {
        *("game", "param", "param_options", "preset", "frames", "seed", "batch_size", "run_dir", "learning_rates"),
        "chosen",
        *("device", "precision", "backend", "compile", "num_threads", "emulator_threads"),
        *("checkpoint_seconds", "checkpoint_period", "action_log", "reseed_period", "log_period", "evaluation_envs"),
    }
)
"""Keys in which a run may differ from the preset: those of its configuration, of the machine, and of what is stored."""


@dataclass(frozen=True)
class Budget:
    """A number of training frames, with a name."""

    name: str
    frames: int

    @property
    def label(self) -> str:
        """The frames as ``--frames`` takes them, e.g. ``4M``."""
        return f"{self.frames // 10**6}M"


@dataclass(frozen=True)
class Configuration:
    """A game, a parameterization and a minibatch size."""

    game: str
    param: str
    batch_size: int = 64

    @property
    def group(self) -> str:
        """The parameterization, with the minibatch size if it is not the paper's."""
        return self.param if self.batch_size == 64 else f"{self.param}, minibatch {self.batch_size}"

    def run_name(self, seed: int) -> str:
        """Return the name of a run's directory."""
        batch = "" if self.batch_size == 64 else f"-b{self.batch_size}"
        return f"{self.game}-{self.param}{batch}-{PRESET}-s{seed}"

    def command(self, budget: Budget, seed: int) -> str:
        """Return the command that trains it."""
        batch = "" if self.batch_size == 64 else f" --batch-size {self.batch_size}"
        return (
            f"python train.py --preset {PRESET} --game {self.game} --param {self.param}{batch} "
            f"--frames {budget.label} --seed {seed} --run-dir runs/{budget.name.lower()}/{self.run_name(seed)}"
        )


BUDGETS = (Budget("R1", 4_000_000), Budget("R2", 50_000_000), Budget("R3", 200_000_000))
GAMES = ("SpaceInvaders", "Breakout", "Seaquest", "Enduro")
"""The games of the paper's table, in the order in which they are trained."""
CONFIGURATIONS = tuple(Configuration(game, param) for game in GAMES for param in ("wn", "standard"))
"""Those of the paper's table."""
OTHER_CONFIGURATIONS = (
    *(Configuration("SpaceInvaders", "bn", size) for size in (64, 256, 1024)),
    Configuration("SpaceInvaders", "wn_mean_only_bn"),
    Configuration("SpaceInvaders", "ln"),
)
"""Those of the paper's other claim: batch normalization does not work well in DQN unless the minibatch is large."""


@dataclass(frozen=True)
class MissingRun:
    """A run of the grid that has not been trained yet."""

    budget: Budget
    configuration: Configuration
    seed: int

    @property
    def command(self) -> str:
        """The command that trains it."""
        return self.configuration.command(self.budget, self.seed)


class ExperimentGrid:
    """The existing runs of preset ``paper`` by configuration.

    Attributes:
        others: runs of the preset that belong to no configuration: (run, keys in which it differs from the preset).
    """

    def __init__(self, runs: Iterable[RunResult]) -> None:
        """Sort runs into configurations."""
        self._runs: dict[Configuration, list[RunResult]] = {}
        self.others: list[tuple[RunResult, list[str]]] = []
        for run in sorted(runs, key=lambda one: (one.config.seed, str(one.path))):
            config = run.config
            configuration = Configuration(config.game, config.param, config.batch_size)
            if configuration not in (*CONFIGURATIONS, *OTHER_CONFIGURATIONS):
                self.others.append((run, ["param" if config.batch_size == 64 else "batch_size"]))
            elif keys := differences(config):
                self.others.append((run, keys))
            else:
                self._runs.setdefault(configuration, []).append(run)

    def runs(self, configuration: Configuration, budget: Budget) -> list[RunResult]:
        """Return a configuration's runs that reach a budget, truncated there, ordered by seed."""
        return [
            truncated(run, budget.frames) for run in self._runs.get(configuration, []) if reaches(run, budget.frames)
        ]

    def all_runs(self, configuration: Configuration) -> list[RunResult]:
        """Return a configuration's runs in full length, ordered by seed."""
        return list(self._runs.get(configuration, []))

    def largest_budget(self, configuration: Configuration) -> Budget | None:
        """Return the largest budget that a run of the configuration reaches, or None."""
        return next((budget for budget in reversed(BUDGETS) if self.runs(configuration, budget)), None)

    def next_missing(
        self, budget: Budget, configurations: Sequence[Configuration] = CONFIGURATIONS, seeds: Sequence[int] = SEEDS
    ) -> MissingRun | None:
        """Return the next run to train at a budget: the first seeds of all configurations, then the second."""
        for seed in seeds:
            for configuration in configurations:
                if all(run.config.seed != seed for run in self.runs(configuration, budget)):
                    return MissingRun(budget, configuration, seed)
        return None


def differences(config: TrainConfig) -> list[str]:
    """Return the keys in which a run differs from preset ``paper`` with its game and parameterization.

    Raises:
        WnRlError: its configuration is invalid.
    """
    own = {key: getattr(config, key) for key in ("game", "param", "batch_size", "frames", "seed")}
    wanted, found = resolve(replace(load(PRESET), **own)), resolve(config, param_in_file=True)
    names = [entry.name for entry in fields(TrainConfig) if entry.name not in IGNORED_KEYS]
    keys = [name for name in names if getattr(wanted, name) != getattr(found, name)]
    # Both have their defaults filled in, so a difference was chosen by the user.
    return keys + ["param_options"] * (wanted.param_options != found.param_options)


def reaches(run: RunResult, frames: int) -> bool:
    """Return whether a run was evaluated at ``frames`` or later."""
    return float(run.frames[-1]) >= frames * (1 - SLACK)


def truncated(run: RunResult, frames: int) -> RunResult:
    """Return a run as it was at ``frames``: later evaluations are left out."""
    kept = run.frames <= frames * (1 + SLACK)
    return replace(run, evaluations={name: column[kept] for name, column in run.evaluations.items()})


def score_at(run: RunResult, frames: float) -> float | None:
    """Return the mean score of the evaluation nearest to ``frames``, or None if it is more than 1% away."""
    nearest = int(abs(run.frames - frames).argmin())
    return float(run.scores[nearest]) if abs(run.frames[nearest] - frames) <= 0.01 * frames else None


def read_grid(results: Path) -> ExperimentGrid:
    """Read every run of preset ``paper`` below a directory.

    Raises:
        WnRlError: there is no such directory, or a run's files are damaged.
    """
    if not results.is_dir():
        raise WnRlError(f"{results} is no directory of results")
    runs = [config.parent for config in sorted(results.rglob("config.yaml"))]
    return ExperimentGrid(read_run(run) for run in runs if recorded(RunDirectory(run).config).preset == PRESET)
