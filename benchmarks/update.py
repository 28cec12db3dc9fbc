"""What each technique brings to an update on a CPU: each switched off alone, in turns, in one process.

``python benchmarks/update.py`` prints milliseconds per update, sampling included, and where the time of the first goes.
Run it on a machine that does nothing else: threads wait for each other many times an update. On a busy one, CPU time
at ``--num-threads 1`` still tells something. ``WN_RL_KERNELS=avx2`` in the environment times the kernels that a
processor without vectors of 512 bits would run.

``--choices`` compares what ``auto`` takes with every backend and precision, each taken by hand.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agents.backends import BACKENDS, make_backend, why_not
from agents.backends.choice import LOWERED_FOR, Choice, choose
from agents.backends.cpu_kernels import layouts, loader
from agents.backends.cpu_kernels.backend import CpuKernels
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.packed_network import PackedNetwork
from agents.backends.eager import Eager
from agents.backends.interface import Backend
from agents.dqn import DQN
from wn_rl import cli
from wn_rl.atari.env import make_atari
from wn_rl.config import Count, TrainConfig, load, resolve
from wn_rl.errors import UsageError
from wn_rl.evaluation.episodes import environment_options
from wn_rl.machine import Precision, keep_freed_memory, precisions, processor, resolve_device
from wn_rl.networks import FirstConvolution
from wn_rl.replay import Replay
from wn_rl.training import TrainingLoop

STORED = 20_000
"""Agent steps in the replay; 141 MB, more than any cache."""
TOGETHER = 4
"""Updates that a vector step of 16 emulators owes, and that are asked for at a time."""


@dataclass(frozen=True)
class Arguments:
    """Time an update with each technique switched off alone."""

    game: str = "Breakout"
    """The game whose frames are seen."""
    param: str = "wn"
    """Parameterization."""
    batch_size: Count = 32
    """Transitions per update."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the hidden layers; float32 is timed too. auto: as a run chooses."""
    optimizer: Literal["adamax", "adam", "rmsprop_mnih"] = "adamax"
    """Of the updates."""
    num_threads: Count = 0
    """Of torch; 0: one per core."""
    rounds: Count = 10
    """Turns of each variant."""
    updates: Count = 25
    """Updates of a turn."""
    choices: bool = False
    """Compare what auto takes with all that can be taken by hand."""


def filled_replay(config: TrainConfig) -> tuple[Replay, int]:
    """Return a replay of random play, whose frames are as black as the game's, and the number of actions."""
    played = replace(config, num_envs=16, replay_capacity=STORED, learning_starts=2 * STORED)
    env = make_atari(config.game, played.num_envs, **environment_options(played))
    replay = Replay(STORED, played.num_envs)
    agent = DQN(played, env.num_actions, torch.device("cpu"))
    loop = TrainingLoop(played, env, Eager(agent, replay), replay)
    loop.start()
    while loop.agent_steps < STORED:
        loop.vector_step()
    return replay, env.num_actions


