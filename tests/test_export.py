"""Exported networks play the same actions as the checkpoint, in the libraries that they are for."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from wn_rl.atari.env import make_atari
from wn_rl.errors import UsageError, WnRlError
from wn_rl.evaluation import export
from wn_rl.evaluation import policies as trained
from wn_rl.evaluation.scoring import How


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Observations of Breakout that are not those on which the export checks itself."""
    env = make_atari("Breakout", 1, seed=11)
    env.reset()
    rng = np.random.default_rng(4)
    seen = [env.step(rng.integers(4, size=1))[0] for _ in range(40)]
    env.close()
    return np.concatenate(seen)


def q_values(run: Path, observations: np.ndarray) -> np.ndarray:
    network = trained.load(run).network
    with torch.no_grad():
        return network(torch.from_numpy(observations)).numpy()


def test_stable_baselines3_plays_the_same_actions(
    tmp_path: Path, save_checkpoint: Callable[..., Path], frames: np.ndarray
) -> None:
    run, out = save_checkpoint(tmp_path / "run", param="wn"), tmp_path / "network.zip"
    export.export(trained.load(run), "sb3", out)
    model = DQN.load(out, device="cpu", buffer_size=8)
    expected = q_values(run, frames)
    with torch.no_grad():
        np.testing.assert_allclose(model.q_net(torch.from_numpy(frames)).numpy(), expected, atol=1e-5)
    assert model.predict(frames, deterministic=True)[0].tolist() == expected.argmax(1).tolist()
    with torch.no_grad():
        np.testing.assert_array_equal(
            model.q_net(torch.from_numpy(frames)), model.q_net_target(torch.from_numpy(frames))
        )
    assert model.exploration_rate == 0.05
    # What this project reads back is the same network.
    again = trained.load(out, game="Breakout")
    np.testing.assert_allclose(again.network(torch.from_numpy(frames)).detach().numpy(), expected, atol=1e-5)


def test_stable_baselines3_loads_it_with_its_own_atari_environment(
    tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    import ale_py
    import gymnasium
    from stable_baselines3.common.atari_wrappers import AtariWrapper

    gymnasium.register_envs(ale_py)
    run, out = save_checkpoint(tmp_path / "run"), tmp_path / "network.zip"
    export.export(trained.load(run), "sb3", out)
    env = VecFrameStack(DummyVecEnv([lambda: AtariWrapper(gymnasium.make("BreakoutNoFrameskip-v4"))]), 4)
    model = DQN.load(out, env=env, device="cpu", buffer_size=50, learning_starts=8)
    before = {name: weight.clone() for name, weight in model.q_net.state_dict().items()}
    model.learn(16)  # it can be trained on
    env.close()
    assert model.num_timesteps == 16
    assert any(not torch.equal(before[name], weight) for name, weight in model.q_net.state_dict().items())


@pytest.mark.parametrize("param", ["wn", "bn", "ln"])
def test_torch_and_onnx_give_the_same_q_values_for_any_batch(
    param: str, tmp_path: Path, save_checkpoint: Callable[..., Path], frames: np.ndarray
) -> None:
    run = save_checkpoint(tmp_path / "run", param=param)
    found = trained.load(run)
    assert export.export(found, "torch", tmp_path / "network.pt2") < 1e-4
    assert export.export(found, "onnx", tmp_path / "network.onnx") < 1e-4
    program = torch.export.load(tmp_path / "network.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    for batch in (frames[:1], frames[:7], frames):
        expected = q_values(run, batch)
        with torch.no_grad():
            np.testing.assert_allclose(program(torch.from_numpy(batch)).numpy(), expected, atol=1e-5)
        (values,) = session.run(["q_values"], {"observations": batch})
        np.testing.assert_allclose(values, expected, atol=1e-5)
    folded = not any("parametrizations" in name or "normalization" in name for name in program.state_dict())
    assert folded == (param != "ln")
    assert sorted(map(str, found.network.state_dict())) == sorted(trained.load(run).network.state_dict())  # untouched


def test_what_cannot_be_exported_is_one_line_and_leaves_what_is_there(
    tmp_path: Path,
    save_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = save_checkpoint(tmp_path / "run", param="ln"), tmp_path / "network.zip"
    out.write_text("kept")
    with pytest.raises(WnRlError, match="'ln' cannot be folded into plain weights"):
        export.export(trained.load(run), "sb3", out)
    assert export.export_command([run], How(), "torch", str(tmp_path / "ln.pt2")) == 0
    assert "'ln' cannot be folded, so its layers were kept" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"must end in \.onnx"):
        export.export_command([run], How(), "onnx", str(out))
    with pytest.raises(UsageError, match="2 are named"):
        export.export_command([run, run], How(), "sb3", str(out))
    with pytest.raises(WnRlError, match="cannot write"):
        export.export(trained.load(run), "torch", tmp_path / "nowhere" / "network.pt2")

    # An export that computes something else is not written.
    plain = save_checkpoint(tmp_path / "plain")
    monkeypatch.setattr(export, "_torch", lambda network, found: (b"", lambda o: np.zeros((len(o), 4), np.float32)))
    with pytest.raises(WnRlError, match="does not agree with it"):
        export.export(trained.load(plain), "torch", tmp_path / "wrong.pt2")
    assert not (tmp_path / "wrong.pt2").exists()

    real_import, real_module = builtins.__import__, importlib.import_module

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("stable_baselines3", "onnxscript"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(importlib, "import_module", lambda name: without(name) and real_module(name))
    for name in [name for name in sys.modules if name.split(".")[0] == "stable_baselines3"]:
        monkeypatch.delitem(sys.modules, name)
    for kind, packages in (("sb3", "stable-baselines3"), ("onnx", "onnx onnxscript onnxruntime")):
        with pytest.raises(WnRlError, match=f"pip install {packages}"):
            export.export(trained.load(plain), kind, out)  # type: ignore[arg-type]
    assert out.read_text() == "kept"
