"""The replay gives back byte for byte what was stored, draws every valid transition, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wn_rl.errors import UsageError
from wn_rl.replay import Replay

SIZE = 3  # frames of 3 × 3 bytes, each with content of its own


@dataclass
class Model:
    """A plain-list emulator bank with NEXT_STEP auto-reset, which remembers every observation as it was seen."""

    num_envs: int
    rng: np.random.Generator
    stacks: list[list[NDArray[np.uint8]]] = field(default_factory=list)
    ended: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    transitions: list[list[tuple[NDArray[np.uint8], int, float, NDArray[np.uint8], bool]]] = field(default_factory=list)

    def frame(self) -> NDArray[np.uint8]:
        return self.rng.integers(1, 256, (SIZE, SIZE), dtype=np.uint8)  # never black

    def reset_stack(self) -> list[NDArray[np.uint8]]:
        return [np.zeros((SIZE, SIZE), np.uint8)] * 3 + [self.frame()]

    def start(self) -> NDArray[np.uint8]:
        self.stacks = [self.reset_stack() for _ in range(self.num_envs)]
        self.ended = np.zeros(self.num_envs, bool)
        return np.stack([stack[-1] for stack in self.stacks])

    def step(self, outcomes: list[str], replay: Replay) -> None:
        """Advance each emulator: "go on", "life" (terminal, no reset), "over" (terminal) or "cut" (truncation)."""
        actions = self.rng.integers(0, 18, self.num_envs)
        rewards = self.rng.integers(-50, 50, self.num_envs).astype(np.float64)
        is_reset = self.ended.copy()
        terminals = np.zeros(self.num_envs, bool)
        stored = []
        for slot, outcome in enumerate(outcomes):
            before = np.stack(self.stacks[slot])
            if is_reset[slot]:
                self.stacks[slot] = self.reset_stack()
                self.ended[slot] = False
                rewards[slot] = 0.0
                continue
            self.stacks[slot] = [*self.stacks[slot][1:], self.frame()]
            terminals[slot] = outcome in ("life", "over")
            self.ended[slot] = outcome in ("over", "cut")
            stored.append(
                (before, int(actions[slot]), rewards[slot], np.stack(self.stacks[slot]), bool(terminals[slot]))
            )
        self.transitions.append(stored)
        replay.add(actions, rewards, terminals, np.stack([stack[-1] for stack in self.stacks]), is_reset)


outcomes = st.sampled_from(["go on"] * 5 + ["life", "over", "cut"])


@settings(max_examples=60, deadline=None)
@given(
    num_envs=st.integers(1, 4),
    rows=st.integers(1, 9),
    spare=st.integers(0, 3),
    steps=st.integers(1, 40),
    data=st.data(),
)
def test_every_drawable_transition_is_what_the_environment_gave(
    num_envs: int, rows: int, spare: int, steps: int, data: st.DataObject
) -> None:
    capacity = rows * num_envs + min(spare, num_envs - 1)
    replay = Replay(capacity, num_envs, frame_shape=(SIZE, SIZE))
    model = Model(num_envs, np.random.default_rng(data.draw(st.integers(0, 1000))))
    replay.start(model.start())
    for _ in range(steps):
        acting = replay.observations().numpy()
        np.testing.assert_array_equal(acting, np.stack([np.stack(stack) for stack in model.stacks]))
        model.step(data.draw(st.lists(outcomes, min_size=num_envs, max_size=num_envs)), replay)
        # Exactly the transitions of the last `rows` vector steps can be drawn, oldest first.
        expected = [transition for row in model.transitions[-rows:] for transition in row]
        low, high = replay.index_range
        assert high - low == len(replay) == len(expected)
        if not expected:
            continue
        batch = replay.transitions(torch.arange(low, high))
        for index, (before, action, reward, after, terminal) in enumerate(expected):
            np.testing.assert_array_equal(batch.observations[index].numpy(), before)
            np.testing.assert_array_equal(batch.next_observations[index].numpy(), after)
            assert batch.actions[index] == action
            assert batch.rewards[index] == reward
            assert batch.terminals[index] == terminal


def test_draws_are_uniform_over_valid_transitions_after_wrap_around() -> None:
    replay = Replay(20, 2, frame_shape=(SIZE, SIZE), seed=3)
    model = Model(2, np.random.default_rng(0))
    replay.start(model.start())
    for step in range(37):
        model.step(["over" if step % 7 == 3 else "go on", "cut" if step % 5 == 0 else "go on"], replay)
    expected = [transition for row in model.transitions[-10:] for transition in row]
    number_of = {transition[3].tobytes(): index for index, transition in enumerate(expected)}
    draws = 40_000
    batch = replay.sample(draws)
    counts = np.zeros(len(expected))
    for stack in batch.next_observations.numpy():
        counts[number_of[stack.tobytes()]] += 1  # a KeyError is an invalid transition
    assert counts.min() > 0
    mean = draws / len(expected)
    chi_square = ((counts - mean) ** 2 / mean).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of the chi-square


def test_same_seed_draws_the_same_and_a_foreign_generator_leaves_it_alone() -> None:
    drawn = []
    for extra in (False, True):
        replay = Replay(50, 1, frame_shape=(SIZE, SIZE), seed=11)
        model = Model(1, np.random.default_rng(1))
        replay.start(model.start())
        for _ in range(30):
            model.step(["go on"], replay)
        if extra:
            replay.sample(8, torch.Generator().manual_seed(0))
        drawn.append(replay.sample(16))
    assert torch.equal(drawn[0].observations, drawn[1].observations)
    assert torch.equal(drawn[0].actions, drawn[1].actions)


def test_memory_of_a_million_agent_steps_stays_under_7_2_gb() -> None:
    replay = Replay(1_000_000, 16, frame_shape=(1, 1))
    assert replay.nbytes == Replay.expected_bytes(1_000_000, 16, frame_pixels=1)
    assert Replay.expected_bytes(1_000_000, 16) < 7.2e9


def test_empty_and_too_small_replays_say_so() -> None:
    with pytest.raises(UsageError, match="empty"):
        Replay(10, 1, frame_shape=(SIZE, SIZE)).sample(1)
    with pytest.raises(UsageError, match="smaller than one step of 4"):
        Replay(3, 4)
