"""How fast the training loop is, beside Stable-Baselines3's DQN in the same run, and how far from what bounds it.

``python benchmarks/throughput.py`` alternates segments of ours and of SB3 (at its best over torch threads and numbers
of environments), then times the emulators alone, the learner alone and the parts of a vector step. Both sides train the
network of Mnih et al. on the same game with one update per four agent steps, the same minibatch and replay size; the
warm-up is left out. Prints a table; ``--out`` writes JSON.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agents.backends import make_backend
from agents.backends.choice import choose
from agents.backends.cpu_kernels.backend import CpuKernels
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cuda_graphs import CudaGraphs
from agents.backends.interface import Backend
from agents.dqn import DQN
from wn_rl import cli
from wn_rl.atari.env import FRAME_SKIP, AtariVector, make_atari
from wn_rl.config import Count, EnvCount, TrainConfig, load, resolve
from wn_rl.errors import UsageError, WnRlError
from wn_rl.evaluation.episodes import environment_options
from wn_rl.machine import cores, device_name, keep_freed_memory, precisions, resolve_device, set_float32_precision
from wn_rl.replay import Replay
from wn_rl.runs.directory import versions
from wn_rl.training import TrainingLoop

WARM_UP = 2_000
"""Agent steps of random play before either side learns."""


@dataclass(frozen=True)
class Arguments:
    """Time the training loop beside Stable-Baselines3's DQN, and its parts alone."""

    game: str = "Breakout"
    """The game."""
    param: str = "wn"
    """Parameterization of ours; SB3 trains a plain network."""
    batch_size: Count = 32
    """Transitions per update, on both sides."""
    num_envs: EnvCount = 16
    """Emulators of ours; auto: what train.py takes."""
    replay_capacity: Count = 100_000
    """Agent steps in the replay, on both sides."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Of ours."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Of ours."""
    num_threads: Count = 0
    """Threads of our arithmetic; 0: what train.py takes."""
    emulator_threads: Count = 0
    """Threads of our emulators; 0: what train.py takes."""
    segments: Count = 3
    """Segments of each side."""
    seconds: float = 60.0
    """Length of a segment."""
    learners: bool = False
    """Time the learner alone at minibatches of 32 and of 64 as well."""
    peer: bool = True
    """Measure Stable-Baselines3 too."""
    out: str | None = None
    """Append the measurements to the list in this file; default: they are printed and kept nowhere.
    docs/results/benchmarks/throughput.json is that of the documentation."""


def configure(arguments: Arguments) -> TrainConfig:
    """Return the configuration of our side: the paper's schedule with a short warm-up."""
    config = replace(
        load("paper"),
        game=arguments.game,
        param=arguments.param,
        batch_size=arguments.batch_size,
        num_envs=arguments.num_envs,
        replay_capacity=arguments.replay_capacity,
        learning_starts=WARM_UP,
        device=arguments.device,
        precision=arguments.precision,
        compile=arguments.compile,
        num_threads=arguments.num_threads,
        emulator_threads=arguments.emulator_threads,
    )
    return resolve_device(resolve(config))


