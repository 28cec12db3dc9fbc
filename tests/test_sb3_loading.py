"""Plain weights load into a Stable-Baselines3 model with a parameterization, in every way that models are loaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("stable_baselines3")

from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.envs import FakeImageEnv

from wn_rl import fold
from wn_rl.parameterizations import get, names
from wn_rl.parameterizations.api import treated_layers
from wn_rl.parameterizations.weight_norm import direction_and_scale
from wn_rl.sb3 import initialize_from_env, policy_kwargs

SETTINGS: dict[Any, dict[str, Any]] = {
    DQN: {"buffer_size": 200, "learning_starts": 10, "batch_size": 8},
    PPO: {"n_steps": 16, "batch_size": 8, "n_epochs": 1},
    A2C: {"n_steps": 8},
}
ANEW = "plain weights were loaded into a parameterized policy: its optimizer starts without moments"
FOLDABLE = [name for name in names() if get(name).foldable]
OBSERVATIONS = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32))


def build(kind: Any, kwargs: dict[str, Any] | None = None, env: Any = "CartPole-v1", **changes: Any) -> Any:
    policy = "MlpPolicy" if env == "CartPole-v1" else "CnnPolicy"
    settings = SETTINGS.get(kind, SETTINGS[DQN]) | {"seed": 1, "device": "cpu", "policy_kwargs": kwargs} | changes
    return kind(policy, env, **settings)


def outputs(model: Any, observations: Tensor = OBSERVATIONS) -> list[Tensor]:
    """What the model's networks give: Q-values or quantiles, of the target network too, or logits and values."""
    model.policy.set_training_mode(False)
    with torch.no_grad():
        if not hasattr(model.policy, "action_net"):
            name = "q_net" if hasattr(model, "q_net") else "quantile_net"
            return [getattr(model, name)(observations), getattr(model, f"{name}_target")(observations)]
        return [
            model.policy.get_distribution(observations).distribution.logits,
            model.policy.predict_values(observations),
        ]


