"""Nothing that stands in a checkpoint is believed before it was checked; whatever is wrong is one clear line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.dqn import DQN
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.errors import CheckpointError
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import Parameterization, names, register, registry
from wn_rl.replay import Minibatch
from wn_rl.runs import checkpoint
from wn_rl.runs.checkpoint import check_state, seal
from wn_rl.runs.safe_load import Layout, layout_of, open_regular, parse_json, read_layouts, read_tensors, shown
from wn_rl.training.session import train

JSON, MODEL, TRAINING = "checkpoint.json", "model.safetensors", "training.safetensors"
SMALL = {
    "game": "breakout",
    "frames": 240,
    "num_envs": 2,
    "num_threads": 1,
    "hidden_units": 8,
    "batch_size": 4,
    "learning_starts": 20,
    "target_period": 20,
    "replay_capacity": 60,
    "init_samples": 8,
    "evaluation_period": 1000,
    "evaluation_episodes": 1,
    "evaluation_envs": 1,
    "max_frames_per_episode": 80,
    "precision": "float32",
}


def small(**changes: object) -> TrainConfig:
    return resolve(replace(load("quick"), **(SMALL | changes)))


def rewrite(directory: Path, change: Any) -> None:
    """Change the content of checkpoint.json in place and seal it anew."""
    content = json.loads((directory / JSON).read_text())
    change(content)
    for name in (MODEL, TRAINING):
        content["sha256"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    (directory / JSON).write_text(json.dumps(seal(content)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of two real, short runs."""
    torch.set_num_threads(1)
    found = []
    for param in ("wn", "bn"):
        run = tmp_path_factory.mktemp(param)
        assert train(small(param=param), DQN, run, quiet=True) == 0
        found.append(run / "checkpoints" / "latest")
        rewrite(found[-1], lambda content: None)
    return found


@pytest.fixture
def copy(originals: list[Path], tmp_path: Path) -> Path:
    """A copy of the first checkpoint, as the latest of a run."""
    return Path(shutil.copytree(originals[0], tmp_path / "checkpoints" / "latest"))


