"""Stable-Baselines3 trains, saves and loads every parameterization; with ``standard`` it trains as it does without."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("stable_baselines3")

from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy

import agents.sb3
import wn_rl
import wn_rl.sb3
from wn_rl.parameterizations import Parameterization, names
from wn_rl.parameterizations.api import treated_layers
from wn_rl.parameterizations.base import LAYERS, Units
from wn_rl.parameterizations.weight_norm import WeightNormalization
from wn_rl.sb3 import ReparameterizeThenOptimize, initialize_from_env, policy_kwargs

QUICK: dict[type[BaseAlgorithm], dict[str, Any]] = {
    DQN: {
        "buffer_size": 500,
        "learning_starts": 20,
        "batch_size": 8,
        "target_update_interval": 50,
        "learning_rate": 1e-2,
    },
    PPO: {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "learning_rate": 1e-2},
    A2C: {"n_steps": 8},
}
ALGORITHMS = pytest.mark.parametrize("kind", [DQN, PPO, A2C])
EVERY = pytest.mark.parametrize("param", names())


def build(kind: type[BaseAlgorithm], kwargs: dict[str, Any] | None, env: Any = "CartPole-v1", **changes: Any) -> Any:
    policy = changes.pop("policy", "MlpPolicy")
    settings = QUICK.get(kind, QUICK[DQN]) | {"seed": 1, "device": "cpu"} | changes
    return kind(policy, env, policy_kwargs=kwargs, **settings)  # type: ignore[arg-type]


def small(param: str | Parameterization, **others: Any) -> dict[str, Any]:
    return policy_kwargs(param, **({"net_arch": [8]} | others))


def images(param: str, **others: Any) -> dict[str, Any]:
    return policy_kwargs(param, features_extractor_kwargs={"features_dim": 8}, **others)


def image_env(**changes: Any) -> FakeImageEnv:
    return FakeImageEnv(screen_height=36, screen_width=36, action_dim=3, **changes)


def online(model: Any) -> nn.Module:
    network = getattr(model, "q_net", None) or getattr(model, "quantile_net", None) or model.policy
    assert isinstance(network, nn.Module)
    return network


def layers(network: nn.Module) -> set[str]:
    """The layers of a network by name, a parametrized one's inner parts left out."""
    return {name for name, module in network.named_modules() if isinstance(module, LAYERS)}


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def lengths(network: nn.Module) -> Tensor:
    """The length of v of every unit under ``wn_projected``."""
    found = []
    for layer, _ in treated_layers(network).values():
        v = layer.parametrizations["weight"].original1  # type: ignore[index,union-attr]
        assert isinstance(v, Tensor)
        found.append(Units.of(layer).norm(v.detach()).flatten())
    return torch.cat(found)


# --- every entry through each algorithm -------------------------------------------------------------------------------


@EVERY
def test_dqn_learns_and_copies_everything_to_its_target(param: str) -> None:
    model = build(DQN, small(param))
    before = state(model.q_net)
    assert treated_layers(model.q_net).keys() == treated_layers(model.q_net_target).keys()
    assert not differing(before, state(model.q_net_target))
    differences = {}

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        # The copy is made after the callback of step 150; updates come after steps 148 and 152.
        if model.num_timesteps in (150, 151):
            differences[model.num_timesteps] = differing(state(model.q_net), state(model.q_net_target))
            assert not any(module.training for module in model.q_net_target.modules())
        return True

    model.learn(160, callback=look)
    assert differences[150], "nothing to copy"
    assert differences[151] == set()
    after = state(model.q_net)
    assert all(bool(value.isfinite().all()) for value in after.values())
    changed = differing(before, after)
    for name in treated_layers(model.q_net):
        assert any(entry.startswith(f"{name}.") for entry in changed), name
    buffers = {name for name, _ in model.q_net.named_buffers() if "running_scale" not in name}
    assert buffers <= changed


