"""The configuration of a training run: every key with its unit, its range, and what must hold between keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from wn_rl.config.flags import Count, EnvCount, Names, Options, is_auto
from wn_rl.errors import UsageError

BackendName = str
"""Names of the backends, see ``agents.backends``."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a DQN with a weight parameterization of your choice on an Atari game.

    Units: a frame is one emulator frame; an agent step is one decision, 4 frames; an update is one optimizer step.
    Counts may be written 200M, 2e6 or 500k. A flag beats the file of --config, which beats the preset.
    """

    game: str = ""
    """The game, e.g. Breakout, space_invaders or ALE/Pong-v5."""
    param: str = "wn"
    """Parameterization of the network: standard, wn, mean_only_bn, wn_mean_only_bn, bn, ln, sn, wn_projected, or
    module:Name of your own registered class, whose module is imported."""
    param_options: Options = field(default_factory=dict)
    """Options of the parameterization, e.g. g=exp for wn; docs/parameterizations.md lists them."""
    param_layers: Names = None
    """Layers that are parameterized, of convolutions.0 convolutions.1 convolutions.2 hidden output, or of your own
    network's (* and ? are wildcards). Default: those of the parameterization's source, for wn all."""
    network: str = "nature"
    """Network: nature (Mnih et al. 2015), or module:Name of your own registered class, whose module is imported."""
    network_options: Options = field(default_factory=dict)
    """Options of a network of your own, e.g. width=2: the keyword-only arguments of its __init__."""
    preset: str = "paper"
    """Start from configs/PRESET.yaml: paper (Salimans & Kingma 2016), nature (Mnih et al. 2015), machado (sticky
    actions, full action set) or quick (for a laptop: first results within 2M frames)."""
    frames: Count = 200_000_000
    """Length of the training, in emulator frames."""
    seed: Count = 1
    """Seed of everything random. On a CPU with the same number of threads the same seed gives the same weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network and the replay are; auto: a GPU if there is one."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Arithmetic of the hidden layers; weights, output layer and loss are always float32. auto: on a GPU bfloat16 if it
    computes in it; on a CPU bfloat16 where timing shows that it makes at least 15% more updates; else float32. tf32: on
    a GPU, float32 whose factors are rounded to 10 bits."""
    backend: BackendName = "auto"
    """How updates are computed: eager (torch's autograd, the reference), cuda_graphs (captured once and replayed, on a
    GPU), cpu_kernels (C), or module:Name of your own registered class, whose module is imported. Their results are
    equal up to rounding. auto: the fastest that supports the agent, by timing on a CPU; config.yaml says
    which."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile: cuda_graphs for the whole update, eager on a CPU for adamax's step (about 20 s, once).
    auto: on a GPU for runs of at least 20M frames if there are triton and a C compiler, on a CPU for networks of at
    least half a million parameters if there is a C++ compiler. off: --backend auto takes eager on a CPU."""
    num_envs: EnvCount = 16
    """Emulators that step together (a vector environment). All of them act on the same network, so N changes results
    a little. auto: chosen from cores and device; the run's config.yaml says which number."""
    num_threads: Count = 0
    """Threads that compute the network on a CPU; 0: all cores."""
    emulator_threads: Count = 0
    """Threads that step the emulators; 0: one per core. Does not change results."""
    run_dir: str | None = None
    """Directory of the run; default: runs/GAME-PARAM-PRESET-sSEED-TIME."""

    noop_max: Count = 30
    """Each episode starts with a random number of no-ops, from 0 to noop_max."""
    fire_reset: bool = False
    """Press FIRE at the start of an episode."""
    sticky_actions: float = 0.0
    """Probability that a frame repeats the previous action."""
    full_action_set: bool = False
    """All 18 actions instead of the game's minimal set."""
    max_frames_per_episode: Count = 0
    """Truncate an episode after this number of emulator frames; 0: no cap."""
    life_loss_terminal: bool = True
    """Treat a lost life as terminal in the learning target (the episode itself goes on)."""
    reward_clip: float = 1.0
    """Clip rewards to ± this in learning; 0 disables clipping. Scores are never clipped."""

    replay_capacity: Count = 1_000_000
    """Size of the replay buffer in agent steps (7,056 bytes each)."""
    learning_starts: Count = 50_000
    """Agent steps of random play before the first update."""
    batch_size: Count = 64
    """Minibatch size: transitions per update."""
    update_period: Count = 4
    """Agent steps per update (elsewhere called train frequency)."""
    target_period: Count = 10_000
    """Agent steps between copies to the target network (elsewhere called target update interval or frequency)."""
    gamma: float = 0.99
    """Discount factor per agent step."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Huber loss summed or averaged over the minibatch; only matters relative to optimizer_eps."""
    optimizer: Literal["adamax", "adam", "rmsprop_mnih"] = "adamax"
    """rmsprop_mnih is the centred RMSProp of Mnih et al. 2015."""
    learning_rate: float | None = None
    """Learning rate of the optimizer; default: the value of learning_rates for the parameterization."""
    learning_rates: dict[str, float] = field(default_factory=lambda: {"standard": 1e-4, "wn": 3e-4})
    """Learning rate by parameterization; one that is not listed takes that of standard."""
    optimizer_eps: float = 1e-8
    """The optimizer's epsilon."""
    adam_beta1: float = 0.5
    """β1, the decay of the gradient's running mean, in adamax and adam."""
    adam_beta2: float = 0.999
    """β2, the decay of the gradient's running scale, in adamax and adam."""
    rmsprop_decay: float = 0.95
    """Decay of both running means in rmsprop_mnih."""

    epsilon_start: float = 1.0
    """ε, the probability of a random action, until learning_starts."""
    epsilon_end: float = 0.1
    """ε after the decay."""
    epsilon_decay_steps: Count = 1_000_000
    """Agent steps of the linear decay of ε, counted from learning_starts."""

    hidden_units: Count = 512
    """Units of the dense hidden layer."""
    weight_init: Literal["he", "torch", "normal"] | None = None
    """Initial weights: he (deep_q_rl's), torch (Torch7's, as Mnih et al. 2015) or normal (N(0, 0.05²), as v
    before data-dependent initialization). Default: normal with data-dependent initialization, else he."""
    data_dependent_init: bool | None = None
    """Initialize scales and biases from observations in replay at learning_starts. Default: as the parameterization's
    source does (wn: yes, standard: no)."""
    init_samples: Count = 512
    """Observations for the data-dependent initialization."""
    output_init_std: float = 0.1
    """Standard deviation of the Q-values with output_init scaled."""
    output_init: Literal["scaled", "unit-variance"] = "scaled"
    """Standard deviation of the Q-values after the data-dependent initialization. scaled: output_init_std;
    unit-variance: 1, the paper's rule applied to the output layer as to every other."""
    target_statistics: Literal["running", "batch"] = "running"
    """For parameterizations with batch statistics: those that the target network uses. batch: the minibatch's own,
    whose noise then enters the targets."""
    joint_batches: bool = False
    """For parameterizations with batch statistics: observations and next observations share one batch, as in CrossQ,
    instead of being two."""

    evaluation_period: Count = 250_000
    """Agent steps between evaluations."""
    evaluation_steps: Count = 125_000
    """Agent steps per evaluation; only completed episodes count. 0: evaluation_episodes episodes instead."""
    evaluation_episodes: Count = 30
    """Episodes per evaluation where evaluation_steps is 0."""
    evaluation_epsilon: float = 0.05
    """ε in evaluations."""
    evaluation_envs: Count = 16
    """Emulators per evaluation."""
    checkpoint_seconds: float = 600.0
    """Seconds between checkpoints; every evaluation writes one too."""
    checkpoint_period: Count = 0
    """Agent steps between checkpoints, in addition to those by time; 0: none."""
    action_log: Literal["full", "replay"] = "full"
    """Which actions the run directory keeps. full: all (at most 0.8 MB per million agent steps), so that evaluate.py
    --replay-episode can show every training episode; replay: those that a resumed run needs to restore its replay."""
    reseed_period: Count = 100_000
    """Agent steps after which an emulator with sticky actions is re-seeded, when its next episode starts. A resumed run
    replays up to this many agent steps more than its replay buffer holds."""
    log_period: Count = 10_000
    """Agent steps between points of the TensorBoard curves (log interval)."""
    chosen: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Keys that the user chose, by a flag or in a file; the others follow from the preset, the parameterization and the
    machine. A run's config.yaml lists them, so that the others are derived again when one of these changes."""

    @property
    def max_frames(self) -> int | None:
        """The frame cap of an episode, None for no cap."""
        return self.max_frames_per_episode or None


