"""Named protocols say what their sources say, and play what can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ale_py import Action, ALEInterface, roms

from wn_rl.atari.env import make_atari
from wn_rl.config import TrainConfig
from wn_rl.errors import CheckpointError, UsageError
from wn_rl.evaluation import scoring
from wn_rl.evaluation.episodes import Episode, EvaluationResult, evaluate
from wn_rl.evaluation.protocols import PROTOCOLS, SAFETY_CAP, ScoreProtocol, find_protocol
from wn_rl.evaluation.scoring import How

NOOP, FIRE = 0, 1


def test_the_named_protocols_are_those_of_their_sources() -> None:
    common = {"noop_max": 30, "fire_reset": False, "sticky_actions": 0.0, "action_set": "minimal", "epsilon": 0.05}
    assert PROTOCOLS["paper"].settings() == {
        **common, "steps": 125_000, "episodes": 0, "max_frames_per_episode": None
    }  # fmt: skip
    assert PROTOCOLS["nature"].settings() == {
        **common, "steps": 0, "episodes": 30, "max_frames_per_episode": 18_000
    }  # fmt: skip
    machado = PROTOCOLS["machado"].settings()
    assert machado["sticky_actions"] == 0.25
    assert machado["action_set"] == "full"
    assert (machado["epsilon"], machado["max_frames_per_episode"], machado["noop_max"]) == (0.01, 108_000, 0)


def test_single_flags_change_a_protocol_and_show() -> None:
    changed = find_protocol("nature", {"epsilon": 0.1, "episodes": 5})
    assert (changed.epsilon, changed.episodes, changed.max_frames_per_episode) == (0.1, 5, 18_000)
    assert changed.label == "nature with epsilon, episodes changed"
    assert find_protocol("nature", {"epsilon": 0.05, "episodes": 30}).label == "nature"  # no change at all
    for_steps = find_protocol("nature", {"steps": 1000})
    assert (for_steps.steps, for_steps.episodes, for_steps.changed) == (1000, 0, ("steps",))
    assert find_protocol("paper", {"episodes": 3}).changed == ("episodes", "max_frames_per_episode")


def test_a_game_that_nothing_ends_gets_the_safety_cap_where_games_are_counted() -> None:
    assert find_protocol("paper", {}).max_frames_per_episode is None  # the budget ends it
    assert find_protocol("paper", {"episodes": 3}).max_frames_per_episode == SAFETY_CAP
    assert find_protocol("paper", {"episodes": 3, "max_frames_per_episode": 0}).max_frames_per_episode is None
    own = find_protocol("training", {}, TrainConfig(noop_max=7, sticky_actions=0.25))
    assert (own.max_frames_per_episode, own.noop_max, own.sticky_actions) == (SAFETY_CAP, 7, 0.25)
    assert own.label == "training"
    assert find_protocol("training", {"steps": 9}, TrainConfig()).max_frames_per_episode is None


def test_the_description_holds_every_setting() -> None:
    assert PROTOCOLS["paper"].describe() == (
        "protocol paper: completed episodes of 125,000 agent steps, ε 0.05, no frame cap, up to 30 no-ops, "
        "no sticky actions, minimal action set"
    )
    assert PROTOCOLS["machado"].describe() == (
        "protocol machado: 100 episodes, ε 0.01, 108,000 frames cap, no no-ops, sticky actions 0.25, full action set"
    )


def test_what_makes_no_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'nature'"):
        find_protocol("natur", {})
    with pytest.raises(UsageError, match="give one of them"):
        find_protocol("nature", {"steps": 5, "episodes": 5})
    with pytest.raises(UsageError, match="nothing to evaluate"):
        find_protocol("nature", {"episodes": 0})
    with pytest.raises(UsageError, match="does not store its emulator settings"):
        find_protocol("training", {})


# --- scripted policies -------------------------------------------------------------------------------------------


def by_hand(game: str, action: Action, max_frames: int) -> tuple[float, int]:
    """Play one game with a single action on a bare emulator: (score, agent steps); 4 frames a step."""
    ale = ALEInterface()
    ale.setInt("random_seed", 1)
    ale.setFloat("repeat_action_probability", 0.0)
    rom = roms.get_rom_path(game)
    assert rom is not None
    ale.loadROM(rom)
    score, steps, frames = 0.0, 0, 0
    while not ale.game_over() and frames < max_frames:
        steps += 1
        for _ in range(4):
            score += ale.act(action)
            frames += 1
            if ale.game_over():
                break
    return score, steps


def always(game: str, action: int, protocol: ScoreProtocol, num_envs: int = 2) -> EvaluationResult:
    env = make_atari(
        game,
        num_envs,
        noop_max=protocol.noop_max,
        max_frames_per_episode=protocol.max_frames_per_episode,
        sticky_actions=protocol.sticky_actions,
    )
    try:
        return evaluate(lambda o: torch.full((len(o),), action), env, protocol, seed=3)
    finally:
        env.close()


def test_nature_ends_a_game_that_nobody_serves_after_five_minutes() -> None:
    """Nobody presses FIRE, so no ball is ever served: 0 points, and the cap of 18,000 frames is 4,500 agent steps."""
    result = always("breakout", NOOP, replace(PROTOCOLS["nature"], epsilon=0.0, episodes=1), num_envs=1)
    assert result.episodes == (Episode(0.0, 4500),)


@pytest.mark.parametrize("game", ["breakout", "space_invaders"])
def test_paper_counts_the_completed_games_of_the_budget(game: str) -> None:
    """Without no-ops every game of always-FIRE is the same, so the budget holds ⌊steps / length⌋ of them."""
    score, length = by_hand(game, Action.FIRE, 10**6)
    assert (score > 0) == (game == "space_invaders")  # the paddle that stays where it is misses every ball
    assert 50 < length < 2000
    protocol = replace(PROTOCOLS["paper"], epsilon=0.0, noop_max=0, steps=2 * length + length // 2)
    assert always(game, FIRE, protocol).episodes == (Episode(score, length),) * 2


def test_the_unfinished_game_of_a_budget_is_dropped_unless_it_is_the_only_one() -> None:
    score, length = by_hand("breakout", Action.FIRE, 10**6)
    protocol = replace(PROTOCOLS["paper"], epsilon=0.0, noop_max=0)
    assert always("breakout", FIRE, replace(protocol, steps=2 * length - 1)).episodes == (Episode(score, length),)
    (only,) = always("breakout", FIRE, replace(protocol, steps=length - 1)).episodes
    assert (only.length, only.completed) == (length - 1, False)


def test_who_does_nothing_loses_at_pong_by_21_whatever_the_no_ops() -> None:
    score, length = by_hand("pong", Action.NOOP, 10**6)
    assert score == -21.0
    without = always("pong", NOOP, replace(PROTOCOLS["nature"], epsilon=0.0, episodes=1, noop_max=0), 1)
    assert without.episodes == (Episode(-21.0, length),)
    with_noops = always("pong", NOOP, replace(PROTOCOLS["nature"], epsilon=0.0, episodes=2))
    assert with_noops.scores.tolist() == [-21.0] * 2
    # Up to 30 frames of no-ops came first, 4 of which are an agent step.
    assert all(length - 8 <= e.length <= length for e in with_noops.episodes)


@pytest.mark.slow
def test_the_whole_of_both_protocols_hand_counted() -> None:
    score, length = by_hand("space_invaders", Action.FIRE, 10**6)
    paper = always("space_invaders", FIRE, replace(PROTOCOLS["paper"], epsilon=0.0, noop_max=0), num_envs=16)
    assert [(e.score, e.length) for e in paper.episodes] == [(score, length)] * (125_000 // length)
    nature = always("breakout", NOOP, replace(PROTOCOLS["nature"], epsilon=0.0), num_envs=30)
    assert [(e.score, e.length) for e in nature.episodes] == [(0.0, 4500)] * 30
    pong = always("pong", NOOP, replace(PROTOCOLS["nature"], epsilon=0.0), num_envs=30)
    assert pong.scores.tolist() == [-21.0] * 30


def test_scores_are_of_networks_in_float32_on_a_gpu_too(tmp_path: Path, save_checkpoint: Callable[..., Path]) -> None:
    """Torch lets a GPU's convolutions round to TF32 unless it is told not to."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, True
        scoring.prepare(save_checkpoint(tmp_path / "run"), How("nature", {"episodes": 1}))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --- action sets -------------------------------------------------------------------------------------------------


def test_machado_refuses_a_minimal_network_unless_told_and_then_labels_the_score(
    tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    run = save_checkpoint(tmp_path / "run")
    short = {"episodes": 1, "max_frames_per_episode": 40}
    with pytest.raises(CheckpointError, match=r"minimal action set \(4 actions\).*--action-set checkpoint"):
        scoring.score(run, How("machado", short))
    labelled = scoring.score(run, How("machado", {**short, "action_set": "checkpoint"}))
    assert labelled.protocol.action_set == "minimal"
    assert "action set" in labelled.protocol.label
    assert labelled.result.episodes[0].length == 10

    full = save_checkpoint(tmp_path / "full", full_action_set=True)
    assert scoring.score(full, How("machado", short)).protocol.action_set == "full"
    with pytest.raises(CheckpointError, match=r"full action set \(18 actions\)"):
        scoring.score(full, How("nature", short))


def test_where_all_actions_are_minimal_there_is_but_one_set(
    tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    run = save_checkpoint(tmp_path / "run", "Seaquest")
    score = scoring.score(run, How("machado", {"episodes": 1, "max_frames_per_episode": 40}))
    assert (score.protocol.action_set, score.protocol.sticky_actions) == ("full", 0.25)
