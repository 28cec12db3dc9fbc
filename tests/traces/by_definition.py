"""The trace of a run worked out from the definitions in a few plain loops, without loop, schedule, replay and log.

It shares with the run the emulators, the script of the actions, the derivation of emulator seeds, and torch's
generator. Everything is kept in lists; an observation is the one that the emulator gave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tests.traces.recording import Trace, rounded, scripted_action, sha
from wn_rl.atari.env import emulator_seeds, make_atari
from wn_rl.config import TrainConfig
from wn_rl.evaluation.episodes import environment_options


class Transition(NamedTuple):
    """What an emulator went through in one agent step."""

    observation: NDArray[np.uint8]
    action: int
    reward: float
    next_observation: NDArray[np.uint8]
    terminal: bool


def derive(config: TrainConfig, scores: Sequence[float]) -> Trace:
    """Return what must happen in a run of ``config``, given the mean returns of its evaluations, in order.

    How the evaluations went, and frames' checksums, are not worked out.
    """
    n, clock = config.num_envs, 0
    env = make_atari(config.game, n, num_threads=1, **environment_options(config))
    observations, info = env.reset(seed=emulator_seeds(config.seed, n, 0, 0))
    observations, lives = observations.copy(), info["lives"].copy()
    playing, seed_labels = [True] * n, [0] * n
    returns, lengths = [0.0] * n, [0] * n
    generator = torch.Generator().manual_seed(config.seed)
    rows: list[list[Transition]] = []
    stored = 0
    updates = copied_at = 0
    epsilon: dict[int, float] = {}
    logged_at = saved_at = evaluated_at = 0
    since_log: list[Transition] = []
    updates_since_log = 0
    ended_since_log: list[tuple[float, int]] = []
    best, remaining = -math.inf, list(scores)
    events: list[str] = []
    trace: Trace = {"events": events, "epsilon": epsilon, "action log": [], "minibatches": [], "episodes.csv": []}
    frames: dict[str, Any] = {"acted on": [], "initialized from": [], "learned from": []}
    scalars: dict[str, dict[int, float]] = {}

    def note(event: str) -> None:
        events.append(f"{event} at agent step {clock:,}")

    def held() -> list[Transition]:
        return [transition for row in rows[-(config.replay_capacity // n) :] for transition in row]

    def draw(count: int) -> tuple[list[int], list[Transition]]:
        there = held()
        uniform = torch.rand(count, dtype=torch.float64, generator=generator)
        chosen = [int(u * len(there)) for u in uniform.tolist()]
        return [stored - len(there) + i for i in chosen], [there[i] for i in chosen]

    def epsilon_of(step: int) -> float:
        share = (step - config.learning_starts) / config.epsilon_decay_steps
        start, end = config.epsilon_start, config.epsilon_end
        return rounded(start + (end - start) * min(max(share, 0.0), 1.0))

    def log() -> None:
        nonlocal logged_at, updates_since_log
        note("log")
        values = {"epsilon": epsilon_of(clock + 1), "replay_size": len(held()), "learning_rate": config.learning_rate}
        if ended_since_log:
            values["episode_return"], values["episode_length"] = np.mean(ended_since_log, axis=0)
        if updates_since_log:
            values["loss"] = np.mean([transition.reward for transition in since_log])
            values["td_error"] = np.mean([transition.terminal for transition in since_log])
            values["q_value"] = np.mean([transition.action for transition in since_log])
        if updates:
            values["max_q_held_out"] = 1 + updates
            values["gradient_norm"] = updates - copied_at
        for name, value in values.items():
            scalars.setdefault(f"train/{name}", {})[4 * clock] = rounded(value)
        since_log.clear()
        ended_since_log.clear()
        updates_since_log, logged_at = 0, clock

    while 4 * clock < config.frames:
        # Act and send: an emulator whose episode has ended is reset instead, which is no agent step.
        note("act")
        frames["acted on"].append(sha(observations))
        call = len(rows) + 1
        actions = [scripted_action(call, slot, env.num_actions) for slot in range(n)]
        reseeded = [
            config.sticky_actions > 0 and not playing[slot] and clock // config.reseed_period > seed_labels[slot]
            for slot in range(n)
        ]
        label, first = clock // config.reseed_period, clock + 1
        byte = [254 if again else 255 for again in reseeded]
        trace["action log"].append([a if on else b for a, b, on in zip(actions, byte, playing, strict=True)])
        clock += sum(playing)
        for step in range(first, clock + 1):
            epsilon[step] = epsilon_of(step)
        note("send")
        # What each agent step owes, from what the replay held before.
        for step in range(max(first, config.learning_starts), clock + 1):
            if step == config.learning_starts:
                _, batch = draw(config.init_samples)
                note("initialize")
                frames["initialized from"].append(sha(np.stack([transition.observation for transition in batch])))
            if step % config.update_period == 0:
                indices, batch = draw(config.batch_size)
                note("update")
                updates += 1
                updates_since_log += 1
                since_log += batch
                frames["learned from"].append(
                    sha(np.stack([t.observation for t in batch]), np.stack([t.next_observation for t in batch]))
                )
                trace["minibatches"].append(
                    {
                        "indices": indices,
                        "actions": [transition.action for transition in batch],
                        "rewards": [transition.reward for transition in batch],
                        "terminals": [int(transition.terminal) for transition in batch],
                    }
                )
            if step % config.target_period == 0:
                note("target copy")
                copied_at = updates
        # What came of the actions.
        before = observations
        observations, rewards, terminated, truncated, info = env.step(np.array(actions))
        observations, lives_now = observations.copy(), info["lives"].copy()
        note("receive")
        if any(reseeded):
            observations = env.restart(np.array(reseeded), emulator_seeds(config.seed, n, 0, label)[reseeded]).copy()
        number, row = first - 1, []
        for slot in range(n):
            if not playing[slot]:
                playing[slot], returns[slot], lengths[slot] = True, 0.0, 0
                seed_labels[slot] = label if reseeded[slot] else seed_labels[slot]
                continue
            number += 1
            returns[slot] += rewards[slot]
            lengths[slot] += 1
            lost = config.life_loss_terminal and lives_now[slot] < lives[slot]
            row.append(
                Transition(
                    before[slot],
                    actions[slot],
                    float(rewards[slot]),
                    observations[slot],
                    bool(terminated[slot] or lost),
                )
            )
            if terminated[slot] or truncated[slot]:
                playing[slot] = False
                ended_since_log.append((returns[slot], lengths[slot]))
                trace["episodes.csv"].append({"frames": 4 * number, "return": returns[slot], "length": lengths[slot]})
        lives = lives_now
        note("store")
        rows.append(row)
        stored += len(row)
        # Around the loop.
        done = 4 * clock >= config.frames
        if clock // config.log_period > logged_at // config.log_period:
            log()
        if clock // config.checkpoint_period > saved_at // config.checkpoint_period:
            note("checkpoint latest")
            saved_at = clock
        if done or clock // config.evaluation_period > evaluated_at // config.evaluation_period:
            note("evaluate")
            evaluated_at, score = clock, remaining.pop(0)
            if done and logged_at != clock:
                log()
            if score > best:
                best = score
                note("checkpoint best")
            note("checkpoint latest")
            saved_at = clock
    env.close()
    there = held()
    trace["replay"] = {
        "first index": stored - len(there),
        "end": stored,
        "actions": [transition.action for transition in there],
        "rewards": [transition.reward for transition in there],
        "terminals": [int(transition.terminal) for transition in there],
    }
    frames["in replay"] = sha(np.stack([t.observation for t in there]), np.stack([t.next_observation for t in there]))
    trace["frames"], trace["tensorboard"] = frames, dict(sorted(scalars.items()))
    trace["summary"] = {"frames": 4 * clock, "agent_steps": clock, "updates": updates, "finished": True}
    assert not remaining
    return trace
