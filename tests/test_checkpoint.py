"""A checkpoint is written whole or not at all, comes back equal, and damage is one clear line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from wn_rl.config import TrainConfig, load, resolve
from wn_rl.errors import CheckpointError
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.runs import checkpoint

SPEC = QNetworkSpec(4, "wn", hidden_units=8, weight_init="normal")
TRAINING = {
    "agent": {"optimizer": {"0": {"exp_avg": torch.arange(3.0), "step": torch.tensor(7.0)}}, "updates": 12},
    "loop": {"agent_steps": 48},
}


def config() -> TrainConfig:
    return resolve(replace(load("quick"), game="Breakout", hidden_units=8))


def write(path: Path, *, agent_steps: int = 48, seed: int = 0) -> None:
    checkpoint.save(
        path,
        config=asdict(config()),
        spec=SPEC,
        weights=build_q_network(SPEC, seed=seed).state_dict(),
        agent_steps=agent_steps,
        training=TRAINING | {"loop": {"agent_steps": agent_steps}},
        versions={"wn_rl": "test"},
    )


def test_round_trip_gives_equal_weights_outputs_and_state(tmp_path: Path) -> None:
    write(tmp_path / "c")
    saved = checkpoint.load(tmp_path / "c")
    network = build_q_network(SPEC, seed=0)
    observations = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 4, 84, 84), dtype=np.uint8))
    assert torch.equal(saved.q_network()(observations), network(observations))
    assert saved.config == config()
    assert saved.agent_steps == 48
    assert saved.training["agent"]["updates"] == 12
    assert torch.equal(saved.training["agent"]["optimizer"]["0"]["exp_avg"], torch.arange(3.0))
    assert checkpoint.load(tmp_path / "c", with_training=False).training == {}


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "c")
    write(tmp_path / "c", agent_steps=96, seed=1)
    assert checkpoint.load(tmp_path / "c").agent_steps == 96
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_a_run_directory_means_its_latest_checkpoint_and_an_interrupted_swap_is_survived(tmp_path: Path) -> None:
    latest = tmp_path / "checkpoints" / "latest"
    write(latest)
    assert checkpoint.find(tmp_path) == latest
    os.rename(latest, latest.with_name("latest.previous"))
    assert checkpoint.load(tmp_path).agent_steps == 48


def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        import resource

        write(tmp_path / "c")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
                write(tmp_path / "c", agent_steps=96)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        write(tmp_path / "c")
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
                write(tmp_path / "c", agent_steps=96)
        finally:
            tmp_path.chmod(0o700)
    assert checkpoint.load(tmp_path / "c").agent_steps == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "pickle", "directory"])
def test_damage_of_any_file_is_one_clear_line(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "c")
    file = tmp_path / "c" / name
    data = file.read_bytes()
    file.unlink()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        file.write_bytes(data[:40] + bytes([data[40] ^ 0xFF]) + data[41:])
    elif damage == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif damage == "directory":
        file.mkdir()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(tmp_path / "c")
    assert "\n" not in str(error.value)


def edited(path: Path, **changes: object) -> Path:
    """Return a copy of the checkpoint with fields of its JSON replaced (None removes one)."""
    copy = path.with_name("edited")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    description = json.loads((copy / "checkpoint.json").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = description
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    sealed = checkpoint.seal(description) if "sha256" in description else description
    (copy / "checkpoint.json").write_text(json.dumps(sealed))
    return copy


def test_a_checkpoint_of_the_first_format_is_read_as_what_it_was(tmp_path: Path) -> None:
    """Before parameterizations had options and a choice of layers."""
    write(tmp_path / "c")
    added = ("param_options", "param_layers", "target_statistics", "joint_batches", "output_init", "compile")
    old = dict.fromkeys(["network__options", "network__layers", *(f"config__{key}" for key in added)])
    first = checkpoint.load(edited(tmp_path / "c", format=1, **old))
    now = checkpoint.load(tmp_path / "c")
    assert first.spec.options == {}
    assert first.config.target_statistics == "running"
    x = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(first.q_network()(x), now.q_network()(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"network": None}, "network"),
        ({"network__hidden_units": 10**9}, "65536"),
        ({"network__hidden_units": 9}, "do not match"),
        (
            {"network__parameterization": "nonsense"},
            "not registered: if it is your own, add --param YOUR_MODULE:ITS_CLASS",
        ),
        ({"network__parameterization": "os:system"}, "not imported from a file: add --param os:system"),
        ({"network__options": {"g": "nonsense"}}, "g is one of direct, exp"),
        ({"network__options": {"shell": "true"}}, "no option 'shell'"),
        ({"network__options": [1]}, "options are not a mapping"),
        ({"network__layers": ["nothing"]}, "no layer matches 'nothing'"),
        ({"network__layers": 5}, "not a list of texts"),
        ({"network__convolutions": [[32, 800, 4]]}, "do not fit"),
        ({"config__gamma": "much"}, "gamma"),
        ({"config__gamma": None}, "gamma"),
        ({"config__surprise": 1}, "surprise"),
        ({"agent_steps": -1}, "counter"),
        ({"agent_steps": "many"}, "counter"),
        ({"sha256": {}}, "missing"),
    ],
)
def test_wrong_fields_are_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(edited(tmp_path / "c", **change)).q_network()


def test_a_file_that_lies_about_its_sizes_is_refused_even_with_a_matching_checksum(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path / "c")
    header = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    data = len(header).to_bytes(8, "little") + header + b"\0" * 16
    copy = edited(tmp_path / "c")
    (copy / "model.safetensors").write_bytes(data)
    description = json.loads((copy / "checkpoint.json").read_text())
    description["sha256"]["model.safetensors"] = hashlib.sha256(data).hexdigest()
    sealed = checkpoint.seal(description) if "sha256" in description else description
    (copy / "checkpoint.json").write_text(json.dumps(sealed))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(copy)


def test_flatten_and_unflatten_undo_each_other_and_contradictions_are_refused() -> None:
    tensors, values = checkpoint.flatten(TRAINING)
    assert set(values) == {"agent/updates", "loop/agent_steps"}
    back = checkpoint.unflatten(values | tensors)
    assert back["agent"]["updates"] == 12
    assert torch.equal(back["agent"]["optimizer"]["0"]["step"], torch.tensor(7.0))
    with pytest.raises(CheckpointError, match="contradicts"):
        checkpoint.unflatten({"a": 1, "a/b": 2})


def test_weights_are_plain_safetensors_that_other_programs_read(tmp_path: Path) -> None:
    write(tmp_path / "c")
    weights = build_q_network(SPEC, seed=0).state_dict()
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == save_safetensors(
        {name: value.contiguous() for name, value in weights.items()}
    )
