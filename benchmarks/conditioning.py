"""Does a parameterization make the optimization easier? The paper's main claim, on fixed Q-targets.

``python benchmarks/conditioning.py --checkpoint RUN`` lets a trained agent play, keeps its transitions and the targets
y = r + γ · max Q̂(s′) of its frozen network, and fits a new network of each parameterization to them with Adamax at the
paper's four learning rates. Bootstrapping, exploration and a moving target are left out, so what differs is the
optimization alone. It writes a CSV of losses and a figure; ``--plot-only`` draws the figure from the CSV.
"""

from __future__ import annotations

import csv
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agents.dqn import DQN, epsilon_greedy, huber, td_targets
from wn_rl import cli
from wn_rl.atari.env import make_atari
from wn_rl.config import load, resolve
from wn_rl.errors import UsageError, WnRlError
from wn_rl.evaluation.episodes import environment_options
from wn_rl.machine import keep_freed_memory
from wn_rl.parameterizations import names, project
from wn_rl.replay import Minibatch, Replay
from wn_rl.runs import checkpoint

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""The learning rates among which the paper searched."""
ARMS = (*names(), "standard from data")
"""Every parameterization with its own initialization, and the baseline from data, as in the authors' image code."""
COLUMNS = ("arm", "learning_rate", "seed", "updates", "loss")
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#888888")


@dataclass(frozen=True)
class Arguments:
    """Fit a network of each parameterization to fixed Q-targets, at four learning rates, and compare the losses."""

    checkpoint: str = ""
    """A run or checkpoint whose agent plays and whose network gives the targets."""
    transitions: int = 4096
    """Transitions in the fixed set."""
    updates: int = 600
    """Optimizer steps of each fit."""
    batch_size: int = 32
    """Transitions per update."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of initial weights and of the order of the minibatches."""
    arms: tuple[str, ...] = ARMS
    """What to compare."""
    point: int = 25
    """A point of the curve is the mean minibatch loss over so many updates."""
    jobs: int = 1
    """Fits at a time, each with one thread."""
    out: str = "runs/conditioning.csv"
    """The losses; those of the documentation are docs/results/benchmarks/conditioning.csv."""
    picture: str = "runs/conditioning.png"
    """The figure."""
    plot_only: bool = False
    """Draw the figure from the CSV."""


@dataclass(frozen=True)
class Data:
    """The fixed set: observations uint8 (T, 4, 84, 84), actions int64 (T,), targets y float32 (T,), of a game."""

    observations: Tensor
    actions: Tensor
    targets: Tensor
    game: str
    num_actions: int


DATA: list[Data] = []
"""Set before the workers are forked, so that they share its memory."""