@EVERY
def test_dqn_saved_and_loaded_goes_on(param: str, tmp_path: Path) -> None:
    model = build(DQN, small(param)).learn(100)
    model.save(tmp_path / "model")
    loaded = DQN.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    assert not differing(state(model.policy), state(loaded.policy))
    observations = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    actions, _ = model.predict(observations, deterministic=True)
    assert len(set(actions.tolist())) == 2  # else any two models agree
    assert np.array_equal(actions, loaded.predict(observations, deterministic=True)[0])
    trained = loaded.policy.optimizer.param_groups[0]["params"]
    assert [id(parameter) for parameter in trained] == [id(parameter) for parameter in loaded.q_net.parameters()]
    assert len(loaded.policy.optimizer.state) == len(trained)
    before = state(loaded.q_net)
    loaded.learn(60, reset_num_timesteps=False)
    changed = differing(before, state(loaded.q_net))
    assert all(any(entry.startswith(f"{name}.") for entry in changed) for name in treated_layers(loaded.q_net))


@EVERY
@pytest.mark.parametrize("kind", [PPO, A2C])
def test_actor_critic_learns_saves_and_loads(kind: type[BaseAlgorithm], param: str, tmp_path: Path) -> None:
    model = build(kind, small(param))
    before = state(model.policy)
    model.learn(64)
    changed = differing(before, state(model.policy))
    for name in treated_layers(model.policy):
        assert any(entry.startswith(f"{name}.") for entry in changed), name
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    assert not differing(state(model.policy), state(loaded.policy))
    loaded.learn(32)
    assert differing(state(model.policy), state(loaded.policy))


@EVERY
def test_qrdqn_learns_copies_saves_and_loads(param: str, tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    model = build(contrib.QRDQN, small(param, n_quantiles=5))
    before = state(model.quantile_net)
    differences = {}

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        differences[model.num_timesteps] = differing(state(model.quantile_net), state(model.quantile_net_target))
        return True

    model.learn(60, callback=look)
    assert differences[50]  # the copy is made after the callback of step 50, updates after steps 48 and 52
    assert differences[51] == set()
    changed = differing(before, state(model.quantile_net))
    for name in treated_layers(model.quantile_net):
        assert any(entry.startswith(f"{name}.") for entry in changed), name
    model.save(tmp_path / "model")
    loaded = contrib.QRDQN.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    assert not differing(state(model.policy), state(loaded.policy))
    assert loaded.policy.optimizer.defaults == model.policy.optimizer.defaults
    loaded.learn(40)


# --- standard is what Stable-Baselines3 does anyway -------------------------------------------------------------------


def algorithm(name: str) -> Any:
    return pytest.importorskip("sb3_contrib").QRDQN if name == "QRDQN" else {"DQN": DQN, "PPO": PPO, "A2C": A2C}[name]


def assert_same_training(kind: Any, plain: dict[str, Any], ours: dict[str, Any], **changes: Any) -> None:
    after, optimizers = [], []
    for kwargs in (plain, ours):  # one after the other: actions are drawn from torch's one generator
        model = build(kind, kwargs, **changes)
        before = state(model.policy)
        after.append(state(model.learn(96).policy))
        assert differing(before, after[-1])
        optimizers.append(model.policy.optimizer)
    assert type(optimizers[0]) is type(optimizers[1])
    assert optimizers[0].defaults == optimizers[1].defaults
    assert not differing(*after)


@pytest.mark.parametrize("name", ["DQN", "PPO", "A2C", "QRDQN"])
def test_standard_changes_nothing(name: str) -> None:
    assert_same_training(algorithm(name), {"net_arch": [8]}, small("standard"))


@pytest.mark.parametrize(
    "changes", [{"use_rms_prop": False}, {"rms_prop_eps": 1e-3}, {"rms_prop_eps": 1e-3, "n_steps": 4}]
)
def test_standard_changes_nothing_for_a2c_with_other_settings(changes: dict[str, Any]) -> None:
    assert_same_training(A2C, {"net_arch": [8]}, small("standard"), **changes)


@ALGORITHMS
@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer_class": torch.optim.Adam},
        {"optimizer_class": torch.optim.Adam, "optimizer_kwargs": {"weight_decay": 0.1}},
        {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}},
    ],
)
def test_standard_changes_nothing_for_another_optimizer(kind: Any, optimizer: dict[str, Any]) -> None:
    plain = {"net_arch": [8], **copy.deepcopy(optimizer)}
    assert_same_training(kind, plain, small("standard", **optimizer))