def mutants(originals: list[Path], first: int, count: int) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("mutated_checkpoints.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, str(script), str(first), str(count), *map(str, originals)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def check_mutants(originals: list[Path], first: int, count: int) -> None:
    reports = mutants(originals, first, count)
    assert len(reports) == count
    wrong = [
        report
        for report in reports
        if report["outcome"] not in ("error", "same", "as written")
        or report["cpu_seconds"] > 1.0  # on a machine that has other things to do the wall would tell of these
        or report["wall_seconds"] > 30.0
        or report["extra_bytes"] > 200e6
    ]
    assert not wrong, wrong
    assert sum(report["outcome"] == "error" for report in reports) > 0.7 * count
    assert any(report["outcome"] == "same" for report in reports)


def test_a_hundred_mutated_checkpoints_end_in_a_clear_line_or_load_what_they_hold(originals: list[Path]) -> None:
    check_mutants(originals, 0, 100)


@pytest.mark.slow
def test_two_thousand_mutated_checkpoints(originals: list[Path]) -> None:
    check_mutants(originals, 0, 2000)


# A lie about sizes


@pytest.mark.parametrize("name", names())
def test_the_meta_device_knows_the_weights_of_every_parameterization(name: str) -> None:
    spec = QNetworkSpec(4, name, hidden_units=8)
    with torch.device("meta"):
        expected = build_q_network(spec, seed=0).state_dict()
    real = build_q_network(spec, seed=0).state_dict()
    assert all(weight.is_meta for weight in expected.values())
    assert {key: layout_of(value) for key, value in expected.items()} == {
        key: layout_of(value) for key, value in real.items()
    }


class Largest(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that any operation returns with memory of its own."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not value.is_meta:
                self.nbytes = max(self.nbytes, value.nbytes)
        return result


def test_a_spec_that_claims_a_huge_network_is_refused_without_building_it(copy: Path) -> None:
    """65,536 hidden units would be 822 MB of weights; 8 of them are 100 kB, less than a convolution."""

    def claim(content: Any) -> None:
        content["network"]["hidden_units"] = content["config"]["hidden_units"] = 65_536

    with Largest() as real:
        checkpoint.load(copy, with_training=False).q_network()
    assert real.nbytes == 64 * 64 * 3 * 3 * 4  # a convolution
    rewrite(copy, claim)
    with Largest() as largest, pytest.raises(CheckpointError, match=r"'hidden.bias' is float32 \[8\], not .*\[65536\]"):
        checkpoint.load(copy)
    assert largest.nbytes < 10_000


@pytest.mark.parametrize("name", [JSON, MODEL, TRAINING])
def test_a_file_larger_than_its_network_needs_is_not_read(copy: Path, name: str) -> None:
    os.truncate(copy / name, 2**36)  # zeros that take no room
    with pytest.raises(CheckpointError, match="is too large: 68,719,476,736 bytes where at most"):
        checkpoint.load(copy)


def header(entries: object, body: int = 0) -> io.BytesIO:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return io.BytesIO(struct.pack("<Q", len(text)) + text + bytes(body))


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_header_is_read_as_safetensors_reads_it() -> None:
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros((), dtype=torch.int64),
        "c": torch.zeros(0, 4),
        "d": torch.ones(5) > 0,
    }
    assert read_layouts(io.BytesIO(save_safetensors(tensors, {"note": "x"}))) == {
        "a": Layout(torch.float32, (2, 3)),
        "b": Layout(torch.int64, ()),
        "c": Layout(torch.float32, (0, 4)),
        "d": Layout(torch.bool, (5,)),
    }


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (io.BytesIO(b"abc"), "cut off or too long"),
        (io.BytesIO(struct.pack("<Q", 2**63) + b"{}"), "cut off or too long"),
        (io.BytesIO(struct.pack("<Q", 2**20 + 1) + bytes(2**21)), "cut off or too long"),
        (header([]), "not a mapping"),
        (header(b'{"a": NaN}'), "NaN is not a number"),
        (header({"a": 1}), "not a tensor's"),
        (header({"a": entry([1], [0, 4], "F8_E5M2")}, 4), "unknown dtype"),
        (header({"a": entry([1], [0, 4]) | {"dtype": ["F32"]}}, 4), "unknown dtype"),
        (header({"a": entry([-1], [0, 4])}, 4), "no sizes"),
        (header({"a": entry([True], [0, 4])}, 4), "no sizes"),
        (header({"a": entry([1.0], [0, 4])}, 4), "no sizes"),
        (header({"a": entry([2**64], [0, 4])}, 4), "no sizes"),
        (header({"a": entry([1] * 17, [0, 4])}, 4), "no sizes"),
        (header({"a": entry([2**32, 2**32], [0, 4])}, 4), "another size than its shape"),
        (header({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, 4), "overlap or leave gaps"),
        (header({"a": entry([1], [4, 8])}, 8), "overlap or leave gaps"),
        (header({"a": entry([1], [0, 4])}, 5), "describes 4 bytes and 5 follow"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(file: io.BytesIO, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_layouts(file)


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": NaN}', "NaN is not a number"),
        (b"[Infinity]", "Infinity is not a number"),
        (b"[1e999]", "too large"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "a key appears twice"),
        (b"9" * 41, "41 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'"\xff"', "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_more_than_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**128), 2**128) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)  # fmt: skip
def test_other_json_is_read_as_it_was_written(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@given(st.text())
def test_a_quoted_text_is_one_short_printable_line(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text * 50)) < 310


# What lies in a file's place


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link", 5) as file:
        assert file.read() == b"12345"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for path, message in [
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        (Path("/dev/zero"), "is not a file"),
        (tmp_path / "circle", "cannot read"),
        (tmp_path / "nothing", "No such file"),
        (tmp_path / "file" / "x", "Not a directory"),
    ]:
        with pytest.raises(CheckpointError, match=message), open_regular(path, 100):
            pass
    with (
        pytest.raises(CheckpointError, match="is too large: 5 bytes where at most 4 fit"),
        open_regular(tmp_path / "file", 4),
    ):
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    data = save_safetensors({"a": torch.zeros(3), "b": torch.tensor([0.0, value])})
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="'b' holds a number that is not finite"):
        read_tensors(tmp_path / "x", digest=hashlib.sha256(data).hexdigest(), limit=1000)


# The description


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("config", "param", "bn", "the parameterization: 'wn' and 'bn'|has no option"),
        ("config", "param_options", {"g": "exp"}, "its options: .*direct.*exp"),
        ("config", "param_layers", ["hidden"], "the layers: "),
        ("config", "hidden_units", 9, "hidden_units: 8 and 9"),
        ("config", "weight_init", "torch", "weight_init: 'normal' and 'torch'"),
        ("config", "game", "Chess", "unknown game 'Chess'"),
        ("config", "game", "x" * 10**5, "game is not a name"),
        ("config", "preset", "\x1b[2J", "preset is not a name"),
        ("network", "layers", ["hidden"] * 65, "more than 64 layers"),
        ("training", "agent/updates", -1, "'agent/updates' of the training state is below 0"),
        ("training", "agent/updates", 1.0, "a counter is not a number up to agent_steps"),
        ("training", "agent/updates", 10**9, "a counter is not a number up to agent_steps"),
        ("training", "loop/agent_steps", 1, "contradict each other"),
        ("training", "run/seconds", {"a": 1}, "neither a number nor a text"),
        ("training", "run/seconds/a", 1, "contradicts another"),
        ("training", "agent/generator", 1, "appears twice"),
        ("training", "a/" * 50, 1, "nested too deeply"),
        (None, "agent_steps", 10**13, "a counter is not a number"),
        (None, "agent_steps", True, "a counter is not a number"),
        (None, "config", ["game"], "config is not a mapping"),
        (None, "training", [], "training is not a mapping"),
    ],
)  # fmt: skip
def test_what_no_run_writes_is_refused_even_with_matching_sums(
    copy: Path, part: str | None, key: str, value: object, message: str
) -> None:
    def change(content: Any) -> None:
        (content if part is None else content[part])[key] = value

    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(copy)
    assert str(error.value).isprintable()


