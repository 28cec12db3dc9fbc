"""Export of a trained network to Stable-Baselines3, torch.export or ONNX; checked before it is written."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.atari.env import make_atari
from wn_rl.errors import UsageError, WnRlError, one_line
from wn_rl.evaluation import policies as trained
from wn_rl.evaluation.policies import Trained
from wn_rl.evaluation.scoring import How
from wn_rl.networks import Network, QNetwork
from wn_rl.parameterizations import fold
from wn_rl.parameterizations.api import treated_layers

Format = Literal["sb3", "torch", "onnx"]
FRAMES = 64
"""Number of observations, from random play, on which an export must agree with the network."""
TOLERANCE = 1e-4
"""Largest difference of Q-values, in units of the largest |Q| or 1: rounding in float32 makes some 1e-6."""
QValues = Callable[[Tensor], NDArray[np.float32]]
"""Q-values, shape (B, actions), of uint8 observations, shape (B, 4, 84, 84)."""


def export_command(paths: Sequence[Path], how: How, kind: Format, out: str) -> int:
    """Export the one network that is named and say so; return the exit code.

    Raises:
        UsageError: several networks, or the file's ending is that of another kind.
        WnRlError: see :func:`export`.
    """
    ending = {"sb3": ".zip", "torch": ".pt2", "onnx": ".onnx"}[kind]
    if Path(out).suffix != ending:
        raise UsageError(f"--export {kind} {out}: the file's name must end in {ending}")
    if len(paths) != 1:
        raise UsageError(f"--export writes one network, and {len(paths)} are named")
    found = trained.load(paths[0], game=how.game, param=how.param, param_options=how.param_options)
    difference = export(found, kind, Path(out))
    kept = "" if foldable(found.network) else f"; '{found.param}' cannot be folded, so its layers were kept"
    print(
        f"{out}: {found.game}, {found.param}, as {kind}; same actions on {FRAMES} observations of the game, Q-values "
        f"within {difference:.1g}{kept}"
    )
    return 0


def foldable(network: Network) -> bool:
    """Return whether every parameterized layer of the network can be folded into a plain weight and bias."""
    return all(parameterization.foldable for _, parameterization in treated_layers(network).values())


def export(found: Trained, kind: Format, out: Path) -> float:
    """Write a trained network to a file that can be used without this project.

    Parameterizations are folded into plain weights. One that cannot be folded (``ln``) keeps its layers in a ``torch``
    or ``onnx`` file, and is refused for ``sb3``, whose networks have no such layer.

    Args:
        found: the network; it is not changed.
        kind: ``sb3``, a zip that ``stable_baselines3.DQN.load`` plays; ``torch``, a ``torch.export`` program; or
            ``onnx``. The last two map uint8 observations (B, 4, 84, 84) to float32 Q-values (B, actions), any B.
        out: the file; an existing one is replaced atomically, or kept if something fails.

    Returns:
        The largest difference of a Q-value, on :data:`FRAMES` observations of the game, from those of the network.

    Raises:
        WnRlError: a package is missing, the parameterization cannot be folded, the export does not agree with the
            network, or the file cannot be written.
    """
    if kind == "sb3" and type(found.network) is not QNetwork:
        raise WnRlError(
            f"{found.path}: a Stable-Baselines3 file holds no network '{found.network.spec.network}', only that of its "
            "CnnPolicy; --export torch or onnx keeps any"
        )
    observations = _observations(found)
    with torch.no_grad():
        expected = found.network(observations).numpy()
    network = trained.copy_network(found.network)
    if foldable(network):
        fold(network)
    elif kind == "sb3":
        raise WnRlError(
            f"{found.path}: '{found.param}' cannot be folded into plain weights, and a Stable-Baselines3 file holds "
            "nothing else; --export torch or onnx keeps its layers"
        )
    make = {"sb3": _sb3, "torch": _torch, "onnx": _onnx}[kind]
    with _quiet(), _own_network_told(found):
        data, q_values = make(network.eval(), found)
        got = q_values(observations)
    difference = float(np.abs(got - expected).max())
    if difference > TOLERANCE * max(1.0, float(np.abs(expected).max())) or _other_actions(got, expected):
        raise WnRlError(
            f"the {kind} export of {found.path} does not agree with it: Q-values differ by {difference:.2g}"
        )
    _write(out, data)
    return difference


@contextlib.contextmanager
def _own_network_told(found: Trained) -> Iterator[None]:
    """Let what torch says against a network of somebody's own be one line."""
    try:
        yield
    except WnRlError:
        raise
    except Exception as error:
        if type(found.network) is QNetwork:
            raise
        raise WnRlError(
            f"{found.path}: the network '{found.network.spec.network}' cannot be exported: {type(error).__name__}: "
            f"{one_line(error)[:300]}"
        ) from None


