"""Several updates in one call against the same updates one by one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents.backends.cpu_kernels.backend import CpuKernels
from agents.dqn import DQN
from tests.carried import Carried, carried
from tests.vectors import needs_passes
from wn_rl.config import load, resolve
from wn_rl.errors import NonFiniteLossError
from wn_rl.replay import LazyMinibatch, Minibatch, Replay

CPU = torch.device("cpu")
ACTIONS, SIZE = 4, 6
PRECISIONS = [pytest.param(name, marks=needs_passes(name)) for name in ("float32", "bfloat16")]


def filled_replay() -> Replay:
    generator = np.random.default_rng(0)
    replay = Replay(60, 2, seed=3)
    replay.start(generator.integers(0, 256, (2, 84, 84), np.uint8))
    for step in range(40):
        shown = generator.integers(0, 256, (2, 84, 84), np.uint8)
        rewards, ends = generator.integers(-1, 2, 2), generator.random(2) < 0.3
        replay.add(generator.integers(0, ACTIONS, 2), rewards, ends, shown, np.full(2, step % 9 == 8))
    return replay


def agent_of(precision: str, kind: type[DQN] = DQN, replay: Replay | None = None, **changes: Any) -> Carried:
    values: dict[str, Any] = {"game": "breakout", "param": "wn", "hidden_units": 32, "compile": "on", **changes}
    config = resolve(replace(load("paper"), **values, precision=precision, batch_size=SIZE))
    agent = carried(replace(config, device="cpu"), ACTIONS, kind, replay or filled_replay())
    agent.initialize(filled_replay().sample(16).observations)
    return agent


def state(agent: Carried) -> dict[str, Any]:
    return {"weights": agent.q_network.state_dict(), **agent.state_dict()}


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("param", ["wn", "standard", "ln", "bn", "wn_mean_only_bn"])
def test_several_updates_are_the_same_as_one_by_one(precision: str, param: str) -> None:
    """Weights, moments, statistics, the last gradient and what is drawn next, to the last bit."""
    replays = [filled_replay() for _ in range(2)]
    agents = [agent_of(precision, param=param, replay=replay) for replay in replays]
    together, apart = (agent.backend for agent in agents)
    assert isinstance(together, CpuKernels)
    for count in (1, 2, 3, 4, 1, 5):
        together.update(count)
        for _ in range(count):
            apart.update()
        assert_same(state(agents[0]), state(agents[1]))
        assert torch.equal(replays[0].generator.get_state(), replays[1].generator.get_state())
        if count == 3:
            for agent in agents:
                agent.copy_target()
    assert agents[0].updates == 16
    ours, theirs = (agent.read_statistics() for agent in agents)
    assert ours == theirs
    assert ours.updates == 16
    assert ours.td_error > 0.0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_measured_update_is_the_next_one_alone(precision: str, count: int) -> None:
    agents = [agent_of(precision) for _ in range(2)]
    steppers = [agent.backend for agent in agents]
    for agent in agents:
        agent.measure_next_update()
    steppers[0].update(count)
    steppers[1].update()
    expected = agents[1].effective_learning_rates()
    assert expected
    for _ in range(count - 1):
        steppers[1].update()
    assert_same(agents[0].effective_learning_rates(), expected)
    assert_same(state(agents[0]), state(agents[1]))
    assert not agents[0].backend._measuring


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("param", "good"), [*(("wn", good) for good in range(4)), ("bn", 1), ("ln", 1)])
def test_a_loss_that_is_not_finite_stops_before_it_and_after_what_was_good(
    precision: str, param: str, good: int
) -> None:
    """The transitions named are those of the update that was refused; its gradient is nowhere to be seen.

    Nor are the statistics of its minibatch in the running ones.
    """
    agents, replay = [agent_of(precision, param=param) for _ in range(2)], filled_replay()
    indices = replay.sample_indices(5 * SIZE).view(5, SIZE)
    indices[indices == 7] = 8
    indices[good, 2] = 7
    replay.storage.rewards[replay.storage.entry_of[7]] = math.nan
    for agent in agents:  # so that there is a gradient before
        agent.update(LazyMinibatch(replay.storage, torch.arange(10, 10 + SIZE)))
    with pytest.raises(NonFiniteLossError, match=f"update {good + 2} is nan"):
        agents[0].backend.update_on(LazyMinibatch(replay.storage, indices.flatten()), 5)
    for row in indices[:good]:
        agents[1].update(LazyMinibatch(replay.storage, row))
    assert agents[0].updates == good + 1
    offending = agents[0].offending_transitions()
    assert offending is not None
    assert offending.tolist() == indices[good].tolist()
    assert_same(state(agents[0]), state(agents[1]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_done_where_one_transition_does_not_exist(precision: str) -> None:
    agent, replay = agent_of(precision), filled_replay()
    agent.update(replay.sample(SIZE))
    before = copy.deepcopy(state(agent))
    indices = replay.sample_indices(3 * SIZE)
    indices[-1] = -1
    with pytest.raises(IndexError, match="does not exist"):
        agent.backend.update_on(LazyMinibatch(replay.storage, indices), 3)
    assert_same(state(agent), before)
    with pytest.raises(ValueError, match="divided among"):
        agent.backend.update_on(replay.sample(7), 2)
    assert_same(state(agent), before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_replay_of_another_kind_draws_each_minibatch(precision: str) -> None:
    sizes = []

    class Own(Replay):
        def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Minibatch:
            sizes.append(batch_size)
            return super().sample(batch_size, generator)

    replay = filled_replay()
    replay.__class__ = Own
    agent = agent_of(precision, replay=replay)
    agent.backend.update(2)
    assert sizes == [SIZE] * 2
    assert agent.updates == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_update_at_all_does_nothing(precision: str) -> None:
    replay = filled_replay()
    agent = agent_of(precision, replay=replay)
    before = copy.deepcopy(state(agent)), replay.generator.get_state()
    agent.backend.update(0)
    assert_same(state(agent), before[0])
    assert torch.equal(replay.generator.get_state(), before[1])


def test_many_draws_at_once_are_those_of_one_by_one() -> None:
    one, many = filled_replay(), filled_replay()
    for count, size in ((1, 32), (4, 32), (3, 5), (2, 64), (16, 1)):
        expected = torch.cat([one.sample_indices(size) for _ in range(count)])
        assert torch.equal(many.sample_indices(count * size), expected)