# key: (lowest, highest) allowed value.
_COUNT_RANGES: dict[str, tuple[int, int]] = {
    "frames": (1, 10**12),
    "seed": (0, 2**31 - 1),
    "num_envs": (1, 4096),
    "num_threads": (0, 1024),
    "emulator_threads": (0, 1024),
    "noop_max": (0, 10_000),
    "max_frames_per_episode": (0, 2**31 - 1),
    "replay_capacity": (1, 10**9),
    "learning_starts": (1, 10**12),
    "batch_size": (1, 2**20),
    "update_period": (1, 10**12),
    "target_period": (1, 10**12),
    "epsilon_decay_steps": (0, 10**12),
    "hidden_units": (1, 65_536),
    "init_samples": (2, 2**16),
    "evaluation_period": (1, 10**12),
    "evaluation_steps": (0, 10**12),
    "evaluation_episodes": (1, 10**6),
    "evaluation_envs": (1, 4096),
    "checkpoint_period": (0, 10**12),
    "reseed_period": (1, 10**12),
    "log_period": (1, 10**12),
}
_FLOAT_RANGES: dict[str, tuple[float, float]] = {
    "sticky_actions": (0.0, 0.999),
    "reward_clip": (0.0, 1e9),
    "gamma": (0.0, 1.0),
    "learning_rate": (1e-12, 1e3),
    "optimizer_eps": (0.0, 1.0),
    "adam_beta1": (0.0, 0.99999999),
    "adam_beta2": (0.0, 0.99999999),
    "rmsprop_decay": (0.0, 0.99999999),
    "epsilon_start": (0.0, 1.0),
    "epsilon_end": (0.0, 1.0),
    "output_init_std": (1e-6, 1e6),
    "checkpoint_seconds": (0.0, 1e9),
    "evaluation_epsilon": (0.0, 1.0),
}


