"""Stable-Baselines3 files: the network of a real one, and files that are not what they seem."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.dqn.policies import CnnPolicy
from torch import nn

import evaluate
from wn_rl import cli, fold, project, reparameterize
from wn_rl.atari.env import make_atari
from wn_rl.errors import CheckpointError, UsageError
from wn_rl.evaluation import policies as trained
from wn_rl.evaluation import scoring
from wn_rl.evaluation.scoring import How
from wn_rl.parameterizations import names
from wn_rl.sb3 import policy_kwargs
from wn_rl.sb3 import zip_file as sb3_zip


class Pixels(gymnasium.Env[Any, Any]):
    """Random pixels; reward for one action."""

    def __init__(
        self,
        shape: tuple[int, ...] = (4, 84, 84),
        actions: int = 4,
        *,
        start: int = 0,
        high: int = 255,
        dtype: Any = np.uint8,
    ) -> None:
        self.observation_space = gymnasium.spaces.Box(0, high, shape, dtype)
        self.action_space = gymnasium.spaces.Discrete(actions, start=start)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(action == 1), bool(self.np_random.random() < 0.1), False, {}


def learned(path: Path, *, shape: tuple[int, ...] = (4, 84, 84), actions: int = 4, **kwargs: Any) -> DQN:
    """Train a DQN of Stable-Baselines3 for a moment and save it."""
    kwargs = {"features_extractor_kwargs": {"features_dim": 16}, **kwargs}
    model = DQN(
        "CnnPolicy", Pixels(shape, actions), learning_starts=8, buffer_size=32, batch_size=8, seed=1,
        policy_kwargs=kwargs, device="cpu",
    )  # fmt: skip
    model.learn(24)
    model.save(path)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sb3") / "dqn.zip"
    learned(path)
    return path


def frames(count: int = 12) -> np.ndarray:
    env = make_atari("Breakout", 1, seed=5)
    env.reset()
    rng = np.random.default_rng(0)
    observations = [env.step(rng.integers(4, size=1))[0] for _ in range(count)]
    env.close()
    return np.concatenate(observations)


@pytest.mark.parametrize("param", ["standard", "wn", "bn"])
def test_a_trained_sb3_network_is_the_same_network_here(param: str, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    features = {"features_extractor_kwargs": {"features_dim": 16}}
    model = learned(path, **(features if param == "standard" else policy_kwargs(param, **features)))
    model.policy.set_training_mode(False)  # as predict() does
    network = sb3_zip.q_network(path, param)
    observations = frames()
    with torch.no_grad():
        expected = model.q_net(torch.from_numpy(observations))
        torch.testing.assert_close(network(torch.from_numpy(observations)), expected, rtol=1e-4, atol=1e-5)
    actions, _ = model.predict(observations, deterministic=True)
    assert network(torch.from_numpy(observations)).argmax(1).tolist() == actions.tolist()


def test_it_is_scored_on_its_game(file: Path) -> None:
    short = {"episodes": 2, "max_frames_per_episode": 80}
    score = scoring.score(file, How("nature", short, game="breakout"))
    assert (score.trained.kind, score.trained.game, score.trained.param) == ("sb3", "Breakout", "standard")
    assert [episode.length for episode in score.result.episodes] == [20, 20]
    with pytest.raises(UsageError, match="add --game"):
        scoring.score(file, How("nature", short))
    with pytest.raises(UsageError, match="add --protocol"):
        scoring.score(file, How("training", short, game="breakout"))
    with pytest.raises(CheckpointError, match=r"4 actions, Pong has 6 \(18 with"):
        scoring.score(file, How("nature", short, game="pong"))


def by_hand(path: Path) -> None:
    """Save a model that was reparameterized after it was built, which its file does not tell."""
    model = built({"features_extractor_kwargs": {"features_dim": 16}})
    reparameterize(model.q_net, "wn")
    reparameterize(model.q_net_target, "wn")
    model.save(path)


def test_another_algorithm_policy_or_observation_is_refused_by_name(tmp_path: Path) -> None:
    cases: list[tuple[str, Callable[[Path], object]]] = [
        ("is no DQN: its policy has no q_net", lambda path: A2C("CnnPolicy", Pixels(), device="cpu").save(path)),
        ("no DQN with CnnPolicy", lambda path: DQN("MlpPolicy", Pixels((5,)), buffer_size=1, device="cpu").save(path)),
        ("observations of 1 channels", lambda path: learned(path, shape=(1, 84, 84))),
        ("observations of another size", lambda path: learned(path, shape=(4, 64, 64))),
        (r"its net_arch is \[8\], not \[\]", lambda path: learned(path, net_arch=[8])),
        ("carry a parameterization", lambda path: by_hand(path)),
    ]
    for index, (message, make) in enumerate(cases):
        path = tmp_path / f"{index}.zip"
        make(path)
        with pytest.raises(CheckpointError, match=message):
            sb3_zip.q_network(path)
    with pytest.raises(CheckpointError, match="does not fit a DQN with CnnPolicy and --param ln"):
        sb3_zip.q_network(tmp_path / "5.zip", "ln")
    with pytest.raises(UsageError, match="unknown parameterization 'wm'"):
        trained.check_param("wm", {})


# --- what the file says of its network ---------------------------------------------------------------------------

SMALL = {"features_extractor_kwargs": {"features_dim": 16}}
STATES = torch.randint(256, (64, 4, 84, 84), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Elu(NatureCNN):
    """The same layers with another nonlinearity."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cnn[1] = self.cnn[3] = self.cnn[5] = self.linear[1] = nn.ELU()