# --- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected", "eps"),
    [
        ({}, torch.optim.RMSprop, 1e-5),
        ({"rms_prop_eps": 1e-3}, torch.optim.RMSprop, 1e-3),
        ({"use_rms_prop": False}, torch.optim.Adam, 1e-5),
    ],
)
def test_a2c_keeps_its_optimizer_also_after_loading(
    changes: dict[str, Any], expected: type, eps: float, tmp_path: Path
) -> None:
    model = build(A2C, small("wn"), **changes)
    model.save(tmp_path / "model")
    loaded = A2C.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    model.policy.save(tmp_path / "policy")
    policy = ActorCriticPolicy.load(tmp_path / "policy", device="cpu")
    for optimizer in (model.policy.optimizer, loaded.policy.optimizer, policy.optimizer):
        assert type(optimizer) is expected
        assert optimizer.defaults["eps"] == eps
        assert optimizer.defaults.get("alpha", 0.99) == 0.99


def test_an_a2c_of_ones_own_keeps_its_optimizer() -> None:
    class Mine(A2C):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, rms_prop_eps=1e-2, **kwargs)

    optimizer = Mine("MlpPolicy", "CartPole-v1", policy_kwargs=small("wn"), device="cpu").policy.optimizer
    assert type(optimizer) is torch.optim.RMSprop
    assert optimizer.defaults["eps"] == 1e-2


def test_the_same_policy_kwargs_serve_several_models() -> None:
    kwargs = small("wn")
    before = dict(kwargs)
    assert type(build(A2C, kwargs).policy.optimizer) is torch.optim.RMSprop
    model = build(PPO, kwargs)
    assert type(model.policy.optimizer) is torch.optim.Adam
    assert model.policy.optimizer.defaults["eps"] == 1e-5
    assert build(DQN, kwargs).policy.optimizer.defaults["eps"] == 1e-8
    assert kwargs == before
    assert kwargs["optimizer_class"] is before["optimizer_class"]


def test_a_policy_built_beside_a_running_algorithm_is_not_taken_for_its_own() -> None:
    model, kwargs, found = build(A2C, {"net_arch": [8]}), small("wn"), []
    before = dict(model.policy_kwargs)

    def look(_: dict[str, Any], __: dict[str, Any]) -> bool:
        found.append(ActorCriticPolicy(model.observation_space, model.action_space, lambda _: 1e-3, **kwargs))
        return False

    model.learn(8, callback=look)
    assert type(found[0].optimizer) is torch.optim.Adam
    assert model.policy_kwargs == before


@ALGORITHMS
def test_the_optimizer_holds_each_new_parameter_once(kind: Any) -> None:
    model = build(kind, small("wn"))
    held = [id(parameter) for group in model.policy.optimizer.param_groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in online(model).parameters()]
    assert len(held) == len(set(held))


def test_projected_weights_keep_their_length() -> None:
    for kind in (DQN, PPO, A2C):
        model = build(kind, small("wn_projected"))
        before = state(online(model))
        model.learn(96)
        assert differing(before, state(online(model)))
        torch.testing.assert_close(lengths(online(model)), torch.ones_like(lengths(online(model))))


def test_projected_weights_keep_their_length_after_loading(tmp_path: Path) -> None:
    build(DQN, small("wn_projected")).learn(60).save(tmp_path / "model")
    model = DQN.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    before = state(model.q_net)
    model.learn(60)
    assert differing(before, state(model.q_net))
    torch.testing.assert_close(lengths(model.q_net), torch.ones_like(lengths(model.q_net)))


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"param": "wn"}, {"features_extractor.cnn.0", "features_extractor.linear.0", "q_net.0", "q_net.2"}),
        ({"param": "ln"}, {"features_extractor.cnn.0", "features_extractor.linear.0", "q_net.0"}),
        ({"param": "sn"}, {"q_net.0"}),
        (
            {"param": "sn", "include": ["*"]},
            {"features_extractor.cnn.0", "features_extractor.linear.0", "q_net.0", "q_net.2"},
        ),
        ({"param": "wn", "include": [nn.Linear], "exclude": ["q_net.2"]}, {"features_extractor.linear.0", "q_net.0"}),
        ({"param": "ln", "exclude": ["features_extractor.*"]}, {"q_net.0"}),
    ],
)
def test_layers_of_a_q_network(kwargs: dict[str, Any], expected: set[str]) -> None:
    model = build(DQN, images(**kwargs, net_arch=[4]), image_env(), policy="CnnPolicy", buffer_size=10)
    more = {"features_extractor.cnn.2", "features_extractor.cnn.4"}
    expected = expected | (more if "features_extractor.cnn.0" in expected else set())
    assert treated_layers(model.q_net).keys() == treated_layers(model.q_net_target).keys() == expected
    assert expected <= layers(model.q_net)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("param", ["wn", "wn_projected", "sn", "bn"])
