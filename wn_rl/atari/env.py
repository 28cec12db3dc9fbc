"""N Atari emulators stepped on C++ threads, with the preprocessing of Mnih et al. 2015 (Methods)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from wn_rl.atari.games import Game, find_game
from wn_rl.errors import UsageError

FRAME_SKIP = 4
"""Emulator frames per agent step."""
STACK_SIZE = 4
"""Frames per observation."""
FRAME_SIDE = 84
"""Pixels on each side of a frame."""
FULL_ACTION_SET = 18
"""Actions of the Atari joystick."""
NO_CAP = 2**31 - 1
"""What ale-py takes for "no frame cap": its own 0 and −1 would end every episode at once."""

Observations = NDArray[np.uint8]
Info = dict[str, NDArray[Any]]


def emulator_seeds(seed: int, count: int, *stream: int) -> NDArray[np.int32]:
    """Return ``count`` emulator seeds, unrelated between seeds (below 2³²) and between ``stream`` labels.

    Consecutive integers would give run 1 and run 2 all but one emulator in common. Labels of zero at the end equal
    no label (numpy pads with zeros).
    """
    return (np.random.SeedSequence([seed, *stream]).generate_state(count) & 0x7FFFFFFF).astype(np.int32)


@functools.cache
def minimal_actions(game: str) -> int:
    """Return the number of actions that have an effect in a game: the size of its minimal action set."""
    ALEInterface.setLoggerMode(LoggerMode.Error)  # it greets on standard error otherwise
    ale = ALEInterface()
    rom = roms.get_rom_path(find_game(game).rom)
    if rom is None:
        raise UsageError(f"this ale-py does not ship {game}")
    ale.loadROM(rom)
    return len(ale.getMinimalActionSet())


class AtariVector(VectorEnv[Observations, NDArray[np.int64], NDArray[Any]]):
    """N emulators of one game; each ``step`` is one agent step (4 frames) of every emulator.

    Observations are uint8 of shape (N, 4, 84, 84), oldest frame first: grayscale, each the maximum of the last two
    of its 4 emulator frames, area-interpolated. Right after a reset the three older frames are zero (Gymnasium's
    ``FrameStackObservation`` repeats the reset frame there; everything else is equal). Rewards are the game's raw
    points, float64, shape (N,).

    Auto-reset is Gymnasium's NEXT_STEP: the step after an episode's end ignores its action and returns the first
    observation of the next episode. It is no transition; ``info["is_reset"]`` marks it. This mode was chosen because
    a final observation then takes the place of an ordinary one, in replay as well, with no second array to carry.

    A life loss ends nothing here. ``info`` holds, each of shape (N,): ``lives`` (int32), ``life_loss`` (bool),
    ``is_reset`` (bool), and of the episode so far ``episode_return`` (float64, points) and ``episode_length``
    (int64, agent steps).
    """

    def __init__(
        self,
        game: Game,
        num_envs: int,
        *,
        seed: int,
        noop_max: int,
        fire_reset: bool,
        sticky_actions: float,
        full_action_set: bool,
        max_frames_per_episode: int | None,
        num_threads: int,
    ) -> None:
        """See :func:`make_atari`."""
        self.game = game
        self._seed = seed
        self._seeded = False
        self._emulators = AtariVectorEnv(
            game.rom,
            num_envs,
            num_threads=num_threads,
            # ale-py draws from 0 … noop_max − 1.
            noop_max=noop_max + 1 if noop_max else 0,
            use_fire_reset=fire_reset,
            repeat_action_probability=sticky_actions,
            full_action_space=full_action_set,
            max_num_frames_per_episode=max_frames_per_episode or NO_CAP,
            reward_clipping=False,
            episodic_life=False,
            life_loss_info=False,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            frameskip=FRAME_SKIP,
            stack_num=STACK_SIZE,
        )
        self.num_envs = num_envs
        self.metadata = dict(self._emulators.metadata)
        self.single_observation_space = self._emulators.single_observation_space
        self.observation_space = self._emulators.observation_space
        self.single_action_space = self._emulators.single_action_space
        self.action_space = self._emulators.action_space
        self.action_meanings = tuple(action.name for action in self._emulators.ale.get_action_set())
        self._lives = np.zeros(num_envs, np.int32)
        self._ended = np.zeros(num_envs, bool)
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)

    @property
    def num_actions(self) -> int:
        """The number of actions of one emulator."""
        return len(self.action_meanings)

    def reset(
        self,
        *,
        seed: int | np.integer[Any] | NDArray[np.integer[Any]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observations, Info]:
        """Start a new episode in every emulator.

        Args:
            seed: an integer seeds all emulators with unrelated values derived from it; an array of shape (N,) gives
                each its own; None seeds with the constructor's seed the first time and not at all later.
            options: not used.

        Raises:
            UsageError: a negative seed.
        """
        if seed is not None and np.min(seed) < 0:
            raise UsageError(f"a seed must be 0 or more, not {np.min(seed)}")
        if seed is None and not self._seeded:
            seed = self._seed
        self._seeded = True
        if isinstance(seed, int | np.integer):
            seed = emulator_seeds(int(seed), self.num_envs)
        observations, info = self._emulators.reset(seed=None if seed is None else np.asarray(seed, np.int32))
        self._lives = info["lives"]
        self._ended = np.zeros(self.num_envs, bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        return observations, self._info(np.zeros(self.num_envs, bool), np.ones(self.num_envs, bool))

    def restart(self, chosen: NDArray[np.bool_], seeds: NDArray[np.integer[Any]] | None = None) -> Observations:
        """Start a new episode in some emulators and leave the others as they are; never between send and recv.

        Args:
            chosen: bool, shape (N,).
            seeds: one for each chosen emulator, which loads its game anew (some 90 ms); None lets its random numbers
                go on (some 5 ms), as an auto-reset does.

        Returns:
            Observations of all, shape (N, 4, 84, 84); those of the chosen are new.
        """
        observations, info = self._emulators.reset(
            seed=None if seeds is None else np.asarray(seeds, np.int32), options={"reset_mask": chosen}
        )
        self._lives = np.where(chosen, info["lives"], self._lives)
        self._ended = self._ended & ~chosen
        self._returns = np.where(chosen, 0.0, self._returns)
        self._lengths = np.where(chosen, 0, self._lengths)
        result: Observations = observations
        return result

    def send(self, actions: NDArray[np.integer[Any]]) -> None:
        """Start the step with ``actions``, shape (N,), on the emulators' threads; :meth:`recv` ends it.

        Raises:
            ValueError: an action that the game does not have, for which the emulators would never answer.
        """
        actions = np.asarray(actions, np.int64)
        if actions.shape != (self.num_envs,) or actions.min() < 0 or actions.max() >= self.num_actions:
            raise ValueError(f"actions must be {self.num_envs} numbers from 0 to {self.num_actions - 1}, not {actions}")
        self._emulators.send(actions)

    def recv(self) -> tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Wait for the step that :meth:`send` started; returns what :meth:`step` returns."""
        observations, rewards, terminated, truncated, info = self._emulators.recv()
        is_reset = self._ended
        lives = info["lives"]
        life_loss = (lives < self._lives) & ~is_reset
        self._lives = lives
        self._ended = terminated | truncated
        self._returns = np.where(is_reset, 0.0, self._returns + rewards)
        self._lengths = np.where(is_reset, 0, self._lengths + 1)
        return observations, rewards.astype(np.float64), terminated, truncated, self._info(life_loss, is_reset)

    def step(
        self, actions: NDArray[np.integer[Any]]
    ) -> tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Play ``actions``, shape (N,): (observations, rewards, terminated, truncated, info)."""
        self.send(actions)
        return self.recv()

    def close_extras(self, **kwargs: Any) -> None:  # noqa: ANN401 - Gymnasium's signature
        """Stop the emulators and free them."""
        del self._emulators

    def _info(self, life_loss: NDArray[np.bool_], is_reset: NDArray[np.bool_]) -> Info:
        return {
            "lives": self._lives,
            "life_loss": life_loss,
            "is_reset": is_reset,
            "episode_return": self._returns,
            "episode_length": self._lengths,
        }


def make_atari(
    game: str,
    num_envs: int = 1,
    *,
    seed: int = 0,
    noop_max: int = 30,
    fire_reset: bool = False,
    sticky_actions: float = 0.0,
    full_action_set: bool = False,
    max_frames_per_episode: int | None = None,
    num_threads: int = 0,
) -> AtariVector:
    """Make N emulators of an Atari game as a ``gymnasium.vector.VectorEnv``.

    Args:
        game: e.g. ``Breakout``, ``space_invaders`` or ``ALE/Breakout-v5``.
        num_envs: N.
        seed: seeds the first reset; each emulator gets a value derived from it.
        noop_max: at the start of an episode 0 … ``noop_max`` no-ops are played, drawn uniformly.
        fire_reset: press FIRE at the start of an episode where the game has it.
        sticky_actions: probability that a frame repeats the previous action (Machado et al. 2018: 0.25).
        full_action_set: all 18 actions instead of the game's minimal set.
        max_frames_per_episode: truncate an episode after so many emulator frames, no-ops not counted; None for no cap.
        num_threads: emulator threads; 0 takes one per core.

    Returns:
        The environment, see :class:`AtariVector`.

    Raises:
        UsageError: an unknown game or an option out of its range.
    """
    found = find_game(game)
    if num_envs < 1:
        raise UsageError(f"num_envs must be at least 1, not {num_envs}")
    if noop_max < 0:
        raise UsageError(f"noop_max must be 0 or more, not {noop_max}")
    if num_threads < 0:
        raise UsageError(f"num_threads must be 0 (one per core) or more, not {num_threads}")
    if not 0.0 <= sticky_actions < 1.0:
        raise UsageError(f"sticky_actions is a probability in [0, 1), not {sticky_actions}")
    if max_frames_per_episode is not None and not 0 < max_frames_per_episode <= NO_CAP:
        raise UsageError(f"max_frames_per_episode must be 1 … {NO_CAP}, or None for no cap")
    if roms.get_rom_path(found.rom) is None:
        raise UsageError(f"this ale-py does not ship {found.name}")
    return AtariVector(
        found,
        num_envs,
        seed=seed,
        noop_max=noop_max,
        fire_reset=fire_reset,
        sticky_actions=sticky_actions,
        full_action_set=full_action_set,
        max_frames_per_episode=max_frames_per_episode,
        num_threads=num_threads,
    )