def _other_actions(got: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """Return whether greedy actions differ although the best two Q-values differ by more than rounding."""
    best = np.sort(expected, axis=1)
    clear = (best[:, -1] - best[:, -2] > TOLERANCE) if expected.shape[1] > 1 else np.zeros(len(expected), bool)
    return bool((got.argmax(1) != expected.argmax(1))[clear].any())


def _observations(found: Trained) -> Tensor:
    env = make_atari(found.game, 1, seed=0, full_action_set=found.full_action_set)
    rng = np.random.default_rng(0)
    try:
        seen, _ = env.reset()
        observations = [seen]
        while len(observations) < FRAMES:
            seen, *_ = env.step(rng.integers(env.num_actions, size=1))
            observations.append(seen)
    finally:
        env.close()
    return torch.from_numpy(np.concatenate(observations))


def _sb3(network: Network, found: Trained) -> tuple[bytes, QValues]:
    try:
        import gymnasium
        from stable_baselines3 import DQN
    except ImportError as error:
        raise WnRlError(
            f"--export sb3 needs Stable-Baselines3: pip install stable-baselines3 ({one_line(error)})"
        ) from None
    from wn_rl.sb3.zip_file import LAYERS

    spec = network.spec
    spaces = gymnasium.spaces

    class Blank(gymnasium.Env[Any, Any]):
        """Defines the spaces; it is not part of the file."""

        observation_space = spaces.Box(0, 255, spec.observation_shape, np.uint8)
        action_space = spaces.Discrete(spec.num_actions)

    model = DQN(
        "CnnPolicy",
        Blank(),
        policy_kwargs={"features_extractor_kwargs": {"features_dim": spec.hidden_units}},
        buffer_size=1,  # load() allocates it; to train further, pass buffer_size to DQN.load
        gamma=found.config.gamma if found.config else 0.99,
        exploration_initial_eps=0.05,
        exploration_final_eps=0.05,
        device="cpu",
    )
    model.exploration_rate = (
        0.05  # predict(deterministic=False) then plays like an evaluation here; learn() would set it
    )
    weights = network.state_dict()
    theirs = {
        theirs + name.removeprefix(ours): value
        for theirs, ours in LAYERS.items()
        for name, value in weights.items()
        if name.startswith(f"{ours}.")
    }
    model.policy.load_state_dict(
        {f"{side}.{name}": value for side in ("q_net", "q_net_target") for name, value in theirs.items()}
    )
    stream = io.BytesIO()
    model.save(stream)
    data = stream.getvalue()
    loaded = DQN.load(io.BytesIO(data), device="cpu")

    def q_values(observations: Tensor) -> NDArray[np.float32]:
        with torch.no_grad():
            values: NDArray[np.float32] = loaded.q_net(observations).numpy()
        actions, _ = loaded.predict(observations.numpy(), deterministic=True)
        if not np.array_equal(actions, values.argmax(1)):
            raise WnRlError("stable_baselines3.DQN.predict does not play the exported network greedily")
        return values

    return data, q_values


def _program(network: Network) -> torch.export.ExportedProgram:
    example = torch.zeros((2, *network.spec.observation_shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def _torch(network: Network, found: Trained) -> tuple[bytes, QValues]:
    stream = io.BytesIO()
    torch.export.save(_program(network), stream)
    loaded = torch.export.load(io.BytesIO(stream.getvalue())).module()

    def q_values(observations: Tensor) -> NDArray[np.float32]:
        with torch.no_grad():
            values: NDArray[np.float32] = loaded(observations).numpy()
        return values

    return stream.getvalue(), q_values


def _onnx(network: Network, found: Trained) -> tuple[bytes, QValues]:
    try:
        importlib.import_module("onnxscript")  # torch.onnx needs it
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise WnRlError(
            f'--export onnx needs more packages: pip install onnx onnxscript onnxruntime, or pip install "wn_rl[onnx]" '
            f"({one_line(error)})"
        ) from None
    program = torch.onnx.export(
        _program(network), input_names=["observations"], output_names=["q_values"], dynamo=True, verbose=False
    )
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def q_values(observations: Tensor) -> NDArray[np.float32]:
        (values,) = session.run(["q_values"], {"observations": observations.numpy()})
        return np.asarray(values, np.float32)

    return data, q_values


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' internal log messages and warnings."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _write(out: Path, data: bytes) -> None:
    temporary = out.with_name(f".{out.name}.writing")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise WnRlError(f"cannot write {out}: {error.strerror}") from None
