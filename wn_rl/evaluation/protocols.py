"""Evaluation protocols by name: everything that decides how a score is measured.

Two scores can be compared if :meth:`ScoreProtocol.settings` are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from wn_rl.config import TrainConfig
from wn_rl.errors import UsageError, closest

SAFETY_CAP = 108_000
"""Frame cap (30 minutes of emulator frames) of an episode that nothing else would end."""
TRAINING = "training"
"""Name of the protocol that takes the emulator's settings from the checkpoint's own training."""

ActionSet = Literal["minimal", "full", "checkpoint"]


@dataclass(frozen=True)
class EvaluationProtocol:
    """How long to play, and with which ε.

    Attributes:
        epsilon: probability of a random action.
        steps: budget of agent steps; only episodes completed within it count. 0: play ``episodes``.
        episodes: number of episodes where ``steps`` is 0.
    """

    epsilon: float = 0.05
    steps: int = 0
    episodes: int = 30


@dataclass(frozen=True)
class ScoreProtocol(EvaluationProtocol):
    """Everything that decides what a score means.

    Attributes:
        name: of the protocol, before any single setting was changed.
        max_frames_per_episode: emulator frames after which an episode is truncated; None for no cap.
        noop_max: an episode starts with 0 … ``noop_max`` no-ops.
        fire_reset: FIRE is pressed at the start of an episode.
        sticky_actions: probability that a frame repeats the previous action.
        action_set: ``minimal`` or ``full`` (18 actions); ``checkpoint`` takes that of the training.
        changed: the settings that differ from the protocol of this name.
    """

    name: str = TRAINING
    max_frames_per_episode: int | None = None
    noop_max: int = 30
    fire_reset: bool = False
    sticky_actions: float = 0.0
    action_set: ActionSet = "minimal"
    changed: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, and what was changed: ``nature`` or ``nature with epsilon, episodes changed``."""
        if not self.changed:
            return self.name
        return f"{self.name} with {', '.join(key.replace('_', ' ') for key in self.changed)} changed"

    def settings(self) -> dict[str, Any]:
        """Return every setting by name, without the protocol's name, as JSON values."""
        return {key: getattr(self, key) for key in SETTINGS}

    def describe(self) -> str:
        """Return the protocol as one line of text."""
        cap, noops = self.max_frames_per_episode, self.noop_max
        sticky = f"sticky actions {self.sticky_actions:g}" if self.sticky_actions else "no sticky actions"
        length = (
            f"completed episodes of {self.steps:,} agent steps"
            if self.steps
            else f"{self.episodes:,} episode{'s'[: self.episodes != 1]}"
        )
        return (
            f"protocol {self.label}: {length}, ε {self.epsilon:g}, {f'{cap:,} frames' if cap else 'no frame'} cap, "
            f"{f'up to {noops}' if noops else 'no'} no-ops, {sticky}, "
            f"{'fire reset, ' if self.fire_reset else ''}"
            f"{self.action_set + ' action set' if self.action_set != 'checkpoint' else 'action set of the training'}"
        )


SETTINGS = tuple(
    entry.name for entry in fields(ScoreProtocol) if entry.name not in ("name", "changed")
)  # in the order in which they are reported

PROTOCOLS = {
    # Salimans & Kingma 2016 used deep_q_rl, whose test epoch this is: no frame cap, the unfinished last episode
    # dropped.
    "paper": ScoreProtocol(name="paper", steps=125_000, episodes=0),
    # Mnih et al. 2015, Methods: 30 episodes of up to 5 minutes from random no-op starts.
    "nature": ScoreProtocol(name="nature", max_frames_per_episode=18_000),
    # Machado et al. 2018: sticky actions, all 18 actions, scores over the last 100 training episodes. ε is the training
    # ε of Dopamine, the cap that of Dopamine and DreamerV2, which follow these recommendations; the paper's own were
    # not read.
    "machado": ScoreProtocol(
        name="machado",
        epsilon=0.01,
        episodes=100,
        max_frames_per_episode=SAFETY_CAP,
        noop_max=0,
        sticky_actions=0.25,
        action_set="full",
    ),
}
"""The named protocols; docs/evaluation.md has the source of each setting."""


def protocol_names() -> tuple[str, ...]:
    """Return the names that :func:`find_protocol` knows."""
    return (TRAINING, *PROTOCOLS)


def check_name(name: str) -> None:
    """Check that there is a protocol of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in protocol_names():
        raise UsageError(
            f"unknown protocol '{name}'.{closest(name, protocol_names())} There are: {', '.join(protocol_names())}."
        )


def find_protocol(name: str, changes: Mapping[str, Any], config: TrainConfig | None = None) -> ScoreProtocol:
    """Return a protocol with single settings changed.

    ``episodes`` and ``steps`` replace each other. If episodes are counted and neither the protocol nor ``changes`` has
    a frame cap, an episode is truncated after :data:`SAFETY_CAP`, since an episode need not end by itself.

    Args:
        name: of :func:`protocol_names`.
        changes: settings by name; ``max_frames_per_episode`` 0 or None stands for no cap.
        config: of the training, which ``training`` takes the emulator's settings from.

    Raises:
        UsageError: an unknown name, ``training`` without ``config``, both ``episodes`` and ``steps``, or neither.
    """
    check_name(name)
    if name != TRAINING:
        base = PROTOCOLS[name]
    elif config is None:
        raise UsageError(
            f"a Stable-Baselines3 file does not store its emulator settings: add --protocol {', '.join(PROTOCOLS)}"
        )
    else:
        base = ScoreProtocol(
            max_frames_per_episode=config.max_frames,
            noop_max=config.noop_max,
            fire_reset=config.fire_reset,
            sticky_actions=config.sticky_actions,
            action_set="checkpoint",
        )
    changes = dict(changes)
    if changes.get("steps") and changes.get("episodes"):
        raise UsageError("--steps counts agent steps and --episodes whole episodes: give one of them")
    if changes.get("steps"):
        changes["episodes"] = 0
    elif changes.get("episodes"):
        changes["steps"] = 0
    if "max_frames_per_episode" in changes:
        changes["max_frames_per_episode"] = changes["max_frames_per_episode"] or None
    wanted = replace(base, **changes)
    if wanted.steps <= 0 and wanted.episodes <= 0:
        raise UsageError("nothing to evaluate: ask for at least 1 of --episodes or --steps")
    if wanted.steps == 0 and wanted.max_frames_per_episode is None and "max_frames_per_episode" not in changes:
        wanted = replace(wanted, max_frames_per_episode=SAFETY_CAP)
    # The cap that `training` adds to the training's own settings is not a change by the user.
    changed = [key for key in SETTINGS if getattr(wanted, key) != getattr(base, key)]
    if name == TRAINING:
        changed = [key for key in changed if key in changes]
    if "steps" in changed and "episodes" in changed:
        changed.remove("steps" if wanted.episodes else "episodes")
    return replace(wanted, changed=tuple(changed))
