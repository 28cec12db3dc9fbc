"""What a parameterization costs: the time of one whole DQN update of each parameterization over that of ``standard``.

``python benchmarks/parameterizations.py`` prints the table; ``--out`` writes it as CSV. All are timed in turn, round
after round, on minibatches of real frames, so that a busy moment of the machine meets them alike; the ratio is taken
within each round and its median is shown with the range of the middle half of the rounds.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agents.backends import make_backend
from agents.backends.choice import choose_for_all
from agents.dqn import DQN
from wn_rl import cli
from wn_rl.atari.env import AtariVector, make_atari
from wn_rl.config import load, resolve
from wn_rl.errors import UsageError
from wn_rl.evaluation.episodes import environment_options
from wn_rl.machine import Precision, device_name, keep_freed_memory, precisions, resolve_device
from wn_rl.parameterizations import names, register
from wn_rl.parameterizations.base import Parameterization
from wn_rl.parameterizations.weight_norm import WeightNormalization
from wn_rl.replay import Replay


@register("wn_plain")
class PlainWeightNormalization(WeightNormalization):
    """Weight normalization through torch's parametrize alone, as any model has it: w is computed, then used."""

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return ``layer(x)``."""
        return Parameterization.forward(self, layer, x)


@dataclass(frozen=True)
class Arguments:
    """Time one DQN update of each parameterization against that of standard."""

    game: str = "Breakout"
    """The game whose frames fill the minibatches."""
    batch_sizes: tuple[int, ...] = (32, 64)
    """Minibatch sizes."""
    rounds: int = 40
    """Rounds in which every parameterization is timed once."""
    updates: int = 10
    """Updates per parameterization and round."""
    params: tuple[str, ...] = ()
    """Parameterizations besides standard; default: all, and wn_plain."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """As in train.py; auto: one for all, that of the entry that gains least by bfloat16."""
    num_threads: int = 0
    """Threads of the arithmetic on a CPU; 0: torch's default."""
    cpu_time: bool = False
    """Measure CPU time instead of time: with one thread, on a machine that does something else too."""
    out: str | None = None
    """Write the table to this file, in which rows of another device are kept; default: it is printed and kept nowhere.
    docs/results/benchmarks/parameterizations.csv is that of the documentation."""


COLUMNS = ("hardware", "threads", "precision", "torch", "minibatch", "param", "ms", "ratio", "ratio_low", "ratio_high")


def play(game: str, count: int, device: torch.device) -> tuple[Replay, int]:
    """Return a replay with ``count`` transitions of random play, and how many actions the game has."""
    config = resolve(replace(load("quick"), game=game, param="standard"))
    env: AtariVector = make_atari(game, 8, num_threads=2, **environment_options(config))
    replay = Replay(count, 8, device=device, seed=0)
    observations, _ = env.reset(seed=np.arange(8, dtype=np.int32))
    replay.start(observations[:, -1])
    generator = np.random.default_rng(0)
    for _ in range(count // 8):
        actions = generator.integers(env.num_actions, size=8)
        observations, rewards, terminated, _, info = env.step(actions)
        replay.add(actions, rewards, terminated, observations[:, -1], info["is_reset"])
    env.close()
    return replay, env.num_actions


def entries_of(arguments: Arguments) -> list[str]:
    """Return what is timed, standard first."""
    return ["standard", *(arguments.params or [name for name in names() if name != "standard"])]


def one_precision(arguments: Arguments) -> Precision:
    """Return the precision in which all entries are timed, so that their times can be compared."""
    paper = replace(load("paper"), game=arguments.game, device=arguments.device, precision=arguments.precision)
    possible = precisions(paper, resolve_device(paper).device)
    if len(possible) == 1:
        return possible[0]
    arms = {
        f"{name}, minibatch {size}": resolve_device(resolve(replace(paper, param=name, batch_size=size)))
        for size in arguments.batch_sizes
        for name in entries_of(arguments)
    }
    return choose_for_all(arms, DQN, precisions=possible).precision


def measure(
    arguments: Arguments, batch_size: int, replay: Replay, num_actions: int, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds per update of each round, by parameterization."""
    entries = entries_of(arguments)
    agents, backends = {}, {}
    for name in entries:
        config = resolve(replace(load("paper"), game=arguments.game, param=name, batch_size=batch_size))
        config = resolve_device(replace(config, device=arguments.device, precision=arguments.precision))
        agents[name] = DQN(config, num_actions, device)
        agents[name].initialize(replay.sample(256).observations)
        backends[name] = make_backend(agents[name], replay)
        print(f"{name}: {backends[name].name} {backends[name].detail}".rstrip())
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(arguments.rounds + 2):
        for name in entries if turn % 2 else reversed(entries):
            wait(device)
            started = clock()
            backends[name].update(arguments.updates)
            wait(device)
            if turn >= 2:  # the first rounds warm up
                seconds[name].append((clock() - started) / arguments.updates)
        if turn == 1 and any(not agent.is_finite() for agent in agents.values()):
            raise UsageError("a weight is not finite: the times would be those of no real update")
    return seconds


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    arguments = cli.parse(Arguments, words)
    if min(arguments.rounds, arguments.updates, *arguments.batch_sizes) < 1:
        raise UsageError("--rounds, --updates and --batch-sizes must be at least 1")
    if arguments.cpu_time and arguments.out is not None:
        raise UsageError("--out keeps times, not CPU times")
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    keep_freed_memory()
    arguments = replace(arguments, precision=one_precision(arguments))
    config = resolve_device(
        replace(load("paper"), device=arguments.device, precision=arguments.precision, game=arguments.game)
    )
    device = torch.device(config.device)
    replay, num_actions = play(arguments.game, 4000, device)
    hardware = device_name(device)
    rows = []
    for batch_size in arguments.batch_sizes:
        seconds = measure(arguments, batch_size, replay, num_actions, device)
        clock = ", CPU time" if arguments.cpu_time else ""
        print(f"\nminibatch {batch_size}, {config.precision}, {hardware}, {torch.get_num_threads()} threads{clock}")
        print(f"{'parameterization':18} {'ms':>7} {'over standard':>14} {'middle half':>16}")
        for name, times in seconds.items():
            ratios = [mine / plain for mine, plain in zip(times, seconds["standard"], strict=True)]
            middle = statistics.median(ratios)
            low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (middle, middle, middle)
            shown = f"{low:.3f} to {high:.3f}"
            print(f"{name:18} {1e3 * statistics.median(times):7.2f} {middle:14.3f} {shown:>16}")
            figures = [f"{value:.4g}" for value in (1e3 * statistics.median(times), middle, low, high)]
            setting = (hardware, torch.get_num_threads(), config.precision, torch.__version__, batch_size)
            rows.append((*setting, name, *figures))
    if arguments.out is None:
        return 0
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if out.exists():
        with open(out, newline="", encoding="utf-8") as stream:
            kept = [tuple(row[column] for column in COLUMNS) for row in csv.DictReader(stream)]
    fresh = {tuple(map(str, row[:6])) for row in rows}
    with open(out, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([COLUMNS, *(row for row in kept if tuple(row[:6]) not in fresh), *rows])
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