def test_layers_of_an_actor_critic(param: str, *, shared: bool, tmp_path: Path) -> None:
    kwargs = images(param, share_features_extractor=shared, net_arch={"pi": [4], "vf": [4]})
    model = build(PPO, kwargs, image_env(), policy="CnnPolicy")
    extractor = {f"features_extractor.{name}" for name in ("cnn.0", "cnn.2", "cnn.4", "linear.0")}
    if not shared:
        extractor |= {name.replace("features", "vf_features", 1) for name in extractor}
    before_heads = {"mlp_extractor.policy_net.0", "mlp_extractor.value_net.0"}
    heads = {"action_net", "value_net"}
    expected = {
        "wn": extractor | before_heads | heads,
        "wn_projected": extractor | before_heads,
        "sn": before_heads,
        "bn": extractor | before_heads | heads,
    }[param]
    assert treated_layers(model.policy).keys() == expected
    assert model.policy.pi_features_extractor is model.policy.features_extractor
    assert (model.policy.vf_features_extractor is model.policy.features_extractor) == shared
    before = state(model.policy)
    model.learn(32)
    changed = differing(before, state(model.policy))
    assert all(any(entry.startswith(f"{name}.") for entry in changed) for name in expected)
    model.save(tmp_path / "model")
    assert not differing(state(model.policy), state(PPO.load(tmp_path / "model", device="cpu").policy))


def test_the_layer_before_each_head_without_hidden_layers() -> None:
    model = build(PPO, images("sn"), image_env(), policy="CnnPolicy")  # net_arch is [] with a NatureCNN
    assert treated_layers(model.policy).keys() == {"features_extractor.linear.0"}


def test_options_and_objects() -> None:
    for kwargs in (small("wn", options={"g": "exp"}), small(WeightNormalization(g="exp"))):
        for _, entry in treated_layers(build(DQN, kwargs).q_net_target).values():
            assert entry == WeightNormalization(g="exp")


def test_weights_are_those_that_stable_baselines_drew() -> None:
    for kind in (DQN, PPO):
        plain, ours = build(kind, {"net_arch": [8]}), build(kind, small("wn"))
        observation = torch.randn(5, 4)
        for one, other in zip(_outputs(plain, observation), _outputs(ours, observation), strict=True):
            torch.testing.assert_close(one, other)


def _outputs(model: Any, observation: Tensor) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(model, DQN):
            return [model.q_net(observation), model.q_net_target(observation)]
        return [
            model.policy.predict_values(observation),
            model.policy.get_distribution(observation).distribution.logits,
        ]


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_policy_saved_alone_is_loaded_with_its_parameterization(tmp_path: Path) -> None:
    model = build(DQN, small("wn")).learn(60)
    model.policy.save(tmp_path / "policy")
    policy = DQNPolicy.load(tmp_path / "policy", device="cpu")
    assert treated_layers(policy.q_net).keys() == {"q_net.0", "q_net.2"}
    assert not differing(state(model.policy), state(policy))


def test_load_accepts_the_same_policy_kwargs_and_refuses_others(tmp_path: Path) -> None:
    for kind, param in ((DQN, "standard"), (A2C, "wn")):
        build(kind, small(param)).save(tmp_path / "model")
        kind.load(tmp_path / "model", policy_kwargs=small(param), device="cpu")
        for other in (small("ln"), small(param, optimizer_class=torch.optim.SGD), small(param, include=[nn.Linear])):
            with pytest.raises(ValueError, match="do not equal the stored policy kwargs"):
                kind.load(tmp_path / "model", policy_kwargs=other, device="cpu")


