"""A network of somebody's own: everything that a run has works with it, and what is wrong with it is one line."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evaluate
import train
import wn_rl
from agents.backends import make_backend
from agents.backends.cpu_kernels.backend import CpuKernels
from agents.backends.eager import Eager
from agents.dqn import DQN
from tests.networks.conftest import forget
from tests.sides import Sides
from tests.small_runs import stopped_run, tiny
from tests.tape import TapeRecorder
from tests.test_cli import TINY, run
from tests.test_resume import state_of
from wn_rl import diagnostics, networks
from wn_rl.config import TrainConfig, load, resolve, to_mapping, to_yaml
from wn_rl.errors import CheckpointError, UsageError, WnRlError
from wn_rl.evaluation import export, policies
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import fold, names, reinitialize
from wn_rl.parameterizations import get as get_parameterization
from wn_rl.replay import Minibatch, Replay
from wn_rl.runs import checkpoint
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train as train_run
from wn_rl.video import saliency

CPU = torch.device("cpu")
SMALL = "my_networks:Small"


def observations(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=generator)


def minibatch(size: int = 6) -> Minibatch:
    actions, rewards = torch.arange(size) % 4, torch.linspace(-1, 1, size)
    return Minibatch(observations(size), actions, rewards, observations(size, 1), torch.arange(size) % 3 == 0)


def own_config(**changes: object) -> TrainConfig:
    return replace(tiny(**({"network": "small"} | changes)), device="cpu")


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_file")
def test_it_is_imported_from_the_command_line_and_never_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = ["--network", SMALL]
    arguments = ["--game", "Pong", *TINY, "--frames", "600", "--quiet", "--network-options", "width=3"]
    code, out, err = run(train, [*arguments, *flag], capsys, monkeypatch)
    assert (code, out, err) == (0, "imported", "")
    (directory,) = tmp_path.glob("runs/Pong-*")
    config = (directory / "config.yaml").read_text()
    assert f"network: {SMALL}\n" in config
    assert "width: 3\n" in config
    assert "bias: true\n" in config, "the options are complete"
    assert checkpoint.load(directory).weights["conv.parametrizations.weight.original1"].shape == (3, 4, 8, 8)

    commands = {
        "resume": (train, ["--resume", str(directory), "--frames", "800", "--quiet"]),
        "config": (train, ["--config", str(directory / "config.yaml"), "--quiet"]),
        "evaluate": (evaluate, [str(directory), "--episodes", "1", "--max-frames-per-episode", "100"]),
    }
    for script, words in commands.values():
        forget()
        code, out, err = run(script, words, capsys, monkeypatch)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f"is user-defined and is not imported from a file: add --network {SMALL}" in err
        assert "my_networks" not in sys.modules
        code, out, err = run(script, [*words, *flag], capsys, monkeypatch)
        assert (code, err) == (0, "")
        assert out.startswith("imported")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--network natur", 2, "unknown network 'natur'. Did you mean 'nature'?"),
        ("--network-options width=2", 2, "network_options: the network 'nature' has no option 'width'; it has none"),
        ("--network my_networks:Nothing", 2, "'my_networks' has no network called 'Nothing'"),
        ("--network my_networks:Plain", 2, "no network called 'Plain': it must be a subclass of Network"),
        ("--network my_networks:nn", 2, "has no network called 'nn'"),
        ("--network my_networks:Unregistered", 2, "is not registered: decorate the class with @register"),
        ("--network nowhere:Small", 2, "cannot import 'nowhere': ModuleNotFoundError"),
        ("--network broken_networks:Small", 2, "RuntimeError: on purpose"),
        ("--network my_networks:Small --network-options widht=2", 2, "has no option 'widht'; there are: bias, width"),
        ("--network my_networks:Small --network-options width=wide", 2, "the option width is of type int, not 'wide'"),
        ("--network my_networks:Small --network-options width=0", 2, "ValueError: width must be at least 1"),
        ("--network my_networks:Small --network-options width=900M", 2, "the option width is of type int"),
        ("--network my_networks:Small --network-options width=900000000", 2, "more than 268,435,456 parameters"),
        ("--network my_networks:Small --param-layers cov", 2, "no layer matches 'cov'. Did you mean 'conv'?"),
        ("--network my_networks:Small --network-options bias=no", 2, "the option bias is true or false, not 'no'"),
        ("--network my_networks:Small --network-options bias=false", 2, "layer 'conv' has no bias"),
        ("--network my_networks:WrongShape", 2, "gives (1, 6) for 1 observations and 3 actions, not (1, 3)"),
        ("--network my_networks:Raises", 2, "cannot be built: RuntimeError: on purpose"),
        ("--network my_networks:NoOutput", 2, "has no layer 'output'"),
        (
            "--network my_networks:NoFeatures",
            2,
            "NotImplementedError: NoFeatures does not say how it computes features",
        ),
        ("--network my_networks:Unflat", 2, "features() gives (8, 1, 8), not (8, features)"),
        ("--network my_networks:DropsOut", 2, "draws random numbers in a forward pass"),
        ("--network my_networks:Twice", 2, "layer 'again' is used twice in the forward pass; --data-dependent-init"),
        ("--network my_networks:Values", 2, "cannot be built: RuntimeError"),
        ("--network my_networks:OnCpu", 2, "makes scale with values where torch allocates nothing"),
        ("--network my_networks:Many --network-options blocks=1000000000", 2, "more than 10,000 modules"),
        ("--config other.yaml", 1, f"not imported from a file: add --network {SMALL}"),
        ("--config unknown.yaml", 1, "the network 'smal' is not registered"),
    ],
)
@pytest.mark.usefixtures("own_file")
def test_what_is_wrong_is_one_line(
    words: str, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("other.yaml").write_text(f"network: {SMALL}\n")
    Path("unknown.yaml").write_text("network: smal\n")
    arguments = ["--game", "Pong", "--param", "wn", "--replay-capacity", "60k", *words.split()]
    found, out, err = run(train, arguments, capsys, monkeypatch)
    assert (found, out.removeprefix("imported"), err.count("\n")) == (code, "", 1)
    assert message in err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("own")
def test_a_backend_that_does_not_know_it_says_so(tmp_path: Path) -> None:
    config = own_config(param="wn")
    replay = Replay(32, 3)
    backend = make_backend(DQN(config, 4, CPU), replay)
    assert isinstance(backend, Eager)
    assert (
        "not cpu_kernels, since the network is a Small, and the kernels know nature (QNetwork) alone" in backend.reason
    )
    with pytest.raises(UsageError, match="--backend cpu_kernels: the network is a Small"):
        make_backend(DQN(replace(config, backend="cpu_kernels"), 4, CPU), replay)
    nature = replace(config, network="nature", network_options={}, param_layers=None)
    assert "the network is" not in CpuKernels.unsupported(DQN(nature, 4, CPU), replay)


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["small", "normed"])
@pytest.mark.usefixtures("own")
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(network: str, tmp_path: Path) -> None:
    config = own_config(network=network, param="wn", frames=1200)
    assert train_run(config, DQN, tmp_path / "whole", quiet=True) == 0
    stopped_run(tmp_path / "parts", config, after=20)
    resumed, saved = open_for_resume(tmp_path / "parts", {"network": f"my_networks:{network.capitalize()}"})
    assert resumed.network == network, "the same class under another name is no change"
    assert train_run(resumed, DQN, tmp_path / "parts", resume=saved, quiet=True) == 0
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"network is '.*' in this run and cannot change to 'nature'"):
        open_for_resume(tmp_path / "parts", {"network": "nature"})
    with pytest.raises(UsageError, match=r"network_options: the network '.*' has no option 'heads'"):
        open_for_resume(tmp_path / "parts", {"network_options": {"heads": 2}})


def test_from_python_a_class_is_enough(own: ModuleType, tmp_path: Path) -> None:
    keys: dict[str, Any] = to_mapping(tiny(param="wn", frames=600)) | {"chosen": (), "device": "cpu"}
    for key in ("param_layers", "weight_init", "learning_rate", "chosen"):
        del keys[key]
    directory = wn_rl.train(network=own.Small, network_options={"width": 2}, quiet=True, **keys | {"run_dir": tmp_path})
    forget()
    with pytest.raises(WnRlError, match=f"add --network {SMALL}"):
        wn_rl.load(directory)
    policy = wn_rl.load(directory, network=SMALL, device="cpu")
    assert policy.network.spec.network_options == {"width": 2, "bias": True}
    assert policy.q_values(observations(3).numpy()).shape[0] == 3
    score = wn_rl.evaluate(
        directory, network=type(policy.network), episodes=1, max_frames_per_episode=100, device="cpu"
    )
    assert len(score.result.scores) == 1
    for wrong in (own.Unregistered, nn.Linear, "my_networks:Nothing"):
        with pytest.raises(UsageError, match="network"):
            wn_rl.load(directory, network=wrong)


# --- what it computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("param", names())
@pytest.mark.usefixtures("own")
def test_every_parameterization_acts_and_learns(param: str, precision: str) -> None:
    agent = DQN(own_config(param=param, precision=precision), 4, CPU)
    agent.initialize(observations(16))
    before = copy.deepcopy(agent.q_network.state_dict())
    losses = []
    for _ in range(60):
        agent.update(minibatch())
        losses.append(agent.read_statistics().loss)
    assert agent.is_finite()
    assert all(not torch.equal(value, before[name]) for name, value in agent.q_network.named_parameters())
    assert losses[-1] < 0.9 * losses[0]
    assert agent.act(observations(3), torch.zeros(3).numpy()).shape == (3,)
    agent.copy_target()
    q_values = agent.q_values(observations(5))
    assert q_values.dtype == torch.float32
    with agent.autocast(), torch.no_grad():
        tolerance = 1e-5 if precision == "float32" else 0.05 * float(q_values.abs().max())
        torch.testing.assert_close(agent.target(observations(5)).float(), q_values, rtol=0, atol=tolerance)


@pytest.mark.parametrize("param", names())
@pytest.mark.usefixtures("own")
def test_folded_it_computes_the_same(param: str) -> None:
    network = build_q_network(QNetworkSpec(4, param, network="small"), seed=0).eval()
    if not get_parameterization(param).foldable:
        with pytest.raises(ValueError, match="cannot be folded"):
            fold(network)
        return
    plain = fold(copy.deepcopy(network))
    assert set(plain.state_dict()) == {
        f"{layer}.{part}" for layer in ("conv", "hidden", "output") for part in ("weight", "bias")
    }
    with torch.no_grad():
        torch.testing.assert_close(plain(observations(4)), network(observations(4)), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("own")
def test_the_output_layer_is_float32_under_autocast() -> None:
    network = build_q_network(QNetworkSpec(2, network="small"), seed=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = network.features(observations(3))
        q_values = network(observations(3))
    assert (features.dtype, q_values.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(
        q_values, nn.functional.linear(features.float(), network.output.weight, network.output.bias)
    )


def test_layers_are_those_of_the_class(own: ModuleType) -> None:
    small, dueling = (QNetworkSpec(4, network=name).outline() for name in ("small", "dueling"))
    assert small.layer_names() == ("conv", "hidden", "output")
    assert dueling.layer_names() == ("conv", "hidden", "value", "advantage")
    by_default = {get_parameterization(name).default_layers: get_parameterization(name)() for name in names()}
    assert {layers: dueling.default_layers(entry) for layers, entry in by_default.items()} == {
        "all": ("conv", "hidden", "value", "advantage"),
        "hidden": ("conv", "hidden"),
        "penultimate": ("hidden",),
    }
    assert isinstance(dueling, own.Dueling)
    assert own_config(network="dueling", param="wn").param_layers == dueling.layer_names()


@pytest.mark.parametrize("network", ["small", "dueling"])
@pytest.mark.usefixtures("own")
def test_data_dependent_initialization_gives_the_output_layers_their_deviation(network: str) -> None:
    agent = DQN(own_config(network=network, param="wn", output_init_std=0.25), 4, CPU)
    seen: dict[str, Tensor] = {}
    agent.initialize(observations(64))
    for name, layer in agent.q_network.named_modules():
        layer.register_forward_hook(lambda _layer, _x, y, name=name: seen.update({name: y.detach()}))
    agent.q_values(observations(64))
    for name in agent.q_network.output_layers:
        torch.testing.assert_close(
            seen[name].std(0, correction=0), torch.full(seen[name].shape[1:], 0.25), rtol=1e-3, atol=0
        )
    # Units that are 0 for all examples aside, which stay as they are.
    deviation = seen["conv"].std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.usefixtures("own")
def test_weight_init_and_reinitialize_are_those_of_the_spec() -> None:
    network = build_q_network(QNetworkSpec(4, network="small", weight_init="he"), seed=3)
    first = copy.deepcopy(network.state_dict())
    bound = (3 / 256) ** 0.5
    assert 0.9 * bound < float(network.get_submodule("conv").weight.abs().max()) <= bound  # type: ignore[operator, union-attr]
    assert bool((network.output.bias == 0.1).all())
    reinitialize(network, seed=4)
    assert bool((network.output.bias == 0.1).all())
    assert not torch.equal(network.state_dict()["conv.weight"], first["conv.weight"])
    again = build_q_network(QNetworkSpec(4, network="small", weight_init="he"), seed=3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.usefixtures("own")
def test_its_own_batch_normalization_learns_in_updates_alone() -> None:
    agent = DQN(own_config(network="normed", param="wn"), 4, CPU)
    agent.initialize(observations(16))
    mean = agent.q_network.state_dict()["norm.running_mean"].clone()
    agent.act(observations(3), torch.zeros(3).numpy())
    assert torch.equal(agent.q_network.state_dict()["norm.running_mean"], mean)
    agent.update(minibatch())
    assert not torch.equal(agent.q_network.state_dict()["norm.running_mean"], mean)
    assert not agent.q_network.training


@pytest.mark.parametrize("network", ["small", "normed", "dueling"])
@pytest.mark.usefixtures("own")
def test_recorded_updates_are_the_plain_ones(network: str) -> None:
    sides = Sides(TapeRecorder(), network=network, param="wn")
    for step in range(5):
        ours, *others = sides.act(0.3)
        assert others == [ours, ours]
        before = copy.deepcopy(sides.plain.q_network.state_dict())
        sides.update()
        sides.assert_recorded_is_as_it_is()
        if network != "normed":  # whose count of batches is a whole number and has no norm
            sides.assert_as_plain(before, 2e-3)
        sides.go_on_from_plain()
        if step == 2:
            sides.copy_target()
        sides.store()
    assert sides.graphs.updating.recorded
    assert sides.graphs.acting.recorded


# --- what is reported --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own")
def test_diagnostics_speak_of_its_layers_and_its_activation() -> None:
    values = {}
    for network in ("small", "silu"):
        agent = DQN(own_config(network=network, param="wn"), 4, CPU)
        agent.initialize(observations(16))
        agent.update(minibatch())
        values[network] = diagnostics.collect(
            agent.q_network, observations(32), [observations(32, 1), observations(32, 2)]
        )
        norms = {name for name in values[network] if name.endswith("/w_norm")}
        assert norms == {f"layers/{layer}/w_norm" for layer in ("conv", "hidden", "output")}
        assert all(value == value for value in values[network].values()), "nothing is unknown"
    with torch.no_grad():
        agent.q_network.get_submodule("hidden").bias[:4] = -100.0  # type: ignore[index, union-attr]
    by_silu = diagnostics.dormant_fractions(agent.q_network, observations(8))["hidden"]
    assert by_silu == 0.5
    with torch.no_grad():
        agent.q_network.get_submodule("hidden").bias[:4] = -3.0  # type: ignore[index, union-attr]
    assert diagnostics.dormant_fractions(agent.q_network, observations(8))["hidden"] < 0.5, (
        "silu(-3) is not 0, relu(-3) is"
    )


@pytest.mark.usefixtures("own")
def test_pixels_have_a_gradient_for_the_video() -> None:
    network = build_q_network(QNetworkSpec(4, "wn", network="small"), seed=0).eval()
    heat = saliency.gradients(network, observations(2), torch.tensor([0, 1]))
    assert heat.shape == (2, 84, 84)
    assert float(heat.abs().sum()) > 0


def saved(path: Path, network: str = "small", **options: Any) -> Path:
    config = own_config(network=network, param="wn", network_options=options)
    agent = DQN(config, 4, CPU)
    checkpoint.save(
        path,
        config=to_mapping(config),
        spec=agent.q_network.spec,
        weights=agent.q_network.state_dict(),
        agent_steps=0,
        training={},
        versions={},
    )
    return path


@pytest.mark.parametrize(("kind", "ending"), [("torch", "pt2"), ("onnx", "onnx")])
@pytest.mark.usefixtures("own")
def test_exports_agree_with_it(kind: export.Format, ending: str, tmp_path: Path) -> None:
    found = policies.load(saved(tmp_path / "c"))
    assert export.export(found, kind, tmp_path / f"x.{ending}") < 1e-4


@pytest.mark.usefixtures("own")
def test_stable_baselines3_has_no_such_network(tmp_path: Path) -> None:
    with pytest.raises(WnRlError, match="a Stable-Baselines3 file holds no network 'small'"):
        export.export(policies.load(saved(tmp_path / "c")), "sb3", tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


# --- files -------------------------------------------------------------------------------------------------------


def test_files_of_the_built_in_network_do_not_name_it(tmp_path: Path) -> None:
    config = tiny(param="wn")
    assert not {"network", "network_options"} & to_mapping(config).keys()
    assert "network" not in to_yaml(config)
    assert not {"network", "network_options"} & QNetworkSpec(4).to_json().keys()
    assert QNetworkSpec.from_json(QNetworkSpec(4).to_json()) == QNetworkSpec(4)
    chosen = replace(config, chosen=("network",))
    assert "network: nature\n" in to_yaml(chosen), "a choice is kept, whatever a preset says later"


@pytest.mark.usefixtures("own")
def test_the_configuration_of_a_run_repeats_its_network(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    config = resolve(replace(load("quick"), game="Pong", network="small", network_options={"width": "2"}))
    file.write_text(to_yaml(replace(config, chosen=("game", "network", "network_options"))))
    again = resolve(load(None, file))
    assert (again.network, again.network_options) == ("small", {"width": 2, "bias": True})
    assert again.param_layers == ("conv", "hidden", "output")
    from wn_rl.config import configure

    other, told = configure(None, file, {"network": "nature"})
    assert (other.network, other.network_options) == ("nature", {})
    assert resolve(other).param_layers == ("convolutions.0", "convolutions.1", "convolutions.2", "hidden", "output")
    assert told.endswith("the rest follows from network nature")


def damaged(path: Path, part: str, **changes: object) -> None:
    description = json.loads((path / "checkpoint.json").read_text())
    description[part] |= changes
    (path / "checkpoint.json").write_text(json.dumps(checkpoint.seal(description)))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("network", {"network": "os:system"}, "add --network os:system"),
        ("network", {"network": "nature", "network_options": {}}, "no layer matches 'conv'"),
        ("network", {"network_options": {"width": 10**9}}, "more than 268,435,456 parameters"),
        ("network", {"network_options": {"width": "many"}}, "the option width is of type int"),
        ("network", {"network_options": {"width": 2}}, "the network's options"),
        ("network", {"network_options": {"width": [1]}}, "the network's option width is neither a number nor a text"),
        ("network", {"network_options": {"heads": 1}}, "has no option 'heads'"),
        ("network", {"network_options": 7}, "the network's options are not a mapping"),
        ("network", {"network": "many", "network_options": {"blocks": 10**12}}, "more than 10,000 modules"),
        ("config", {"network": "nature", "network_options": {}}, "the network: 'small' and 'nature'"),
        ("config", {"network": "nobodys"}, "'nobodys' is not registered"),
        ("config", {"network_options": {"width": 3, "bias": True}}, "the network's options"),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_damaged_checkpoint_is_one_line_and_takes_no_memory(
    part: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    damaged(saved(tmp_path / "c"), part, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.load(tmp_path / "c")


@pytest.mark.usefixtures("own")
def test_weights_of_another_version_of_the_class_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "c")
    monkeypatch.setitem(networks.registry.NETWORKS.entries, "small", networks.get("normed"))
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "c")


def test_options_are_read_as_their_types(own: ModuleType) -> None:
    assert networks.options(own.Small, {"width": "7", "bias": "false"}) == {"width": 7, "bias": False}
    with pytest.raises(ValueError, match="has no option 'depth'; there are: bias, width"):
        networks.options(own.Small, {"depth": 1})
    assert networks.options(networks.QNetwork, {}) == {}