def assert_same(one: Any, other: Any, observations: Tensor = OBSERVATIONS) -> None:
    for found, expected in zip(outputs(one, observations), outputs(other, observations), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def algorithm(name: str) -> Any:
    return pytest.importorskip("sb3_contrib").QRDQN if name == "QRDQN" else {"DQN": DQN, "PPO": PPO, "A2C": A2C}[name]


@pytest.mark.parametrize("name", ["DQN", "PPO", "A2C", "QRDQN"])
def test_a_plain_file_loads_into_weight_normalization(name: str, tmp_path: Path) -> None:
    kind, path = algorithm(name), tmp_path / "plain.zip"
    plain = build(kind, {"net_arch": [8]}).learn(40)
    plain.save(path)
    env = gym.make("CartPole-v1")
    ours = policy_kwargs("wn", net_arch=[8])
    built = build(kind, policy_kwargs("wn", net_arch=[8]), seed=2)
    with pytest.warns(UserWarning, match=ANEW):
        built.set_parameters(path, device="cpu")
    by_dictionary = build(kind, policy_kwargs("wn", net_arch=[8]), seed=2)
    with pytest.warns(UserWarning, match=ANEW):
        by_dictionary.set_parameters(plain.get_parameters())
    with pytest.warns(UserWarning, match=ANEW):
        loaded = kind.load(path, env=env, device="cpu", policy_kwargs=ours)
    with pytest.warns(UserWarning, match=ANEW):
        custom = kind.load(path, env=env, device="cpu", custom_objects={"policy_kwargs": ours})
    weights = plain.policy.state_dict()
    for model in (built, by_dictionary, loaded, custom):
        assert_same(model, plain)
        treated = treated_layers(model.policy)
        assert {f"{layer}.weight" for layer in treated} == {name for name in weights if name.endswith("weight")}
        for layer, (module, _) in treated.items():
            v, g = direction_and_scale(module)
            assert torch.equal(v, weights[f"{layer}.weight"])  # v = w and g = ‖w‖, the paper's w = g · v / ‖v‖
            torch.testing.assert_close(g, v.norm(dim=1, keepdim=True))
        held = [id(parameter) for group in model.policy.optimizer.param_groups for parameter in group["params"]]
        assert set(held) <= {id(parameter) for parameter in model.policy.parameters()}
        assert not model.policy.optimizer.state
    assert loaded.policy_kwargs.keys() == ours.keys()
    before = outputs(loaded)
    loaded.learn(40, reset_num_timesteps=False)
    assert not torch.equal(before[0], outputs(loaded)[0])
    loaded.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = kind.load(path, device="cpu")
    assert_same(again, loaded)
    assert again.policy.optimizer.state_dict()["state"].keys() == loaded.policy.optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize(
    ("kind", "kwargs", "changes", "expected", "settings"),
    [
        (A2C, {}, {"rms_prop_eps": 1e-3}, torch.optim.RMSprop, {"eps": 1e-3, "alpha": 0.99}),
        (A2C, {}, {"use_rms_prop": False}, torch.optim.Adam, {"eps": 1e-5}),
        (PPO, {}, {}, torch.optim.Adam, {"eps": 1e-5}),
        (DQN, {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}, {}, torch.optim.SGD,
         {"momentum": 0.5}),
        (DQN, {"optimizer_kwargs": {"eps": 0.5}}, {}, torch.optim.Adam, {"eps": 0.5}),
    ],
)  # fmt: skip
def test_the_optimizer_of_a_plain_file_goes_on(
    kind: Any, kwargs: dict[str, Any], changes: dict[str, Any], expected: type, settings: dict[str, float],
    tmp_path: Path,
) -> None:  # fmt: skip
    build(kind, {"net_arch": [8], **copy.deepcopy(kwargs)}, **changes).save(tmp_path / "plain")
    with pytest.warns(UserWarning, match=ANEW):
        loaded = kind.load(tmp_path / "plain", device="cpu", policy_kwargs=policy_kwargs("wn", net_arch=[8]))
    for _ in range(2):
        assert type(loaded.policy.optimizer) is expected
        assert {name: loaded.policy.optimizer.defaults[name] for name in settings} == settings
        loaded.save(tmp_path / "ours")
        loaded = kind.load(tmp_path / "ours", device="cpu")


def test_another_optimizer_may_be_asked_for(tmp_path: Path) -> None:
    build(A2C, {"net_arch": [8]}).save(tmp_path / "plain")
    ours = policy_kwargs("wn", net_arch=[8], optimizer_class=torch.optim.SGD, optimizer_kwargs={"momentum": 0.5})
    with pytest.warns(UserWarning, match=ANEW):
        loaded = A2C.load(tmp_path / "plain", device="cpu", policy_kwargs=ours)
    assert type(loaded.policy.optimizer) is torch.optim.SGD
    assert loaded.policy.optimizer.defaults["momentum"] == 0.5


def test_other_policy_kwargs_than_the_files_are_refused_as_ever(tmp_path: Path) -> None:
    build(DQN, {"net_arch": [8]}).save(tmp_path / "plain")
    for other in (policy_kwargs("wn"), policy_kwargs("wn", net_arch=[9])):
        with pytest.raises(ValueError, match="do not equal the stored policy kwargs"):
            DQN.load(tmp_path / "plain", device="cpu", policy_kwargs=other)
    ours = policy_kwargs("wn", net_arch=[8])
    assert ours == policy_kwargs("wn", net_arch=[8])
    assert ours != policy_kwargs("sn", net_arch=[8])
    assert ours != 1


@pytest.mark.parametrize("param", names())
def test_a_plain_file_gives_the_same_q_values_or_is_refused_by_name(param: str, tmp_path: Path) -> None:
    plain = build(DQN, {"net_arch": [8]}).learn(30)
    plain.save(tmp_path / "plain")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = build(DQN, policy_kwargs(param, net_arch=[8]), seed=None)
    torch.set_rng_state(before)
    kept = {name: value.clone() for name, value in model.policy.state_dict().items()}
    if not get(param).foldable:
        message = rf"layer 'q_net\.q_net\.0': plain weights do not load into '{param}'"
        with pytest.raises(RuntimeError, match=message) as caught:
            model.set_parameters(tmp_path / "plain", device="cpu")
        assert "key(s)" not in str(caught.value)
        after = model.policy.state_dict()
        assert all(torch.equal(after[name], kept[name]) for name in after if ".q_net.0." in name)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ANEW)
        model.set_parameters(tmp_path / "plain", device="cpu")
    assert_same(model, plain)
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing
    assert (len(model.policy.optimizer.state) > 0) == (param == "standard")  # plain moments fit plain weights alone