class Ours:
    """Our loop, in steady state after the constructor."""

    def __init__(self, config: TrainConfig) -> None:
        """Build it, play the warm-up and make the first updates, which compile."""
        self.config = config
        self.device = torch.device(config.device)
        self.env: AtariVector = make_atari(
            config.game, config.num_envs, num_threads=config.emulator_threads, **environment_options(config)
        )
        self.agent = DQN(config, self.env.num_actions, self.device)
        replay = Replay(config.replay_capacity, config.num_envs, device=self.device, seed=config.seed)
        self.backend = make_backend(self.agent, replay)
        self.loop = TrainingLoop(config, self.env, self.backend, replay)
        self.loop.start()
        started = time.perf_counter()
        while self.agent.updates < 50:
            self.loop.vector_step()
        self.first_updates_seconds = time.perf_counter() - started

    def run(self, seconds: float) -> dict[str, Any]:
        """Train for so long; return agent steps and updates per second."""
        steps, updates = self.loop.agent_steps, self.agent.updates
        self.agent.read_statistics()
        watched = GpuWatch(self.device)
        started, busy = time.perf_counter(), time.process_time()
        while time.perf_counter() - started < seconds:
            self.loop.vector_step()
            watched.look()
        wait(self.device)
        took = time.perf_counter() - started
        busy = time.process_time() - busy
        found = self.agent.read_statistics()
        if found.updates == 0 or not np.isfinite(found.loss) or found.loss == 0.0:
            raise WnRlError(f"our loss is {found.loss} after {found.updates} updates: it did not train")
        return {
            "agent_steps_per_second": (self.loop.agent_steps - steps) / took,
            "updates_per_second": (self.agent.updates - updates) / took,
            "loss": found.loss,
            "cpu_utilisation": busy / took / cores(),
            "gpu_utilisation": watched.mean(),
        }

    def split(self, seconds: float) -> dict[str, float]:
        """Return the share of wall time of each part of the loop; waits for the device around each."""
        spent: dict[str, float] = defaultdict(float)
        undo = []

        def watch(owner: Any, name: str, part: str, inner: Sequence[str] = ()) -> None:  # noqa: ANN401
            original = getattr(owner, name)

            def timed(*positional: Any, **named: Any) -> Any:  # noqa: ANN401
                wait(self.device)
                before = sum(spent[other] for other in inner)
                started = time.perf_counter()
                result = original(*positional, **named)
                wait(self.device)
                spent[part] += time.perf_counter() - started - (sum(spent[other] for other in inner) - before)
                return result

            setattr(owner, name, timed)
            undo.append((owner, name))

        backend = self.backend
        graphs = isinstance(backend, CudaGraphs)
        watch(backend, "act", "act")
        watch(self.env, "send", "emulators: send")
        watch(self.env, "recv", "emulators: wait")
        watch(self.loop.replay, "add", "store")
        if graphs:  # one graph holds all of it
            watch(backend, "update", "update, sampling included")
        else:
            watch(self.loop.replay, "sample_indices", "sampling")
            kernels = isinstance(backend, CpuKernels)
            apart = () if kernels and isinstance(backend.network, KernelNetwork) else ("optimizer",)
            if apart:
                watch(self.agent.optimizer, "step", "optimizer")
            watch(backend if kernels else self.agent, "update_on" if kernels else "update", "update", apart)
        watch(self.agent, "copy_target", "target copy")
        fused = backend.network if isinstance(backend, CpuKernels) else None
        inside = fused.stage_seconds.clone() if isinstance(fused, KernelNetwork) else None
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            self.loop.vector_step()
        took = time.perf_counter() - started
        if isinstance(fused, KernelNetwork) and inside is not None:  # one call, which tells where its time went
            parts = (fused.stage_seconds - inside).tolist()
            spent["update"] -= sum(parts)
            spent["gather"], spent["forward"], spent["backward and optimizer"] = parts
        for owner, name in undo:
            delattr(owner, name)
        shares = {part: duration / took for part, duration in spent.items()}
        return shares | {"everything else": 1.0 - sum(shares.values())}

    def learner_alone(self, seconds: float) -> float:
        """Return updates per second without emulators, sampling included."""
        return updates_per_second(self.backend, seconds)

    def learner_with(self, batch_size: int, seconds: float) -> float:
        """Return updates per second of a new agent with another minibatch, on the same replay, without emulators."""
        agent = DQN(replace(self.config, batch_size=batch_size), self.env.num_actions, self.device)
        agent.initialize(self.loop.replay.sample(self.config.init_samples).observations)
        backend = make_backend(agent, self.loop.replay)
        updates_per_second(backend, 0.0)  # compiles, or records
        return updates_per_second(backend, seconds)


class GpuWatch:
    """The GPU's utilisation as its driver tells it, about once a second."""

    def __init__(self, device: torch.device) -> None:
        """Start; nothing is measured on a CPU, or without the package that asks the driver (nvidia-ml-py)."""
        self._device = device
        self._seen: list[int] = []
        self._next = 0.0
        self._possible = device.type == "cuda"

    def look(self) -> None:
        """Ask the driver, if a second has passed."""
        if not self._possible or time.perf_counter() < self._next:
            return
        self._next = time.perf_counter() + 1.0
        try:
            self._seen.append(torch.cuda.utilization(self._device))
        except (ImportError, RuntimeError):
            self._possible = False

    def mean(self) -> float | None:
        """Return the share of time in which the GPU had work, from 0 to 1; None: not measured."""
        return statistics.mean(self._seen) / 100 if self._seen else None