def test_a_changed_setting_is_noticed_by_the_sum_of_the_description(copy: Path) -> None:
    text = (copy / JSON).read_text()
    (copy / JSON).write_text(text.replace('"gamma": 0.99', '"gamma": 0.98'))
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        checkpoint.load(copy)
    (copy / JSON).write_text(json.dumps(json.loads(text), indent=3))  # spaces do not matter
    assert checkpoint.load(copy).config.gamma == 0.99


def test_the_sum_of_a_description_is_that_of_its_canonical_text() -> None:
    digest = hashlib.sha256(b'{"a":1,"sha256":{"m":"0"}}').hexdigest()
    assert seal({"sha256": {"m": "0"}, "a": 1}) == {"a": 1, "sha256": {"m": "0", JSON: digest}}
    assert seal(seal({"sha256": {"m": "0"}, "a": 1})) == seal({"sha256": {"m": "0"}, "a": 1})


# The checkpoint before


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", [JSON, MODEL, TRAINING])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_says_so(copy: Path, name: str) -> None:
    run = copy.parents[1]
    previous = copy.with_name("latest.previous")
    assert checkpoint.load(run).notice is None
    shutil.copytree(copy, previous)
    assert checkpoint.load(run).path == copy
    cut_in_half(copy / name)
    for place in (run, copy):
        saved = checkpoint.load(place)
        assert saved.path == previous
        assert saved.notice is not None
        assert saved.notice.isprintable()
        assert saved.notice.startswith(str(copy / name))
        assert saved.notice.endswith(f"going on from the checkpoint before it, {previous}")
    cut_in_half(previous / name)
    with pytest.raises(CheckpointError, match=str(copy / name)):  # the first is the one to tell of
        checkpoint.load(run)


def test_where_only_the_one_before_is_left_it_is_read_and_said(copy: Path) -> None:
    previous = copy.rename(copy.with_name("latest.previous"))
    for place in (copy.parents[1], copy):
        if place == copy:
            copy.mkdir()
        saved = checkpoint.load(place)
        assert saved.path == previous
        assert saved.notice == f"the latest checkpoint is missing; going on from the one before it, {previous}"
    assert checkpoint.load(previous).notice is None


def test_damage_of_the_training_state_does_not_keep_anyone_from_evaluating(copy: Path) -> None:
    (copy / TRAINING).unlink()
    assert checkpoint.load(copy, with_training=False).notice is None


# Somebody's own parameterization


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


@pytest.mark.usefixtures("clean_registry")
def test_a_parameterization_that_needs_values_is_built_only_if_the_weights_can_be_its(copy: Path) -> None:
    @register("scaled_by_mean")
    class ScaledByMean(Parameterization):
        def apply(self, layer: nn.Module) -> None:
            layer.register_buffer("mean", torch.tensor(layer.weight.detach().mean().item()))  # type: ignore[operator,union-attr]

    def change(units: int) -> Any:
        def mine(content: Any) -> None:
            for part, key in (("config", "param"), ("network", "parameterization")):
                content[part][key] = "scaled_by_mean"
            content["config"]["param_options"] = content["network"]["options"] = {}
            content["config"]["hidden_units"] = content["network"]["hidden_units"] = units

        return mine

    spec = QNetworkSpec(4, "scaled_by_mean", hidden_units=8)
    weights = build_q_network(spec, seed=3).state_dict()
    (copy / MODEL).write_bytes(save_safetensors(weights))
    rewrite(copy, change(8))
    loaded = checkpoint.load(copy, with_training=False).weights
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    rewrite(copy, change(65_536))
    with pytest.raises(CheckpointError, match="do not fit the network: it has 823,"):
        checkpoint.load(copy, with_training=False)