@pytest.mark.parametrize("param", [name for name in FOLDABLE if name != "standard"])
def test_a_model_saved_after_folding_loads_again(param: str, tmp_path: Path) -> None:
    model = build(DQN, policy_kwargs(param, net_arch=[8]))
    initialize_from_env(model, 50)  # sn has a scale then, and the first layer's is not 1
    model.learn(30)
    fold(model.policy)
    model.save(tmp_path / "folded")
    with pytest.warns(UserWarning, match=ANEW):
        loaded = DQN.load(tmp_path / "folded", env=gym.make("CartPole-v1"), device="cpu")
    assert treated_layers(loaded.q_net).keys() >= {"q_net.0"}
    assert_same(loaded, model)
    with pytest.raises(RuntimeError, match="the policy was folded, and its optimizer holds the parameters from before"):
        model.learn(20)  # else nothing but biases would be trained
    folded = model.policy.state_dict()
    if param == "wn":
        for name, (layer, _) in treated_layers(loaded.policy).items():
            torch.testing.assert_close(layer.weight, folded[f"{name}.weight"], rtol=1e-6, atol=0)
    before = outputs(loaded)
    loaded.learn(20)
    assert not torch.equal(before[0], outputs(loaded)[0])
    fold(loaded.policy)
    loaded.set_parameters({"policy": folded}, exact_match=False)  # a folded policy takes plain weights as they are
    assert_same(loaded, model)


@pytest.mark.parametrize("kind", [PPO, A2C])
def test_an_actor_critic_saved_after_folding_loads_again(kind: Any, tmp_path: Path) -> None:
    model = build(kind, policy_kwargs("wn", net_arch=[8])).learn(16)
    fold(model.policy)
    model.save(tmp_path / "folded")
    with pytest.warns(UserWarning, match=ANEW):
        assert_same(kind.load(tmp_path / "folded", device="cpu"), model)


def test_convolutions_and_shared_extractors_load_too(tmp_path: Path) -> None:
    env = FakeImageEnv(screen_height=36, screen_width=36, action_dim=3)
    small = {"features_extractor_kwargs": {"features_dim": 8}}
    observations = torch.randint(256, (64, 1, 36, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for kind, changes in ((DQN, {"buffer_size": 10}), (PPO, {})):
        plain = build(kind, copy.deepcopy(small), env, **changes)
        plain.save(tmp_path / "plain")
        with pytest.warns(UserWarning, match=ANEW):
            loaded = kind.load(tmp_path / "plain", device="cpu", policy_kwargs=policy_kwargs("wn", **small))
        assert "features_extractor.cnn.0" in treated_layers(getattr(loaded, "q_net", loaded.policy))
        assert_same(loaded, plain, observations)


def test_layers_that_are_left_alone_keep_their_plain_weights(tmp_path: Path) -> None:
    plain = build(DQN, {"net_arch": [8]})
    model = build(DQN, policy_kwargs("wn", include=["q_net.0"], net_arch=[8]), seed=2)
    with pytest.warns(UserWarning, match=ANEW):
        model.set_parameters(plain.get_parameters())
    assert treated_layers(model.q_net).keys() == {"q_net.0"}
    assert_same(model, plain)


def test_weights_that_do_not_fit_are_refused_in_one_line() -> None:
    model = build(DQN, policy_kwargs("wn", net_arch=[8]))
    wide = build(DQN, {"net_arch": [9]})
    with pytest.raises(RuntimeError, match=r"layer 'q_net\.q_net\.0': its \w+ is of shape \(9.*\), not \(8.*\)"):
        model.set_parameters(wide.get_parameters())
    zero = build(DQN, {"net_arch": [8]})
    nn.init.zeros_(zero.q_net.q_net[0].weight[3])
    with pytest.raises(RuntimeError, match=r"layer 'q_net\.q_net\.0': a unit of its weight has only zero weights"):
        model.set_parameters(zero.get_parameters())


def test_a_copy_of_a_policy_loads_plain_weights_into_itself() -> None:
    plain = build(DQN, {"net_arch": [8]})
    model = build(DQN, policy_kwargs("wn", net_arch=[8]), seed=2)
    own = {name: value.clone() for name, value in model.policy.state_dict().items()}
    policy = copy.deepcopy(model.policy)
    policy.load_state_dict(plain.policy.state_dict())
    torch.testing.assert_close(policy.q_net(OBSERVATIONS), plain.q_net(OBSERVATIONS), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, own[name]) for name, value in model.policy.state_dict().items())