def black_share(replay: Replay) -> float:
    """Return the share of an observation's blocks of 4 × 4 pixels that are black in all its frames."""
    observations = replay.sample(512).observations
    batch, stack, height, width = observations.shape
    blocks = observations.view(batch, stack, height // 4, 4, width // 4, 4).amax((1, 3, 5))
    return float((blocks == 0).float().mean())


def torchs_packing(fused: PackedNetwork, observations: Tensor) -> Tensor:
    """Return what ``pack_observations`` does, in torch's own operations."""
    first = fused.network.convolutions[0]
    assert isinstance(first, FirstConvolution)
    return first.packed(observations).to(fused.precision)


class Variant:
    """An agent of its own that is built and updated with something switched off."""

    def __init__(
        self, config: TrainConfig, replay: Replay, num_actions: int, patches: Sequence[Any], together: int
    ) -> None:
        """Build the agent under ``patches``; so many updates are asked for at a time."""
        self.together = together
        self.patches = patches
        with ExitStack() as switched_off:
            for patch in patches:
                switched_off.enter_context(patch)
            agent = DQN(config, num_actions, torch.device("cpu"))
            agent.initialize(replay.sample(512).observations)
            self.backend = make_backend(agent, replay)

    def __call__(self, count: int) -> None:
        """Make so many updates."""
        with ExitStack() as switched_off:
            for patch in self.patches:
                switched_off.enter_context(patch)
            for made in range(0, count, self.together):
                self.backend.update(min(self.together, count - made))


def variants(config: TrainConfig, replay: Replay, num_actions: int) -> dict[str, Variant]:
    """Return by name what makes updates; each has an agent of its own."""

    def made(changed: TrainConfig, *patches: Any, together: int = TOGETHER) -> Variant:  # noqa: ANN401
        return Variant(changed, replay, num_actions, patches, together)

    operations = mock.patch.object(layouts, "unsupported", return_value="switched off")
    autograd = mock.patch.object(CpuKernels, "unsupported", return_value="switched off")
    pixels = mock.patch.object(FirstConvolution, "packs", return_value=False)
    found = {"everything on": made(config)}
    if config.compile == "on":
        packing = mock.patch.object(PackedNetwork, "pack_observations", torchs_packing)
        visiting = mock.patch.object(
            loader,
            "load",
            return_value=loader.load("VISIT_ZERO_BLOCKS"),
        )
        found["a call for each update"] = made(config, together=1)
        found["blocks of zeros computed too"] = made(config, visiting)
        if config.precision == "bfloat16" and found["everything on"].backend.detail.endswith("tile unit"):
            without = mock.patch.object(loader, "load", return_value=loader.load(vectors="no_tiles"))
            found["without the tile unit"] = made(config, without)
        found["passes by torch's operations"] = made(config, operations)
        found["the same, frames packed by torch"] = made(config, operations, packing)
        found["autograd, Adamax through torch.compile"] = made(config, autograd)
        found["the same, and pixels instead of blocks"] = made(config, autograd, pixels)
        found["autograd, torch's Adamax"] = made(replace(config, compile="off"))
    if config.precision == "bfloat16":
        found["float32"] = made(replace(config, precision="float32"))
        found["float32, passes by torch's operations"] = made(replace(config, precision="float32"), operations)
        found["float32, autograd, torch's Adamax, pixels"] = made(
            replace(config, precision="float32", compile="off"), pixels
        )
    return found


def compare_choices(
    arguments: Arguments, config: TrainConfig, possible: Sequence[Precision], replay: Replay, num_actions: int
) -> None:
    """Print what a run takes, and what each backend and precision takes an update, with its share of acting."""
    choose(config, DQN, precisions=possible, updates=10**9, cached=False)  # compiles
    choice = choose(config, DQN, precisions=possible, updates=10**9, cached=False)
    print(f"auto takes {choice.backend} {choice.precision}: {choice.reason or 'there is nothing to choose from'}")
    made: dict[str, Backend] = {}
    for precision in possible:
        for kind in BACKENDS:
            named = replace(config, precision=precision, backend=kind.name)
            agent = DQN(named, num_actions, torch.device(config.device))
            agent.initialize(replay.sample(512).observations)
            if not why_not(kind, agent, replay):
                made[f"{kind.name} {precision}"] = make_backend(agent, replay)
    epsilon = np.full(config.num_envs, 0.1, np.float32)
    owed = max(config.num_envs // config.update_period, 1)
    took: dict[str, list[float]] = defaultdict(list)
    for turn in range(arguments.rounds + 1):
        for name, backend in made.items():
            started = time.perf_counter()
            for _ in range(max(arguments.updates // owed, 1)):
                backend.act(epsilon)
                backend.update(owed)
            if turn:  # the first round compiles
                took[name].append((time.perf_counter() - started) / (max(arguments.updates // owed, 1) * owed) * 1e3)
    medians = {name: statistics.median(times) for name, times in took.items()}
    for name, median in sorted(medians.items(), key=lambda entry: entry[1]):
        print(f"{name:52} {median:6.2f} ms, at best {min(took[name]):6.2f} ms")
    taken = medians[_name_of(choice, made)]
    print(
        f"auto is {min(medians.values()) / taken:.2f} of the best by hand; of those as exact, "
        f"{min(value for name, value in medians.items() if name.endswith(choice.precision)) / taken:.2f} (a less exact "
        f"precision has to be {LOWERED_FOR:.2f} times as fast)"
    )


def _name_of(choice: Choice, made: Mapping[str, Backend]) -> str:
    """Return the name under which what was chosen is timed by hand; ``auto``: the first in the order of preference."""
    name = f"{choice.backend} {choice.precision}"
    return name if name in made else next(name for name in made if name.endswith(choice.precision))


def profile(updates: Callable[[int], None], count: int) -> dict[str, float]:
    """Return the milliseconds per update of torch's operations and of ours, by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    with watched(activities=[ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        updates(count)
        took = time.perf_counter() - started
    spent = {event.key: event.self_cpu_time_total / count / 1e3 for event in seen.key_averages()}
    largest = dict(sorted(spent.items(), key=lambda entry: -entry[1])[:10])
    return largest | {"everything else, the compiled pass included": took / count * 1e3 - sum(largest.values())}


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    arguments = cli.parse(Arguments, words)
    if min(arguments.rounds, arguments.updates, arguments.batch_size) < 1:
        raise UsageError("--rounds, --updates and --batch-size must be at least 1")
    keep_freed_memory()
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    config = replace(
        load("paper"),
        game=arguments.game,
        param=arguments.param,
        batch_size=arguments.batch_size,
        precision=arguments.precision,
        optimizer=arguments.optimizer,
        device="cpu",
    )
    possible = precisions(config, "cpu")
    config = resolve_device(resolve(config))
    replay, num_actions = filled_replay(config)
    print(f"{processor(torch.device('cpu'))}, {torch.get_num_threads()} threads, {config.param}, {config.optimizer}")
    if arguments.choices:
        compare_choices(arguments, config, possible, replay, num_actions)
        return 0
    choice = choose(config, DQN, precisions=possible, updates=10**9)
    config = replace(config, precision=choice.precision)  # whatever the backend, since each is switched off in turn
    made = variants(config, replay, num_actions)
    for updates in made.values():
        updates(10)  # compiles
    took: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name, updates in made.items():
            started, busy = time.perf_counter(), time.process_time()
            updates(arguments.updates)
            took[name].append((time.perf_counter() - started) / arguments.updates * 1e3)
            spent[name].append((time.process_time() - busy) / arguments.updates * 1e3)
    print(f"minibatch {config.batch_size}, {config.param}, {config.precision}, {torch.get_num_threads()} threads")
    print(f"{black_share(replay):.0%} of the blocks that the first layer sees are black in {config.game}")
    for name, times in took.items():
        cpu = statistics.median(spent[name])
        print(f"{name:52} {statistics.median(times):6.2f} ms, at best {min(times):6.2f} ms, {cpu:6.2f} ms of CPU time")
    print("\nwhere the time of everything on goes, ms:")
    first, count = made["everything on"], 4 * arguments.updates
    fused = first.backend.network if isinstance(first.backend, CpuKernels) else None
    if isinstance(fused, KernelNetwork):  # one call, which torch's profiler cannot look into
        before, started = fused.stage_seconds.clone(), time.perf_counter()
        first(count)
        whole = (time.perf_counter() - started) / count * 1e3
        parts = ((fused.stage_seconds - before) / count * 1e3).tolist()
        names = ("gathering transitions", "forward pass and loss", "backward pass and step")
        went = dict(zip(names, parts, strict=True)) | {"drawing and everything else": whole - sum(parts)}
    else:
        went = profile(first, count)
    for name, milliseconds in went.items():
        print(f"{name:52} {milliseconds:6.2f}")
    return 0


if __name__ == "__main__":
    cli.run(main)
