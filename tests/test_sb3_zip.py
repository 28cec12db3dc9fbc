"""Stable-Baselines3 files: the network of a real one, and files that are not what they seem."""

from __future__ import annotations

import io
import os
import pickle
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
from stable_baselines3 import A2C, DQN

from wn_rl import sb3_zip, scoring, trained
from wn_rl.atari.env import make_atari
from wn_rl.errors import CheckpointError, UsageError
from wn_rl.sb3 import policy_kwargs
from wn_rl.scoring import How


class Pixels(gymnasium.Env[Any, Any]):
    """Random pixels; reward for one action."""

    def __init__(self, shape: tuple[int, ...] = (4, 84, 84), actions: int = 4) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(actions)

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


def test_another_algorithm_policy_or_observation_is_refused_by_name(tmp_path: Path) -> None:
    cases: list[tuple[str, Callable[[Path], object]]] = [
        ("is no DQN: its policy has no q_net", lambda path: A2C("CnnPolicy", Pixels(), device="cpu").save(path)),
        ("no DQN with CnnPolicy", lambda path: DQN("MlpPolicy", Pixels((5,)), buffer_size=1, device="cpu").save(path)),
        ("observations of 1 channels", lambda path: learned(path, shape=(1, 84, 84))),
        ("observations of another size", lambda path: learned(path, shape=(4, 64, 64))),
        ("it has q_net.q_net.2.weight", lambda path: learned(path, net_arch=[8])),
        ("carry a parameterization", lambda path: learned(path, **policy_kwargs("wn"))),
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


# --- hostile and damaged files -----------------------------------------------------------------------------------


def rewritten(file: Path, out: Path, change: Callable[[str, bytes], bytes], **options: Any) -> Path:
    """Copy an SB3 file with the members of its policy.pth changed."""
    with zipfile.ZipFile(file) as outer, zipfile.ZipFile(out, "w") as copy:
        for name in outer.namelist():
            data = outer.read(name)
            if name == "policy.pth":
                stream = io.BytesIO()
                with zipfile.ZipFile(io.BytesIO(data)) as inner, zipfile.ZipFile(stream, "w", **options) as changed:
                    for member in inner.namelist():
                        changed.writestr(member, change(member, inner.read(member)))
                data = stream.getvalue()
            copy.writestr(name, data)
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
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as copy, zipfile.ZipFile(file) as outer:
        copy.writestr("data", pickle.dumps(Touch(proof)))
        copy.writestr("pytorch_variables.pth", pickle.dumps(Touch(proof)))
        copy.writestr("policy.pth", outer.read("policy.pth"))
    assert sb3_zip.q_network(tmp_path / "data.zip").spec.num_actions == 4  # these parts are not looked at
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