def test_the_file_refers_to_this_module_and_files_from_before_to_the_former_name() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    build_optimizer = policy_kwargs("wn")["optimizer_class"]
    dumped = cloudpickle.dumps(build_optimizer)
    assert b"wn_rl.sb3" in dumped
    assert agents.sb3.policy_kwargs is policy_kwargs
    assert agents.sb3.initialize_from_env is initialize_from_env
    before = pickle.dumps(build_optimizer, 0).replace(b"wn_rl.sb3", b"agents.sb3")  # protocol 0 names no lengths
    assert b"agents.sb3" in before
    assert pickle.loads(before) == build_optimizer
    assert cloudpickle.loads(dumped) == build_optimizer
    assert isinstance(cloudpickle.loads(dumped), ReparameterizeThenOptimize)
    assert copy.deepcopy(build_optimizer) == build_optimizer


# --- initialization from an environment -------------------------------------------------------------------------------


@contextmanager
def inputs(network: nn.Module) -> Iterator[list[Any]]:
    """What the network is given meanwhile."""
    seen: list[Any] = []
    handle = network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    yield seen
    handle.remove()


def pre_activations(model: Any, observations: Any) -> dict[str, Tensor]:
    """What each treated layer gives in evaluation mode, units on the last axis, else flat."""
    network, found, handles = online(model), {}, []
    model.policy.set_training_mode(False)
    for name, (layer, _) in treated_layers(network).items():

        def keep(_: nn.Module, __: object, t: Tensor, name: str = name) -> None:
            found[name] = (t if t.dim() == 2 else t.movedim(1, -1).flatten(0, -2)).clone()

        handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        network(observations)
    for handle in handles:
        handle.remove()
    return found


def assert_initialized(model: Any, observations: Any, std_of: dict[str, float]) -> None:
    found = pre_activations(model, observations)
    assert found.keys() == treated_layers(online(model)).keys()
    for name, t in found.items():
        std = std_of.get(name, 1.0)
        assert t.mean(0).abs().max() < 1e-2 * std, name
        spread = t.std(0, correction=0)
        # A unit that is constant on these observations has no scale; batch normalization runs on n / (n - 1) · σ².
        constant = spread < 1e-4 * std
        assert constant.float().mean() < 0.3, name
        torch.testing.assert_close(spread[~constant], torch.full_like(spread[~constant], std), rtol=0.02, atol=0)


@EVERY
def test_q_network_initialized_from_its_environment(param: str) -> None:
    model = build(DQN, small(param))
    with inputs(model.q_net) as seen:
        statistics = initialize_from_env(model, 100)
    assert [len(batch) for batch in seen] == [100]
    assert statistics.keys() == treated_layers(model.q_net).keys()
    assert_initialized(model, seen[0], {"q_net.2": 0.1})
    assert not differing(state(model.q_net), state(model.q_net_target))
    assert not any(module.training for module in model.q_net_target.modules())
    before = state(model.q_net)
    model.learn(60)
    assert differing(before, state(model.q_net))


@EVERY
@pytest.mark.parametrize("kind", [PPO, A2C])
def test_actor_critic_initialized_from_its_environment(kind: type[BaseAlgorithm], param: str) -> None:
    model = build(kind, small(param))
    with inputs(model.policy) as seen:
        initialize_from_env(model, 100, output_std=0.5)
    assert len(seen) == 1
    assert_initialized(model, seen[0], {"action_net": 0.01, "value_net": 0.5})
    model.learn(32)


def test_qrdqn_initialized_from_its_environment() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    model = build(contrib.QRDQN, small("wn", n_quantiles=5))
    with inputs(model.quantile_net) as seen:
        initialize_from_env(model, 100, output_std=0.2)
    assert_initialized(model, seen[0], {"quantile_net.2": 0.2})
    assert not differing(state(model.quantile_net), state(model.quantile_net_target))


@pytest.mark.parametrize("shared", [True, False])
def test_image_policy_initialized_from_its_environment(*, shared: bool) -> None:
    kwargs = images("wn", share_features_extractor=shared)
    model = build(PPO, kwargs, image_env(), policy="CnnPolicy")
    with inputs(model.policy) as seen:
        initialize_from_env(model, 24)
    assert seen[0].shape == (24, 1, 36, 36)  # channels first, as in training
    assert seen[0].dtype == torch.uint8
    assert_initialized(model, seen[0], {"action_net": 0.01, "value_net": 0.1})
    model.learn(32)


