"""A tour from Python, cell by cell: train a network, look at what it wrote, load it, play, score it.

``python -m docs.tour``, or open it in an editor that runs cells (``# %%``). It trains for some minutes on two cores.
"""

# %% Train. Every configuration key may be named; the rest is the preset's.
import wn_rl

FRAMES = 200_000  # 2_000_000 is the preset's own length

run = wn_rl.train(game="Breakout", param="wn", preset="quick", frames=FRAMES, run_dir="runs/tour")
print("written to", run)

# %% What the run wrote: evaluations during the training, one row each.
print((run / "evaluations.csv").read_text(encoding="utf-8"))

# %% Load the latest checkpoint. A checkpoint directory or a Stable-Baselines3 DQN's zip file will do as well.
policy = wn_rl.load(run)
print(policy.game, policy.config.param, f"{sum(p.numel() for p in policy.network.parameters()):,} parameters")

# %% Play four emulators by hand, with the settings of the training.
env = policy.make_env(num_envs=4)
observations, _ = env.reset(seed=1)
print("observations", observations.shape, observations.dtype)
points = 0.0
for _ in range(200):
    observations, rewards, terminated, truncated, info = env.step(policy.predict(observations, epsilon=0.05))
    points += float(rewards.sum())
env.close()
print("points of 4 emulators in 200 agent steps:", points)

# %% Q-values of one observation: what the network expects of each action.
print(policy.q_values(observations[0]).round(2))

# %% Score it under a stated protocol: the mean over whole episodes with its 95% interval.
score = wn_rl.evaluate(run, protocol="nature", episodes=5)
print(f"{score.result.mean:.1f} points, 95% interval {score.interval.low:.1f} to {score.interval.high:.1f}")