def play(arguments: Arguments) -> Data:
    """Let the checkpoint's agent play with ε = 0.05 and return transitions with the targets of its frozen network."""
    saved = checkpoint.load(Path(arguments.checkpoint), with_training=False)
    network, config = saved.q_network(), saved.config
    env = make_atari(config.game, 8, num_threads=2, **environment_options(config))
    replay = Replay(4 * arguments.transitions, 8, seed=0)
    generator = torch.Generator().manual_seed(0)
    observations, _ = env.reset(seed=np.arange(8, dtype=np.int32))
    replay.start(observations[:, -1])
    with torch.no_grad():
        for _ in range(arguments.transitions // 2):
            q_values = network(torch.from_numpy(observations))
            actions = epsilon_greedy(q_values, torch.full((8,), 0.05), generator).numpy()
            observations, rewards, terminated, _, info = env.step(actions)
            ends = terminated | info["life_loss"] if config.life_loss_terminal else terminated
            replay.add(actions, rewards, ends, observations[:, -1], info["is_reset"])
        env.close()
        batch: Minibatch = replay.sample(arguments.transitions, generator)
        next_q_values = torch.cat([network(part) for part in batch.next_observations.split(256)])
    clip = config.reward_clip or float("inf")
    targets = td_targets(batch.rewards.clamp(-clip, clip), batch.terminals, next_q_values, config.gamma)
    return Data(batch.observations.clone(), batch.actions, targets, config.game, network.spec.num_actions)


def fit(arm: str, rate: float, seed: int, arguments: Arguments) -> list[tuple[str, float, int, int, float]]:
    """Fit one network; return the points of its curve. It ends at a loss that is not finite."""
    torch.set_num_threads(1)
    keep_freed_memory()
    (data,) = DATA
    config = replace(load("paper"), game=data.game, param=arm.split()[0], seed=seed, learning_rate=rate, device="cpu")
    if arm.endswith("from data"):
        config = replace(config, data_dependent_init=True)
    agent = DQN(resolve(replace(config, precision="float32")), data.num_actions, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    agent.initialize(data.observations[torch.randperm(len(data.targets), generator=generator)[:512]])
    network, optimizer = agent.q_network.train(), agent.optimizer
    rows, total = [], torch.zeros(())
    for update in range(1, arguments.updates + 1):
        chosen = torch.randint(len(data.targets), (arguments.batch_size,), generator=generator)
        q_values = network(data.observations[chosen]).gather(1, data.actions[chosen, None]).squeeze(1)
        losses = huber(data.targets[chosen] - q_values)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        if agent.parameterization.projects:
            project(network)
        total = total + losses.detach().mean()
        if update % arguments.point == 0:
            rows.append((arm, rate, seed, update, float(total) / arguments.point))
            total = torch.zeros(())
            if not np.isfinite(rows[-1][-1]):
                break
    return rows


def _fit(task: tuple[str, float, int, Arguments]) -> list[tuple[str, float, int, int, float]]:
    return fit(*task)


def read(path: Path) -> dict[tuple[str, float], dict[int, list[tuple[int, float]]]]:
    """Return the curves by arm and learning rate, then seed."""
    curves: dict[tuple[str, float], dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            point = (int(row["updates"]), float(row["loss"]))
            curves[row["arm"], float(row["learning_rate"])][int(row["seed"])].append(point)
    return curves


def final(seeds: dict[int, list[tuple[int, float]]], points: int = 4) -> list[float]:
    """Return each seed's mean loss over its last points; infinite if it is not finite."""
    means = [float(np.mean([loss for _, loss in curve[-points:]])) for curve in seeds.values()]
    return [mean if np.isfinite(mean) else np.inf for mean in means]


def draw(source: Path, picture: Path) -> None:
    """Draw the loss against updates at each arm's best rate, and the final loss against the rate; print the table."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = read(source)
    arms = list(dict.fromkeys(arm for arm, _ in curves))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    print(
        f"{'arm':20} {'best rate':>9} {'final loss':>11} {'of the seeds':>19}   by rate: " + " ".join(map(str, RATES))
    )
    for arm, colour in zip(arms, COLOURS, strict=False):
        rates = sorted(rate for name, rate in curves if name == arm)
        finals = {rate: final(curves[arm, rate]) for rate in rates}
        best = min(rates, key=lambda rate: float(np.mean(finals[rate])))
        shortest = min(len(curve) for curve in curves[arm, best].values())  # one that diverged ended early
        losses = np.array([[loss for _, loss in curve[:shortest]] for curve in curves[arm, best].values()])
        updates = [update for update, _ in next(iter(curves[arm, best].values()))[:shortest]]
        style = "--" if arm.endswith("from data") else "-"
        left.plot(updates, losses.mean(0), style, color=colour, label=f"{arm} ({best:g})")
        left.fill_between(updates, losses.min(0), losses.max(0), color=colour, alpha=0.15, lw=0)
        right.plot(rates, [np.mean(finals[rate]) for rate in rates], style, marker="o", color=colour, label=arm)
        by_rate = " ".join(f"{np.mean(finals[rate]):.4g}" for rate in rates)
        spread = f"{min(finals[best]):.4g} to {max(finals[best]):.4g}"
        print(f"{arm:20} {best:9g} {np.mean(finals[best]):11.4g} {spread:>19}   {by_rate}")
    left.set(yscale="log", xlabel="updates", ylabel="mean Huber loss of the minibatches")
    left.legend(title="parameterization (best rate)", fontsize=7, title_fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="learning rate of Adamax", ylabel="loss of the last 100 updates")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    print(f"written to {picture}")


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    arguments = cli.parse(Arguments, words)
    out = Path(arguments.out)
    if not arguments.plot_only:
        if not arguments.checkpoint:
            raise UsageError("--checkpoint RUN names the agent that plays and whose network gives the targets")
        if not 1 <= arguments.point <= arguments.updates:
            raise UsageError("--point must be from 1 to the number of --updates")
        if unknown := set(arguments.arms) - set(ARMS):
            raise UsageError(f"no arm '{unknown.pop()}'; there are: {', '.join(ARMS)}")
        started = time.perf_counter()
        DATA.append(play(arguments))
        spread = float(DATA[0].targets.std())
        print(f"{len(DATA[0].targets):,} transitions, targets {float(DATA[0].targets.mean()):.3f} ± {spread:.3f}")
        tasks = [(arm, rate, seed, arguments) for arm in arguments.arms for rate in RATES for seed in arguments.seeds]
        rows: list[tuple[str, float, int, int, float]] = []
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("fork")) as pool:
            for done, found in enumerate(pool.map(_fit, tasks), 1):
                rows += found
                if done % 12 == 0:
                    print(f"{done} of {len(tasks)} fits, {time.perf_counter() - started:.0f} s", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows((arm, rate, seed, update, f"{loss:.5g}") for arm, rate, seed, update, loss in rows)
    elif not out.exists():
        raise WnRlError(f"{out} is not there: leave --plot-only out")
    draw(out, Path(arguments.picture))
    return 0


if __name__ == "__main__":
    cli.run(main)
