"""What is to be trained for the paper's table, in which order, and what of it there is.

A *rung* is a number of frames, a *cell* a game and a parameterization. A longer run fills its cell on the lower rungs
too: nothing in preset ``paper`` depends on where a run ends, so its beginning is the shorter run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from wn_rl.config import TrainConfig, load, recorded, resolve
from wn_rl.errors import WnRlError
from wn_rl.report.results import RunResult, read_run
from wn_rl.runs.directory import RunDirectory

PRESET = "paper"
SLACK = 0.001
"""Share of a rung by which an evaluation may lie beside it: it comes at the next vector step."""
SEEDS = (1, 2, 3)
"""That a cell is to have in the end."""
NO_MATTER = frozenset(
    {
        *("game", "param", "param_options", "preset", "frames", "seed", "batch_size", "run_dir", "learning_rates"),
        "chosen",
        *("device", "precision", "backend", "compile", "num_threads", "emulator_threads"),
        *("checkpoint_seconds", "checkpoint_period", "action_log", "reseed_period", "log_period", "evaluation_envs"),
    }
)
"""Keys in which a cell's runs may differ from the preset: its own, those of the machine, and those of what is kept."""


@dataclass(frozen=True)
class Rung:
    """So many frames of training."""

    name: str
    frames: int

    @property
    def label(self) -> str:
        """Frames in few letters, as ``--frames`` takes them."""
        return f"{self.frames // 10**6}M"


@dataclass(frozen=True)
class Cell:
    """A game and a parameterization, at a minibatch size."""

    game: str
    param: str
    batch_size: int = 64

    @property
    def group(self) -> str:
        """The parameterization, with the minibatch where it is not the paper's."""
        return self.param if self.batch_size == 64 else f"{self.param}, minibatch {self.batch_size}"

    def run_name(self, seed: int) -> str:
        """Return the name of a run's directory."""
        batch = "" if self.batch_size == 64 else f"-b{self.batch_size}"
        return f"{self.game}-{self.param}{batch}-{PRESET}-s{seed}"

    def command(self, rung: Rung, seed: int) -> str:
        """Return the command that trains it."""
        batch = "" if self.batch_size == 64 else f" --batch-size {self.batch_size}"
        return (
            f"python train.py --preset {PRESET} --game {self.game} --param {self.param}{batch} "
            f"--frames {rung.label} --seed {seed} --run-dir runs/{rung.name.lower()}/{self.run_name(seed)}"
        )


RUNGS = (Rung("R1", 4_000_000), Rung("R2", 50_000_000), Rung("R3", 200_000_000))
GAMES = ("SpaceInvaders", "Breakout", "Seaquest", "Enduro")
"""Of the paper's table, in the order in which they are trained."""
CELLS = tuple(Cell(game, param) for game in GAMES for param in ("wn", "standard"))
"""The paper's table."""
OTHER_CELLS = (
    *(Cell("SpaceInvaders", "bn", size) for size in (64, 256, 1024)),
    Cell("SpaceInvaders", "wn_mean_only_bn"),
    Cell("SpaceInvaders", "ln"),
)
"""The paper's other claim, that batch normalization is not suited to DQN unless the minibatch is large."""


@dataclass(frozen=True)
class Open:
    """A run that is still to be made."""

    rung: Rung
    cell: Cell
    seed: int

    @property
    def command(self) -> str:
        """The command that makes it."""
        return self.cell.command(self.rung, self.seed)


class Ladder:
    """The runs of preset ``paper`` that there are, by cell; others of that preset, which differ from it, by themselves.

    Attributes:
        others: (run, keys in which it differs from the preset).
    """

    def __init__(self, runs: Iterable[RunResult]) -> None:
        """Sort runs into cells."""
        self._runs: dict[Cell, list[RunResult]] = {}
        self.others: list[tuple[RunResult, list[str]]] = []
        for run in sorted(runs, key=lambda one: (one.config.seed, str(one.path))):
            config = run.config
            cell = Cell(config.game, config.param, config.batch_size)
            if cell not in (*CELLS, *OTHER_CELLS):
                self.others.append((run, ["param" if config.batch_size == 64 else "batch_size"]))
            elif keys := differences(config):
                self.others.append((run, keys))
            else:
                self._runs.setdefault(cell, []).append(run)

    def runs(self, cell: Cell, rung: Rung) -> list[RunResult]:
        """Return a cell's runs that reach a rung, cut off there; by seed."""
        return [cut(run, rung.frames) for run in self._runs.get(cell, []) if reaches(run, rung.frames)]

    def all_runs(self, cell: Cell) -> list[RunResult]:
        """Return a cell's runs as far as they go; by seed."""
        return list(self._runs.get(cell, []))

    def highest(self, cell: Cell) -> Rung | None:
        """Return the highest rung that one of the cell's runs reaches."""
        return next((rung for rung in reversed(RUNGS) if self.runs(cell, rung)), None)

    def next_open(self, rung: Rung, cells: Sequence[Cell] = CELLS, seeds: Sequence[int] = SEEDS) -> Open | None:
        """Return what is to be trained next on a rung: the first seed of every cell, then the second, and so on."""
        for seed in seeds:
            for cell in cells:
                if all(run.config.seed != seed for run in self.runs(cell, rung)):
                    return Open(rung, cell, seed)
        return None


def differences(config: TrainConfig) -> list[str]:
    """Return the keys in which a run differs from preset ``paper`` with its game and parameterization.

    Raises:
        WnRlError: its configuration makes no sense.
    """
    cell = {key: getattr(config, key) for key in ("game", "param", "batch_size", "frames", "seed")}
    wanted, found = resolve(replace(load(PRESET), **cell)), resolve(config, param_in_file=True)
    names = [entry.name for entry in fields(TrainConfig) if entry.name not in NO_MATTER]
    keys = [name for name in names if getattr(wanted, name) != getattr(found, name)]
    # Options have their defaults by now; what differs was asked for.
    return keys + ["param_options"] * (wanted.param_options != found.param_options)


def reaches(run: RunResult, frames: int) -> bool:
    """Return whether a run was evaluated at so many frames or later."""
    return float(run.frames[-1]) >= frames * (1 - SLACK)


def cut(run: RunResult, frames: int) -> RunResult:
    """Return a run as it was at so many frames."""
    kept = run.frames <= frames * (1 + SLACK)
    return replace(run, evaluations={name: column[kept] for name, column in run.evaluations.items()})


def score_at(run: RunResult, frames: float) -> float | None:
    """Return the mean score of the evaluation at so many frames, within 1% of them, or None."""
    nearest = int(abs(run.frames - frames).argmin())
    return float(run.scores[nearest]) if abs(run.frames[nearest] - frames) <= 0.01 * frames else None


def read_ladder(results: Path) -> Ladder:
    """Read every run of preset ``paper`` below a directory.

    Raises:
        WnRlError: there is no such directory, or a run's files are damaged.
    """
    if not results.is_dir():
        raise WnRlError(f"{results} is no directory of results")
    runs = [config.parent for config in sorted(results.rglob("config.yaml"))]
    return Ladder(read_run(run) for run in runs if recorded(RunDirectory(run).config).preset == PRESET)