def test_image_q_network_learns_after_initialization() -> None:
    model = build(DQN, images("wn"), image_env(), policy="CnnPolicy", buffer_size=100)
    with inputs(model.q_net) as seen:
        initialize_from_env(model, 24)
    assert_initialized(model, seen[0], {"q_net.0": 0.1})
    before = state(model.q_net)
    model.learn(40)
    changed = differing(before, state(model.q_net))
    assert all(any(entry.startswith(f"{name}.") for entry in changed) for name in treated_layers(model.q_net))


def test_dict_observations() -> None:
    kwargs = policy_kwargs("wn", net_arch=[8], features_extractor_kwargs={"cnn_output_dim": 8})
    envs = DummyVecEnv([lambda: SimpleMultiObsEnv(random_start=False)] * 4)
    model = build(DQN, kwargs, envs, policy="MultiInputPolicy", buffer_size=50)
    with inputs(model.q_net) as seen:
        initialize_from_env(model, 30)
    assert {len(part) for part in seen[0].values()} == {30}
    assert "features_extractor.extractors.img.cnn.0" in treated_layers(model.q_net)
    means = {name: t.mean(0).abs().max() for name, t in pre_activations(model, seen[0]).items()}
    assert max(means.values()) < 1e-3
    model.learn(40)


def test_several_environments_with_normalized_observations() -> None:
    envs = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 3))
    model = build(PPO, small("wn"), envs)
    with inputs(model.policy) as seen:
        initialize_from_env(model, 50)
    assert len(seen[0]) == 50
    assert envs.training
    assert_initialized(model, seen[0], {"action_net": 0.01, "value_net": 0.1})
    # One set of statistics normalizes all of them, that of as many steps before, and it stands.
    assert 50 < envs.obs_rms.count < 55
    assert np.abs(envs.unnormalize_obs(seen[0][:3].numpy())).max() <= 0.05 + 1e-5  # CartPole starts within ±0.05
    model.learn(96)


def test_continuous_actions_with_state_dependent_exploration() -> None:
    for use_sde in (False, True):
        model = build(PPO, small("wn"), "Pendulum-v1", use_sde=use_sde)
        with inputs(model.policy) as seen:
            initialize_from_env(model, 40)
        assert_initialized(model, seen[0], {"action_net": 0.01, "value_net": 0.1})
        model.learn(32)


@ALGORITHMS
def test_learning_starts_as_it_does_without(kind: Any) -> None:
    plain, initialized = build(kind, small("wn"), seed=5), build(kind, small("wn"), seed=5)
    initialize_from_env(initialized, 30)
    assert initialized._last_obs is None
    first: list[Any] = []
    for model in (plain, initialized):
        seen: list[Any] = []
        model.learn(8, callback=lambda _, __, model=model, seen=seen: not seen.append(model._last_obs.copy()))
        assert len(seen) >= 8
        first.append(seen[0])
    assert np.array_equal(*first)


class Recorded(gym.Wrapper):  # type: ignore[type-arg]
    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.actions: list[int] = []
        self.seeds: list[int | None] = []

    def step(self, action: Any) -> Any:
        self.actions.append(int(action))
        return super().step(action)

    def reset(self, **kwargs: Any) -> Any:
        self.seeds.append(kwargs.get("seed"))
        return super().reset(**kwargs)


def test_the_seed_decides_what_is_seen() -> None:
    def played(seed: int | None, model_seed: int | None = 1) -> tuple[list[int], int | None]:
        env = Recorded()
        initialize_from_env(build(DQN, small("wn"), env, seed=model_seed), 30, seed=seed)
        assert len(env.actions) == 29
        return env.actions, env.seeds[0]

    assert played(3) == played(3)
    assert played(3)[1] == 3
    assert played(None)[1] == 1
    actions = [played(3)[0], played(4)[0], played(None)[0], played(None, model_seed=2)[0]]
    assert len(set(map(tuple, actions))) == 4
    assert played(None) == played(None)


def test_initialization_after_learning_resets_the_environment() -> None:
    env = Recorded()
    model = build(DQN, small("wn"), env).learn(30)
    initialize_from_env(model, 30)
    assert model._last_obs is None
    resets = len(env.seeds)
    model.learn(1, reset_num_timesteps=False)
    assert len(env.seeds) == resets + 1
    assert env.seeds[-1] == 1