class Doubled(CnnPolicy):
    """A policy of one's own."""


def built(kwargs: dict[str, Any], policy: Any = "CnnPolicy", env: Any = None) -> Any:
    """A DQN whose parameters and running statistics are far from their initial values."""
    model = DQN(policy, env or Pixels(), buffer_size=1, seed=1, policy_kwargs=copy.deepcopy(kwargs), device="cpu")
    torch.manual_seed(2)
    with torch.no_grad():
        for name, value in model.q_net.state_dict().items():
            if "running_u" not in name and "running_v." not in name and value.is_floating_point():
                value.mul_(torch.rand_like(value) + 0.5)
    project(model.q_net)
    model.policy.set_training_mode(False)
    return model


def mlp_with_nature_cnn() -> Any:
    return built({**SMALL, "features_extractor_class": NatureCNN, "net_arch": []}, "MlpPolicy")


def everywhere(param: str, **others: Any) -> dict[str, Any]:
    return policy_kwargs(param, include=["*"], **{**SMALL, **others})


def folded() -> Any:
    model = built(policy_kwargs("wn", **SMALL))
    fold(model.policy)
    return model


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: built({}), "standard"),
        (lambda: built({**SMALL, "net_arch": [], "features_extractor_class": NatureCNN}), "standard"),
        (lambda: built({**SMALL, "activation_fn": nn.ELU}), "standard"),  # behind no layer, so it is used nowhere
        (lambda: built({**SMALL, "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}),
         "standard"),
        (lambda: built(SMALL, env=Pixels((84, 84, 4))), "standard"),
        (mlp_with_nature_cnn, "standard"),
        (folded, "standard"),
        (lambda: built({"normalize_images": False}), "standard"),
        (lambda: built({**SMALL, "normalize_images": False}), "standard"),
        (lambda: built(policy_kwargs("wn", options={"g": "exp"}, **SMALL)), "wn"),
        *[
            (lambda param=param, normalize=normalize: built(everywhere(param, normalize_images=normalize)), param)
            for param in names()
            for normalize in (True, False)
        ],
    ],
)  # fmt: skip
def test_every_network_that_is_read_has_the_q_values_of_stable_baselines(
    make: Callable[[], Any], param: str, tmp_path: Path
) -> None:
    model = make()
    model.save(tmp_path / "model.zip")
    network = sb3_zip.q_network(tmp_path / "model.zip")  # the file says which parameterization it is
    assert network.spec.parameterization == param
    with torch.no_grad():
        expected = model.q_net(STATES)
        for reader in (network, trained.copy_network(network)):
            torch.testing.assert_close(reader(STATES), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def saved_without(name: str) -> Callable[[Path], object]:
    return lambda path: built(SMALL).save(path, exclude=[name])


REFUSED: list[tuple[str, Callable[[Path], object]]] = [
    (
        r"its features_extractor_class is [\w.]*\bElu, not NatureCNN",
        lambda path: built({"features_extractor_class": Elu, "net_arch": []}).save(path),
    ),
    (
        r"is no DQN with CnnPolicy: its policy is a class of .*test_sb3_zip",
        lambda path: built(SMALL, Doubled).save(path),
    ),
    (
        "observations of type float32, whose scale is not known",
        lambda path: built({**SMALL, "normalize_images": False}, env=Pixels(high=1, dtype=np.float32)).save(path),
    ),
    (
        "observations of type float32, whose scale is not known",
        lambda path: built({**SMALL, "normalize_images": False}, env=VecNormalize(DummyVecEnv([Pixels]))).save(path),
    ),
    (
        "say normalized_image beside normalize_images",
        lambda path: built({"features_extractor_kwargs": {"normalized_image": True}}).save(path),
    ),
    (
        "is no DQN with CnnPolicy: its policy is MultiInputPolicy",
        lambda path: built({}, "MultiInputPolicy", SimpleMultiObsEnv()).save(path),
    ),
    ("actions are counted from 1", lambda path: built(SMALL, env=Pixels(start=1)).save(path)),
    ("normalize_images is 1, neither true nor false", lambda path: built({**SMALL, "normalize_images": 1}).save(path)),
    (
        "is no DQN: its policy has no q_net",
        lambda path: PPO("CnnPolicy", Pixels(), n_steps=2, batch_size=2, device="cpu").save(path),
    ),
    (
        "is no DQN: its policy has no q_net",
        lambda path: pytest.importorskip("sb3_contrib").QRDQN("CnnPolicy", Pixels(), buffer_size=1).save(path),
    ),
    ("it does not say its policy_kwargs", saved_without("policy_kwargs")),
    ("it does not say its observation_space", saved_without("observation_space")),
    ("it does not say its policy_class", saved_without("policy_class")),
]


@pytest.mark.parametrize(("message", "make"), REFUSED, ids=[message[:40] for message, _ in REFUSED])
def test_every_other_network_is_refused_by_name(message: str, make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "model.zip")
    with pytest.raises(CheckpointError, match=message):
        sb3_zip.q_network(tmp_path / "model.zip")


def described(file: Path, out: Path, data: bytes | None) -> Path:
    """Copy an SB3 file with another ``data``, or without."""
    with zipfile.ZipFile(file) as outer:
        members = {name: outer.read(name) for name in outer.namelist() if name != "data"}
    with zipfile.ZipFile(out, "w") as copied:
        for name, content in (members | ({} if data is None else {"data": data})).items():
            copied.writestr(name, content)
    return out


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("policy_kwargs", {"dueling": True}, "its policy_kwargs hold 'dueling', which this does not know"),
        ("policy_kwargs", {":serialized:": "", ":type:": "<class 'a.B'>"}, "its policy_kwargs are a a.B"),
        ("policy_kwargs", {"net_arch": "[tensor(8)]"}, r"its net_arch is \[tensor\(8\)\], not"),
        ("policy_kwargs", {"features_extractor_kwargs": {"depth": 2}}, "features_extractor_kwargs hold 'depth'"),
        ("policy_kwargs", {"features_extractor_kwargs": "{'a': <b>}"}, "features_extractor_kwargs are {'a': <b>}"),
        ("policy_kwargs", {"features_extractor_kwargs": {"features_dim": 17}}, "weights are not of the network"),
        (
            "policy_kwargs",
            {"features_extractor_kwargs": {"features_dim": "x"}},
            "features_dim is x, which is no number",
        ),
        ("policy_kwargs", {"normalize_images": "False"}, "normalize_images is False, neither true nor false"),
        ("action_space", {"n": "5"}, "weights are not of the network that its data describe"),
        ("action_space", {"n": "many"}, "its action_space has many actions"),
        ("action_space", {":type:": "<class 'gymnasium.spaces.box.Box'>"}, "not Discrete"),
        ("observation_space", {"_shape": None}, "observations of shape null"),
        ("observation_space", {"dtype": None}, "observations of type null"),
        ("observation_space", {":type:": "<class 'a.B'>"}, "its observation_space is a a.B"),
        ("policy_class", {"__init__": None}, "its policy is a class of stable_baselines3"),
    ],
)
def test_what_the_file_says_is_not_ignored(
    part: str, change: dict[str, Any], message: str, file: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(file) as archive:
        data = json.loads(archive.read("data"))
    data[part] |= change
    with pytest.raises(CheckpointError, match=message):
        sb3_zip.q_network(described(file, tmp_path / "changed.zip", json.dumps(data).encode()))


def test_a_file_that_says_nothing_readable_is_refused(file: Path, tmp_path: Path) -> None:
    for data in (b"[]", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(CheckpointError, match="its 'data' is not what Stable-Baselines3 writes"):
            sb3_zip.q_network(described(file, tmp_path / "changed.zip", data))
    with pytest.raises(CheckpointError, match="it holds no data"):
        sb3_zip.q_network(described(file, tmp_path / "changed.zip", None))


def test_the_parameterization_that_the_file_names_is_the_one_used(tmp_path: Path) -> None:
    path = tmp_path / "exp.zip"
    built(policy_kwargs("wn", options={"g": "exp"}, **SMALL)).save(path)
    assert sb3_zip.q_network(path, "wn", {"g": "exp"}).spec.options == {"g": "exp"}
    with pytest.raises(CheckpointError, match=r"was trained with wn \(g=exp\), not with wn \(g=direct\)"):
        sb3_zip.q_network(path, "wn")  # the same names and shapes, other weights
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    # As files said it that were written before it was JSON.
    data["policy_kwargs"]["optimizer_class"] = (
        "ReparameterizeThenOptimize(parameterization=WeightNormalization(g='exp'), include=None, exclude=(), "
        "inner=None, settled=(<class 'torch.optim.adam.Adam'>, {}))"
    )
    before = described(path, tmp_path / "before.zip", json.dumps(data).encode())
    assert sb3_zip.q_network(before).spec.options == {"g": "exp"}
    for unknown in ("ReparameterizeThenOptimize(parameterization=Mine(a=1), include=", '{"parameterization": "mine"}'):
        data["policy_kwargs"]["optimizer_class"] = unknown
        other = described(path, tmp_path / "other.zip", json.dumps(data).encode())
        with pytest.raises(CheckpointError, match="add --param"):
            sb3_zip.q_network(other)
        assert sb3_zip.q_network(other, "wn", {"g": "exp"}).spec.options == {"g": "exp"}


def test_evaluate_says_in_one_line_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built({"features_extractor_class": Elu, "net_arch": []}).save(tmp_path / "elu.zip")
    arguments = [str(tmp_path / "elu.zip"), "--game", "Breakout", "--protocol", "nature"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(evaluate.main)
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (1, "")
    assert said.err.count("\n") == 1
    assert "Elu, not NatureCNN" in said.err


# --- hostile and damaged files -----------------------------------------------------------------------------------


def rewritten(file: Path, out: Path, change: Callable[[str, bytes], bytes], **options: Any) -> Path:
    """Copy an SB3 file with the members of its policy.pth changed."""
    with zipfile.ZipFile(file) as outer, zipfile.ZipFile(out, "w") as copied:
        for name in outer.namelist():
            data = outer.read(name)
            if name == "policy.pth":
                stream = io.BytesIO()
                with zipfile.ZipFile(io.BytesIO(data)) as inner, zipfile.ZipFile(stream, "w", **options) as changed:
                    for member in inner.namelist():
                        changed.writestr(member, change(member, inner.read(member)))
                data = stream.getvalue()
            copied.writestr(name, data)
    return out


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_pickle_in_the_file_is_ever_executed(file: Path, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    for protocol in range(2, 6):
        evil = pickle.dumps({"q_net.q_net.0.bias": Touch(proof)}, protocol)
        path = rewritten(file, tmp_path / "evil.zip", lambda n, data, evil=evil: evil if "data.pkl" in n else data)
        with pytest.raises(CheckpointError, match=r"policy\.pth is damaged: it"):
            sb3_zip.q_network(path)
    evil = pickle.dumps(Touch(proof))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as copied, zipfile.ZipFile(file) as outer:
        data = json.loads(outer.read("data"))
        for value in data.values():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = base64.b64encode(evil).decode()
        copied.writestr("data", json.dumps(data))
        copied.writestr("pytorch_variables.pth", evil)
        copied.writestr("policy.pth", outer.read("policy.pth"))
    assert sb3_zip.q_network(tmp_path / "data.zip").spec.num_actions == 4  # these parts are not looked at
    with pytest.raises(CheckpointError, match="its 'data' is not what Stable-Baselines3 writes"):
        sb3_zip.q_network(described(file, tmp_path / "data.zip", evil))
    assert not proof.exists()


def test_sizes_are_checked_before_anything_is_allocated(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("policy.pth", b"\0" * 10_000_000)
    cases = {
        "is compressed": tmp_path / "bomb.zip",
        "data.pkl would take": rewritten(
            file, tmp_path / "pickle.zip", lambda name, data: data + b"\0" * 2**20 if "data.pkl" in name else data
        ),
        "data/0 is compressed": rewritten(
            file, tmp_path / "inner.zip", lambda _, data: data, compression=zipfile.ZIP_DEFLATED
        ),
        "has 0 bytes, not those of": rewritten(
            file, tmp_path / "short.zip", lambda name, data: b"" if name.endswith("/data/3") else data
        ),
    }
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match="compressed" if "compressed" in message else message):
            sb3_zip.q_network(path)
    monkeypatch.setattr(sb3_zip, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"policy.pth would take [0-9,]+ bytes, more than 1,000"):
        sb3_zip.q_network(file)


def test_what_is_no_such_file_is_said_so(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.zip"
    text.write_text("not a zip file")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(file.read_bytes()[:-1000])
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme", "hello")
    flipped = tmp_path / "flipped.zip"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    for path, message in (
        (text, "no zip file"), (cut, "no zip file"), (other, "holds no policy.pth"), (flipped, "damaged"),
        (tmp_path / "nowhere.zip", "cannot read"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            sb3_zip.read_state_dict(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_change_of_the_pickle_gets_past(data: st.DataObject) -> None:
    """Any bytes are read as tensors or refused; nothing else comes out, whatever they say."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}, stream)
    with zipfile.ZipFile(stream) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    changed = bytearray(members[name])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    members[name] = bytes(changed)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    try:
        with zipfile.ZipFile(out) as archive:
            state = sb3_zip._tensors(archive)
    except sb3_zip._DamagedError:
        return
    assert all(value.numel() <= 6 for value in state.values())
