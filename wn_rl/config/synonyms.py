"""Names that other DQN implementations give to a configuration key: an unknown one suggests ours."""

from __future__ import annotations

from collections.abc import Iterable

from wn_rl.errors import closest

# Stable-Baselines3, CleanRL, Dopamine, DQN Zoo, Tianshou, RLlib and gymnasium, whose names are much the same.
_BY_KEY = {
    "action_log": "save_actions",
    "adam_beta1": "beta1 beta_1 momentum",
    "adam_beta2": "beta2 beta_2",
    "batch_size": "minibatch_size train_batch_size mini_batch_size batch bs",
    "checkpoint_period": "save_freq save_frequency checkpoint_freq checkpoint_frequency save_interval "
    "checkpoint_interval",
    "device": "gpu cuda use_cuda no_cuda",
    "epsilon_decay_steps": "exploration_fraction exploration_steps epsilon_decay_period epsilon_decay eps_decay "
    "exploration_epsilon_decay_frame_fraction",
    "epsilon_end": "end_e exploration_final_eps epsilon_train eps_train_final exploration_epsilon_end_value eps_end "
    "final_epsilon min_epsilon",
    "epsilon_start": "start_e exploration_initial_eps eps_train exploration_epsilon_begin_value eps_start "
    "initial_epsilon",
    "evaluation_envs": "eval_envs n_eval_envs num_eval_envs test_num",
    "evaluation_episodes": "eval_episodes n_eval_episodes num_eval_episodes episode_per_test",
    "evaluation_epsilon": "eval_epsilon epsilon_eval eps_test eval_exploration_epsilon",
    "evaluation_period": "eval_freq eval_frequency eval_interval eval_period test_freq evaluation_frequency "
    "evaluation_interval",
    "evaluation_steps": "eval_steps num_eval_frames evaluation_frames",
    "full_action_set": "full_action_space",
    "game": "env env_id env_name environment environment_name gym_id task game_name rom",
    "gamma": "discount discount_factor additional_discount",
    "hidden_units": "hidden_size hidden_dim hidden_sizes n_hidden",
    "learning_rate": "lr step_size alpha optimizer_lr",
    "learning_starts": "min_replay_history min_replay_size min_replay_capacity warmup_steps start_timesteps "
    "learning_start replay_start_size min_buffer_size num_steps_sampled_before_learning_starts",
    "life_loss_terminal": "terminal_on_life_loss episodic_life end_on_life_loss episode_life",
    "log_period": "log_interval log_freq log_frequency logging_interval",
    "loss_reduction": "reduction loss_aggregation",
    "max_frames_per_episode": "max_num_frames_per_episode max_episode_frames max_episode_steps max_steps_per_episode "
    "time_limit",
    "noop_max": "max_noop max_noops noops noop",
    "num_envs": "n_envs n_env num_env num_actors num_workers num_env_runners training_num",
    "num_threads": "threads n_threads torch_threads",
    "optimizer": "optim opt optimizer_class",
    "optimizer_eps": "adam_eps eps optimizer_epsilon",
    "output_init": "output_initialization",
    "param": "parameterization parametrization normalization norm weight_norm",
    "param_options": "parameterization_options",
    "precision": "dtype amp fp16 bf16 mixed_precision",
    "replay_capacity": "buffer_size memory_size replay_size replay_buffer_size replay_memory_size buffer_capacity "
    "replay_buffer_capacity capacity memory_capacity",
    "reward_clip": "clip_rewards clip_reward reward_clipping max_abs_reward",
    "run_dir": "logdir log_dir output_dir save_dir results_dir base_dir tensorboard_log save_path outdir",
    "seed": "random_seed rng_seed",
    "sticky_actions": "repeat_action_probability sticky sticky_action_probability",
    "target_period": "target_update_interval target_network_frequency target_update_period target_update_freq "
    "target_network_update_period target_network_update_freq target_network_update_interval target_update_frequency",
    "update_period": "train_freq train_frequency training_frequency learn_period update_frequency update_freq "
    "train_period update_interval",
    "weight_init": "init initializer kernel_initializer",
}
_AGENT_STEPS = [
    "total_timesteps",
    "total_steps",
    "num_timesteps",
    "timesteps",
    "max_timesteps",
    "max_steps",
    "num_steps",
    "total_env_steps",
    "n_timesteps",
]
_FRAMES = ["total_frames", "num_frames", "max_frames", "num_train_frames", "training_frames"]
SYNONYMS = {name: key for key, names in _BY_KEY.items() for name in names.split()} | dict.fromkeys(
    (*_AGENT_STEPS, *_FRAMES), "frames"
)
"""Another implementation's name → our key."""


def flag_suggestion(name: str) -> str:
    """Return ``" Did you mean --…?"`` for another implementation's flag, given without dashes, or an empty text."""
    key = SYNONYMS.get(name.lower())
    return "" if key is None else _question(name, f"--{key.replace('_', '-')}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean …?"`` for an unknown key: ours of another implementation's, or the nearest ``known``."""
    key = SYNONYMS.get(name.lower())
    return closest(name, known) if key is None else _question(name, f"'{key}'")


def _question(name: str, key: str) -> str:
    unit = " (emulator frames, 4 for each agent step)" if name.lower() in _AGENT_STEPS else ""
    return f" Did you mean {key}{unit}?"