class WithDropout(FlattenExtractor):
    def __init__(self, observation_space: gym.Space[Any]) -> None:
        super().__init__(observation_space)
        self.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))  # type: ignore[assignment]


@ALGORITHMS
def test_dropout_rests_meanwhile(kind: Any) -> None:
    model = build(kind, small("wn", features_extractor_class=WithDropout))
    assert model.policy.training
    with inputs(online(model)) as seen:
        initialize_from_env(model, 50)
    assert_initialized(model, seen[0], {"q_net.2": 0.1, "action_net": 0.01, "value_net": 0.1})


def test_random_numbers_of_torch_and_the_action_space_are_left_alone() -> None:
    model = build(PPO, small("wn"))
    copied = copy.deepcopy(model.action_space)
    before = torch.get_rng_state()
    initialize_from_env(model, 30)
    assert torch.equal(before, torch.get_rng_state())
    assert [model.action_space.sample() for _ in range(20)] == [copied.sample() for _ in range(20)]


@ALGORITHMS
def test_modes_are_as_before(kind: Any) -> None:
    model = build(kind, small("bn"))
    for mode in (True, False):
        model.policy.set_training_mode(mode)
        before = {name: module.training for name, module in model.policy.named_modules()}
        initialize_from_env(model, 20)
        assert before == {name: module.training for name, module in model.policy.named_modules()}


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_or_option_is_refused_right_away() -> None:
    with pytest.raises(ValueError, match="unknown parameterization 'nonsense'; there are: standard"):
        policy_kwargs("nonsense")
    with pytest.raises(ValueError, match="no option 'h'"):
        policy_kwargs("wn", options={"h": 1})


def test_a_choice_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no layer matches 'hidden'; there are: q_net\.0, q_net\.2"):
        build(DQN, small("wn", include=["hidden"]))
    with pytest.raises(ValueError, match="'sn' treats no layer of this policy"):
        build(DQN, small("sn", net_arch=[]))


def test_no_policy_is_being_built() -> None:
    with pytest.raises(RuntimeError, match="no Stable-Baselines3 policy is being built"):
        policy_kwargs("wn")["optimizer_class"](nn.Linear(2, 2).parameters(), lr=0.1)


def test_another_kind_of_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="SACPolicy is no policy of DQN, QR-DQN, PPO or A2C"):
        SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=small("wn"), buffer_size=10, device="cpu")


def test_a_recurrent_policy_is_refused() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    with pytest.raises(ValueError, match="builds its optimizer twice"):
        contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", policy_kwargs=small("wn"), device="cpu")


def test_what_cannot_be_initialized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"build it with policy_kwargs=policy_kwargs\(\.\.\.\)"):
        initialize_from_env(build(DQN, {"net_arch": [8]}))
    build(DQN, small("wn")).save(tmp_path / "model")
    with pytest.raises(ValueError, match="no environment"):
        initialize_from_env(DQN.load(tmp_path / "model", device="cpu"))
    with pytest.raises(ValueError, match="at least 2"):
        initialize_from_env(build(DQN, small("wn")), 1)
    with pytest.raises(TypeError, match="no scale to initialize"):
        initialize_from_env(build(DQN, small("wn_projected", options={"g": "none"})), 10)


def test_an_environment_that_shows_one_observation_only_is_refused() -> None:
    class Still(gym.ObservationWrapper):  # type: ignore[type-arg]
        def observation(self, observation: Any) -> Any:
            return np.ones_like(observation)

    model = build(DQN, small("wn"), Still(gym.make("CartPole-v1")))
    before = state(model.q_net)
    with pytest.raises(ValueError, match="one and the same observation"):
        initialize_from_env(model, 20)
    assert not differing(before, state(model.q_net))
    model.learn(30)


def test_without_stable_baselines_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wn_rl, "sb3", wn_rl.sb3)  # to be put back
    monkeypatch.delitem(sys.modules, "wn_rl.sb3")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("wn_rl.sb3")
    assert str(caught.value) == "wn_rl.sb3 needs Stable-Baselines3: pip install stable-baselines3"
    assert caught.value.__suppress_context__


def test_sb3_contrib_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wn_rl, "sb3", wn_rl.sb3)  # to be put back
    monkeypatch.delitem(sys.modules, "wn_rl.sb3")
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    assert importlib.import_module("wn_rl.sb3").policy_kwargs("wn")
