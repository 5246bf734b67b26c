"""benchmarks/score_networks.py: what it reads from the files of finished and running trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scripts import load_script

from coup_fast.models import NAFNet, save_network
from coup_fast.training import TrainConfig, Trainer


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("benchmarks/score_networks.py")


def trained(checkpoint: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    arguments = {"in_channels": 3, "channels": [4], "blocks": 1}
    trainer = Trainer(
        NAFNet(**arguments),
        lambda network, x, _, rng: network(x, torch.zeros(len(x))).sub(x).square().mean(),
        torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int64),
        TrainConfig(3, batch_size=4),
        checkpoint=checkpoint,
        identity={"network": "NAFNet", "arguments": json.dumps(arguments), "t_max": 0.3},
        progress=False,
    )
    return trainer.run()


def test_a_checkpoint_is_judged_by_its_average(script: Any, tmp_path: Path) -> None:
    averaged = trained(tmp_path / "run.checkpoint")
    network, t_max, seen = script.load(str(tmp_path / "run.checkpoint"), "eps")
    assert (t_max, seen) == (0.3, "12 images")
    assert not network.training
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    save_network(
        tmp_path / "run.safetensors",
        averaged,
        {"kind": "eps", "t_max": 0.3, "training": {"steps": 3, "batch_size": 4}},
    )
    stored, *facts = script.load(str(tmp_path / "run.safetensors"), "eps")
    assert facts == [0.3, "12 images"]
    assert script.digest(stored) == script.digest(network)
    with pytest.raises(SystemExit, match="holds a network of kind eps; --kind is ncsn"):
        script.load(str(tmp_path / "run.safetensors"), "ncsn")


@pytest.mark.parametrize(
    ("kind", "levels"),
    [
        ("eps", ["0.05", "0.1", "0.15", "0.2"]),  # the bundled network knows no later time
        ("ncsn", ["0.01", "0.02", "0.05", "0.1", "0.25", "0.5"]),
    ],
)
def test_images_are_judged_one_by_one(script: Any, kind: str, levels: list[str]) -> None:
    network, t_max, _ = script.load("bundled", kind)
    images, labels = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])
    sets = {"": images, ", attacked": script.attacked(images, labels)}
    moved = (sets[", attacked"] - images).abs().amax()
    assert 7 / 255 < moved <= 8 / 255 + 1e-6
    result = script.measure(network, kind, t_max, sets, labels)
    assert list(result["errors"]) == levels
    methods = script.METHODS[kind]
    assert list(result["right"]) == [f"{name}{kept}" for name in methods for kept in sets]
    assert all(len(found) == 3 for found in result["right"].values())