# The training state beside that of new objects


def agent_after(updates: int, optimizer: str = "adamax") -> DQN:
    agent = DQN(small(optimizer=optimizer), 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        frames = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8, generator=generator)
        agent.update(Minibatch(frames, torch.tensor([0, 1]), torch.ones(2), frames, torch.tensor([False, True])))
    return agent


def parameters(agent: DQN) -> list[nn.Parameter]:
    return list(agent.q_network.parameters())


@pytest.mark.parametrize("optimizer", ["adamax", "adam", "rmsprop_mnih"])
@pytest.mark.parametrize("updates", [0, 2])
def test_the_state_of_a_real_agent_passes_and_is_restored(optimizer: str, updates: int) -> None:
    agent, fresh = agent_after(updates, optimizer), agent_after(0, optimizer)
    tensors, values = checkpoint.flatten(agent.state_dict())
    state = checkpoint.unflatten(values | tensors)
    check_state(state, fresh.state_dict(), parameters(fresh))
    fresh.load_state_dict(agent.q_network.state_dict(), state)
    restored, restored_values = checkpoint.flatten(fresh.state_dict())
    assert restored_values == values
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("updates", None, "lacks 'updates'"),
        ("updates", 1.5, "'updates' is a number, not a whole number"),
        ("updates", True, "'updates' is true or false, not a whole number"),
        ("updates", -1, "'updates' is below 0"),
        ("updates", {"a": 1}, "'updates' is a group, not a whole number"),
        ("surprise", 1, "unknown entry 'surprise'"),
        ("target_network", None, "lacks 'target_network'"),
        ("target_network/output.bias", torch.zeros(5), r"'target_network/output.bias' is float32 \[5\], not"),
        ("target_network/output.bias", torch.zeros(4).double(), r"is float64 \[4\], not float32 \[4\]"),
        ("target_network/output.bias", 4.0, r"is a number, not a tensor float32 \[4\]"),
        ("generator", torch.zeros(16, dtype=torch.uint8), r"'generator' is uint8 \[16\], not uint8 \[5056\]"),
        ("optimizer/0", None, "'optimizer' is not that of 15 parameters"),
        ("optimizer/15", {}, "'optimizer' is not that of 15 parameters"),
        ("optimizer/3/exp_avg", None, "'optimizer/3' has other entries than 'optimizer/0'"),
        ("optimizer/3/exp_avg", torch.zeros(2, 2), "'optimizer/3/exp_avg' has shape .*; its parameter has"),
        ("optimizer/3/exp_avg", 1.0, "'optimizer/3/exp_avg' is a number, not a tensor"),
        ("optimizer/3/exp_avg", {"a": 1}, "'optimizer/3/exp_avg' is a group, not a tensor"),
        ("optimizer/3", 1, "'optimizer/3' has other entries"),
        ("optimizer/3/step", torch.tensor(-2.0), "counts -2 steps"),
        ("optimizer/3/step", torch.tensor(float("nan")), "counts nan steps"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(path: str, value: object, message: str) -> None:
    agent, fresh = agent_after(1), agent_after(0)
    state = agent.state_dict()
    state["optimizer"] = {str(key): dict(entries) for key, entries in state["optimizer"].items()}
    assert len(parameters(fresh)) == 15
    *parents, last = path.split("/")
    inner = state
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(CheckpointError, match=message):
        check_state(state, fresh.state_dict(), parameters(fresh))


def test_values_without_a_counterpart_yet_are_numbers_and_texts() -> None:
    check_state({"run": {"best": {"mean": -20.0, "frames": 4}}}, {"run": {"best": {}, "final": {}}})
    check_state({"seconds": 3, "name": "x", "list": [1]}, {"seconds": 0.5, "name": None, "list": (2,)})
    with pytest.raises(CheckpointError, match="'run/best/mean' is not a finite number"):
        check_state({"run": {"best": {"mean": float("nan")}}}, {"run": {"best": {}}})
    with pytest.raises(CheckpointError, match="'run/best/mean' is a list"):
        check_state({"run": {"best": {"mean": [1]}}}, {"run": {"best": {}}})
