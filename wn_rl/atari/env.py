"""N Atari emulators stepped on C++ threads, with the preprocessing of Mnih et al. 2015 (Methods)."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError, ResetNeeded
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
"""ale-py's value for "no frame cap": its own 0 and −1 would end every episode at once."""

LARGEST_SEED = 2**31 - 1
"""Largest seed of one emulator: ale-py stores seeds in 32 bits, and a negative one means "none"."""
RESET_MASK = "reset_mask"
"""The option of :meth:`AtariVector.reset` that names the emulators to reset."""

Observations = NDArray[np.uint8]
Info = dict[str, NDArray[Any]]
Seeds = int | np.integer[Any] | Sequence[int] | NDArray[np.integer[Any]]
"""One seed from which those of all emulators are derived, or one for each emulator."""


class _State(enum.Enum):
    """Which method may be called next."""

    UNKNOWN = enum.auto()
    """Not reset yet, or a step was interrupted and its result is lost: a reset of all emulators."""
    READY = enum.auto()
    """A reset or :meth:`AtariVector.send`."""
    STEPPING = enum.auto()
    """A step is running: :meth:`AtariVector.recv`."""
    CLOSED = enum.auto()


def emulator_seeds(seed: int, count: int, *stream: int) -> NDArray[np.int32]:
    """Return ``count`` emulator seeds, independent for different seeds (below 2³²) and ``stream`` labels.

    With consecutive integers, run 1 and run 2 would have all emulators but one in common. Trailing labels of zero are
    the same as no label (numpy pads with zeros).
    """
    return (np.random.SeedSequence([seed, *stream]).generate_state(count) & 0x7FFFFFFF).astype(np.int32)


@functools.cache
def minimal_actions(game: str) -> int:
    """Return the size of a game's minimal action set."""
    ALEInterface.setLoggerMode(LoggerMode.Error)  # otherwise it prints a banner on standard error
    ale = ALEInterface()
    rom = roms.get_rom_path(find_game(game).rom)
    if rom is None:
        raise UsageError(f"this ale-py does not ship {game}")
    ale.loadROM(rom)
    return len(ale.getMinimalActionSet())