def validate(config: TrainConfig) -> None:
    """Check every value's range and what must hold between keys.

    Raises:
        UsageError: the first thing that is wrong.
    """
    for key, (low, high) in _COUNT_RANGES.items():
        value = getattr(config, key)
        if not low <= value <= high and not (key == "num_envs" and is_auto(value)):
            raise UsageError(f"{key} must be from {low:,} to {high:,}, not {value:,}")
    for key, bounds in _FLOAT_RANGES.items():
        value = getattr(config, key)
        if value is not None and not bounds[0] <= value <= bounds[1]:
            raise UsageError(f"{key} must be from {bounds[0]:g} to {bounds[1]:g}, not {value:g}")
    for name, rate in config.learning_rates.items():
        slow, fast = _FLOAT_RANGES["learning_rate"]
        if not slow <= rate <= fast:
            raise UsageError(f"learning_rates: the value for '{name}' must be from {slow:g} to {fast:g}, not {rate:g}")
    if config.learning_rate is None and "standard" not in config.learning_rates | {config.param: 0.0}:
        raise UsageError(f"learning_rates has no value for '{config.param}' and none for 'standard'")
    if config.run_dir is not None and (not config.run_dir or "\0" in config.run_dir):
        raise UsageError(f"run_dir: {config.run_dir!r} is not the name of a directory")
    if config.replay_capacity < config.num_envs:
        raise UsageError(f"replay_capacity {config.replay_capacity:,} is less than num_envs {config.num_envs:,}")
    if config.learning_starts <= config.num_envs:
        raise UsageError(
            f"learning_starts {config.learning_starts:,} must be larger than num_envs {config.num_envs:,}: "
            "the replay would be empty at the first update"
        )