def updates_per_second(backend: Backend, seconds: float) -> float:
    """Return updates per second without emulators, sampling included, as many at a time as a vector step owes."""
    agent = backend.agent
    together = max(agent.config.num_envs // agent.config.update_period, 1)
    wait(agent.device)
    updates, started = agent.updates, time.perf_counter()
    while agent.updates == updates or time.perf_counter() - started < seconds:
        for _ in range(max(10 // together, 1)):
            backend.update(together)
        wait(agent.device)
    return (agent.updates - updates) / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def emulators_alone(config: TrainConfig, seconds: float, turns: int = 5) -> tuple[float, float]:
    """Return agent steps per second of our emulators under random actions, and of ale-py's own loop beside it.

    The two alternate, on the same games with the same actions; steps that only start an episode are counted on both
    sides for the comparison and on neither for the rate.
    """
    ours = make_atari(config.game, config.num_envs, num_threads=config.emulator_threads, **environment_options(config))
    bare = make_atari(config.game, config.num_envs, num_threads=config.emulator_threads, **environment_options(config))
    seeds = np.arange(config.num_envs, dtype=np.int32)
    ours.reset(seed=seeds)
    bare.reset(seed=seeds)
    generator = np.random.default_rng(0)
    actions = itertools.cycle(generator.integers(ours.num_actions, size=(64, config.num_envs)))
    played, spent, calls = 0, {"ours": 0.0, "bare": 0.0}, {"ours": 0, "bare": 0}
    for _ in range(turns):
        for name, step in (("ours", ours.step), ("bare", bare._emulators.step)):
            started = time.perf_counter()
            while time.perf_counter() - started < seconds / turns / 2:
                info = step(next(actions))[4]
                calls[name] += 1
                if name == "ours":
                    played += int((~info["is_reset"]).sum())
            spent[name] += time.perf_counter() - started
    ours.close()
    bare.close()
    rate = played / spent["ours"]
    return rate, rate * (calls["bare"] / spent["bare"]) / (calls["ours"] / spent["ours"])


class Peer:
    """Stable-Baselines3's DQN with the same network, minibatch, replay size and replay ratio."""

    def __init__(self, arguments: Arguments, device: str, num_envs: int) -> None:
        """Build it and play its warm-up."""
        import stable_baselines3
        from stable_baselines3.common.env_util import make_atari_env
        from stable_baselines3.common.vec_env import VecFrameStack

        env = VecFrameStack(make_atari_env(f"{arguments.game}NoFrameskip-v4", n_envs=num_envs, seed=1), 4)
        self.model = stable_baselines3.DQN(
            "CnnPolicy",
            env,
            batch_size=arguments.batch_size,
            buffer_size=arguments.replay_capacity,
            learning_starts=WARM_UP,
            # One update per four agent steps: SB3 counts steps of the whole vector.
            train_freq=max(1, 4 // num_envs),
            gradient_steps=max(1, num_envs // 4),
            target_update_interval=10_000,
            exploration_fraction=1.0,
            optimize_memory_usage=False,
            device=device,
        )
        self.run(0.0, at_least=WARM_UP + 200)

    def run(self, seconds: float, *, at_least: int = 0) -> dict[str, float]:
        """Train for so long; return agent steps and updates per second."""
        from stable_baselines3.common.callbacks import BaseCallback

        model = self.model
        first, updates, started = model.num_timesteps, model._n_updates, time.perf_counter()

        class Stop(BaseCallback):
            def _on_step(self) -> bool:
                enough = model.num_timesteps - first >= at_least
                return not (enough and time.perf_counter() - started >= seconds)

        model.learn(10**9, callback=Stop(), reset_num_timesteps=False, log_interval=10**9)
        took = time.perf_counter() - started
        made = model._n_updates - updates
        if seconds > 0 and made == 0:
            raise WnRlError("SB3 made no update: the training diverged or did not start")
        return {
            "agent_steps_per_second": (model.num_timesteps - first) / took,
            "updates_per_second": made / took,
        }


def best_peer(arguments: Arguments, device: str) -> tuple[Peer, int, int, dict[str, float]]:
    """Return SB3 at its best over {1, 2} threads and {1, 8} environments: (peer, threads, environments, all tried)."""
    tried: dict[str, float] = {}
    found: dict[str, tuple[Peer, int, int]] = {}
    for num_envs in (1, 8):
        peer = Peer(arguments, device, num_envs)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            key = f"{num_envs} environments, {threads} threads"
            tried[key] = peer.run(arguments.seconds / 4)["agent_steps_per_second"]
            found[key] = (peer, threads, num_envs)
            print(f"SB3, {key}: {tried[key]:.0f} agent steps/s", flush=True)
    best = max(tried, key=lambda key: tried[key])
    return (*found[best], tried)


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    arguments = cli.parse(Arguments, words)
    if arguments.segments < 1 or not arguments.seconds > 0:
        raise UsageError("--segments must be at least 1 and --seconds more than 0")
    keep_freed_memory()
    config = configure(arguments)
    ours_threads = config.num_threads or torch.get_num_threads()
    torch.set_num_threads(ours_threads)
    choice = choose(
        config, DQN, precisions=precisions(replace(config, precision=arguments.precision), config.device), updates=10**6
    )
    config = choice.applied(config)
    set_float32_precision(config.precision)
    print(f"ours: {config.backend} in {config.precision}: {choice.reason or 'as asked for'}", flush=True)
    ours = Ours(config)
    print(
        f"ours: the first 50 updates took {ours.first_updates_seconds:.1f} s with warm-up and compilation", flush=True
    )
    peer = best_peer(arguments, config.device) if arguments.peer else None
    segments: dict[str, list[dict[str, Any]]] = {"ours": [], "sb3": []}
    for turn in range(arguments.segments):
        sides: list[tuple[str, int, Callable[[float], dict[str, Any]]]] = [("ours", ours_threads, ours.run)]
        if peer is not None:
            sides.append(("sb3", peer[1], peer[0].run))
        for name, threads, run in sides if turn % 2 == 0 else reversed(sides):
            torch.set_num_threads(threads)
            segments[name].append(run(arguments.seconds))
            steps, updates = (segments[name][-1][f"{key}_per_second"] for key in ("agent_steps", "updates"))
            print(f"{name:5} {steps:8.0f} agent steps/s {updates:7.1f} updates/s", flush=True)
    torch.set_num_threads(ours_threads)
    part = arguments.seconds / 3
    split = ours.split(part)
    learner = ours.learner_alone(part)
    peak = torch.cuda.max_memory_allocated() if config.device == "cuda" else None
    learners = {size: ours.learner_with(size, part) for size in (32, 64)} if arguments.learners else {}
    emulators, bare = emulators_alone(config, part)
    speed = statistics.median(segment["agent_steps_per_second"] for segment in segments["ours"])
    learner_steps = learner * config.update_period
    # On a CPU emulators and learner share the cores, so their times add; with a GPU the slower of the two bounds.
    bound = 1 / (1 / emulators + 1 / learner_steps) if config.device == "cpu" else min(emulators, learner_steps)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "hardware": device_name(torch.device(config.device)),
        "versions": versions(),
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "precision": config.precision,
        "compile": config.compile,
        "threads": ours_threads,
        "first_updates_seconds": ours.first_updates_seconds,
        "segments": segments,
        "ours_agent_steps_per_second": speed,
        "ours_frames_per_second": speed * FRAME_SKIP,
        "emulators_alone_agent_steps_per_second": emulators,
        "bare_ale_loop_agent_steps_per_second": bare,
        "learner_alone_updates_per_second": learner,
        "learner_alone_by_minibatch": learners,
        "bound_agent_steps_per_second": bound,
        "of_the_bound": speed / bound,
        "time_split": split,
        "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_memory_bytes": peak,
    }
    print(f"\nours {speed:.0f} agent steps/s = {speed * FRAME_SKIP:.0f} frames/s")
    print(f"that is {100 * speed / bound:.0f}% of the bound from its parts, {bound:.0f} agent steps/s")
    print(f"emulators alone {emulators:.0f} agent steps/s ({100 * emulators / bare:.0f}% of ale-py's bare loop)")
    print(f"learner alone {learner:.1f} updates/s")
    for size, made in learners.items():
        print(f"learner alone with a minibatch of {size}: {made:.1f} updates/s")
    if peak is not None:
        used = [segment["gpu_utilisation"] for segment in segments["ours"] if segment["gpu_utilisation"] is not None]
        told = f"{100 * statistics.mean(used):.0f}%" if used else "not measured (nvidia-ml-py is missing)"
        print(f"GPU utilisation {told}; peak memory on the device {peak / 1e9:.2f} GB")
    print(
        "time: " + ", ".join(f"{name} {100 * share:.0f}%" for name, share in sorted(split.items(), key=lambda e: -e[1]))
    )
    if peer is not None:
        theirs = statistics.median(segment["agent_steps_per_second"] for segment in segments["sb3"])
        ratios = [
            a["agent_steps_per_second"] / b["agent_steps_per_second"]
            for a, b in zip(segments["ours"], segments["sb3"], strict=True)
        ]
        result |= {
            "sb3_agent_steps_per_second": theirs,
            "sb3_tried": peer[3],
            "sb3_best": {"threads": peer[1], "environments": peer[2]},
            "ours_over_sb3": statistics.median(ratios),
            "ours_over_sb3_by_segment": ratios,
        }
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"SB3 {theirs:.0f} agent steps/s; ours is {middle:.2f} times as fast ({low:.2f} to {high:.2f})")
    if arguments.out is None:
        return 0
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    out.write_text(json.dumps([*earlier, result], indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