def _checked_seed(seed: object) -> int:
    """Return a seed from which others are derived.

    Raises:
        UsageError: it is not an integer, or negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise UsageError(f"a seed must be an integer, 0 or more, not {seed!r}")
    return int(seed)


class AtariVector(VectorEnv[Observations, NDArray[np.int64], NDArray[Any]]):
    """N emulators of one game; each ``step`` is one agent step (4 frames) of every emulator.

    Observations are uint8 of shape (N, 4, 84, 84), oldest frame first: grayscale, each the maximum of the last two
    of its 4 emulator frames, area-interpolated. Right after a reset the three older frames are zero (Gymnasium's
    ``FrameStackObservation`` repeats the reset frame there; everything else is equal). Rewards are the game's raw
    points, float64, shape (N,).

    Auto-reset is Gymnasium's NEXT_STEP: the step after an episode's end ignores its action and returns the first
    observation of the next episode. It is not a transition; ``info["is_reset"]`` marks it. In this mode a
    final observation is stored like any other, in replay as well, and needs no second array.

    One step at a time: as in Gymnasium's ``AsyncVectorEnv``, a second :meth:`send` or a reset while a step is pending
    raises ``AlreadyPendingCallError``, and :meth:`recv` without a step ``NoAsyncCallError`` (all of these are in
    ``gymnasium.error``). A step before the first reset, or after Ctrl-C broke into one, raises ``ResetNeeded``; a call
    after :meth:`close` raises ``ClosedEnvironmentError``.

    A lost life does not end an episode. ``info`` holds, each of shape (N,): ``lives`` (int32), ``life_loss`` (bool),
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
        self._state = _State.UNKNOWN
        self._paddle = np.ones(num_envs, np.float32)
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
        seed: Seeds | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observations, Info]:
        """Start a new episode in every emulator, or in those of ``options["reset_mask"]``.

        Args:
            seed: an integer seeds all emulators with unrelated values derived from it; an array or list of shape (N,)
                gives each its own, from 0 to 2³¹ − 1; None seeds with the constructor's seed the first time and not at
                all later.
            options: ``{"reset_mask": mask}``, bool of shape (N,) with a True in it, as in Gymnasium: the others are
                not affected, keep their observations, and their seeds are not used.

        Raises:
            UsageError: invalid seeds, options or mask.
            AlreadyPendingCallError: a step is pending: call :meth:`recv` first.
            ResetNeeded: a mask was given before all emulators were reset.
            ClosedEnvironmentError: after :meth:`close`.
        """
        mask = self._mask(options)
        if seed is None and not self._seeded:
            seed = self._seed
        seeds = None if seed is None else self._emulator_seeds(seed)
        if mask is not None and not mask.all():
            observations = self.restart(mask, None if seeds is None else seeds[mask])
            return observations, self._info(np.zeros(self.num_envs, bool), mask)
        if self._state is _State.STEPPING or self._state is _State.CLOSED:
            raise self._refusal("reset")
        self._state = _State.UNKNOWN
        observations, info = self._emulators.reset(seed=seeds)
        self._seeded = True
        self._lives = info["lives"]
        self._ended = np.zeros(self.num_envs, bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._state = _State.READY
        return observations, self._info(np.zeros(self.num_envs, bool), np.ones(self.num_envs, bool))

    def restart(self, chosen: NDArray[np.bool_], seeds: NDArray[np.integer[Any]] | None = None) -> Observations:
        """Start a new episode in some emulators and leave the others as they are; see :meth:`reset` for errors.

        Args:
            chosen: bool, shape (N,).
            seeds: one for each chosen emulator, which reloads its game (about 90 ms); None continues its random
                numbers (about 5 ms), as an auto-reset does.

        Returns:
            Observations of all emulators, shape (N, 4, 84, 84), new for the chosen ones.
        """
        if self._state is not _State.READY:
            raise self._refusal("reset")
        self._state = _State.UNKNOWN
        observations, info = self._emulators.reset(
            seed=None if seeds is None else np.asarray(seeds, np.int32), options={RESET_MASK: chosen}
        )
        self._lives = np.where(chosen, info["lives"], self._lives)
        self._ended = self._ended & ~chosen
        self._returns = np.where(chosen, 0.0, self._returns)
        self._lengths = np.where(chosen, 0, self._lengths)
        self._state = _State.READY
        result: Observations = observations
        return result

    def send(self, actions: NDArray[np.integer[Any]]) -> None:
        """Start the step with ``actions``, shape (N,), on the emulators' threads; :meth:`recv` ends it.

        Raises:
            ValueError: an action that the game does not have; the emulators would never return.
            AlreadyPendingCallError: a step is pending already.
            ResetNeeded: there is no episode in progress.
            ClosedEnvironmentError: after :meth:`close`.
        """
        if self._state is not _State.READY:
            raise self._refusal("send")
        given = np.asarray(actions)
        # The shape first: the minimum of an empty array is an error of its own.
        if given.dtype.kind not in "iu" or given.shape != (self.num_envs,):
            raise self._bad_actions(given)
        actions = given.astype(np.int64, copy=False)
        if actions.min() < 0 or actions.max() >= self.num_actions:
            raise self._bad_actions(given)
        # Ctrl-C cannot interrupt between these two lines.
        self._state = _State.STEPPING
        self._emulators.ale.send(actions, self._paddle)

    def recv(self) -> tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Wait for the step that :meth:`send` started; returns what :meth:`step` returns.

        Raises:
            NoAsyncCallError: no step is pending.
            ClosedEnvironmentError: after :meth:`close`.
        """
        if self._state is not _State.STEPPING:
            raise self._refusal("recv")
        # Ctrl-C is handled after the emulators have returned: the step is over then, and its result is lost.
        self._state = _State.UNKNOWN
        observations, rewards, terminated, truncated, info = self._emulators.ale.recv()
        is_reset = self._ended
        lives = info["lives"]
        life_loss = (lives < self._lives) & ~is_reset
        self._lives = lives
        self._ended = terminated | truncated
        self._returns = np.where(is_reset, 0.0, self._returns + rewards)
        self._lengths = np.where(is_reset, 0, self._lengths + 1)
        self._state = _State.READY
        return observations, rewards.astype(np.float64), terminated, truncated, self._info(life_loss, is_reset)

    def step(
        self, actions: NDArray[np.integer[Any]]
    ) -> tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Play ``actions``, shape (N,): (observations, rewards, terminated, truncated, info)."""
        self.send(actions)
        return self.recv()

    def close_extras(self, **kwargs: Any) -> None:  # noqa: ANN401 - Gymnasium's signature
        """Stop the emulators and free them."""
        self._state = _State.CLOSED
        del self._emulators

    def _refusal(self, call: str) -> Exception:
        """Return the error of a call that is not allowed in the present state."""
        if self._state is _State.CLOSED:
            return ClosedEnvironmentError(f"{call}() after close(): create new emulators")
        if self._state is _State.STEPPING:
            return AlreadyPendingCallError(f"{call}() while a step is pending: call recv() first", "step")
        if call == "recv":
            return NoAsyncCallError("recv() without a send() before it: no step is pending", "step")
        return ResetNeeded(f"{call}() needs a reset() of all emulators first: none was made, or a step was interrupted")

    def _bad_actions(self, actions: NDArray[Any]) -> ValueError:
        return ValueError(f"actions must be {self.num_envs} integers from 0 to {self.num_actions - 1}, not {actions}")

    def _mask(self, options: dict[str, Any] | None) -> NDArray[np.bool_] | None:
        """Return the mask in the options of a reset, if there is one.

        Raises:
            UsageError: another option, or an invalid mask.
        """
        if unknown := sorted(map(str, (options or {}).keys() - {RESET_MASK})):
            raise UsageError(f"reset() knows no option {', '.join(unknown)}: only {RESET_MASK}")
        if not options:
            return None
        mask = np.asarray(options[RESET_MASK])
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise UsageError(
                f"{RESET_MASK} must be a bool array of shape ({self.num_envs},), not {mask.dtype} of shape {mask.shape}"
            )
        if not mask.any():
            raise UsageError(f"{RESET_MASK} has no True: no emulator to reset")
        return mask

    def _emulator_seeds(self, seed: Seeds) -> NDArray[np.int32]:
        """Return the seed of each emulator, shape (N,).

        Raises:
            UsageError: it is not a seed, or not one for each emulator.
        """
        if isinstance(seed, int | np.integer):
            return emulator_seeds(_checked_seed(seed), self.num_envs)
        try:
            seeds = np.asarray(seed)
        except ValueError:  # a ragged list
            seeds = np.asarray(None)
        if seeds.shape != (self.num_envs,) or seeds.dtype.kind not in "iu":
            raise UsageError(f"seed must be an integer, or {self.num_envs} of them, one for each emulator; not {seed}")
        if seeds.min() < 0 or seeds.max() > LARGEST_SEED:
            raise UsageError(f"the seed of an emulator must be from 0 to {LARGEST_SEED}, not {seed}")
        return seeds.astype(np.int32)

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
        noop_max: an episode starts with 0 … ``noop_max`` no-ops, uniformly distributed.
        fire_reset: press FIRE at the start of an episode, if the game has this action.
        sticky_actions: probability that a frame repeats the previous action (Machado et al. 2018: 0.25).
        full_action_set: all 18 actions instead of the game's minimal set.
        max_frames_per_episode: truncate an episode after so many emulator frames, no-ops not counted; None for no cap.
        num_threads: emulator threads; 0 takes one per core.

    Returns:
        The environment, see :class:`AtariVector`.

    Raises:
        UsageError: an unknown game, or a seed or an option out of its range.
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
        seed=_checked_seed(seed),
        noop_max=noop_max,
        fire_reset=fire_reset,
        sticky_actions=sticky_actions,
        full_action_set=full_action_set,
        max_frames_per_episode=max_frames_per_episode,
        num_threads=num_threads,
    )
