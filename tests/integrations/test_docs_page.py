"""docs/integrations.md, run as written: each Python block, and each command of its shell block."""

from __future__ import annotations

import importlib.util
import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.scripts import ROOT
from PIL import Image

import coup_fast
from coup_fast.cli import main
from coup_fast.models import Classifier, UNet, save_network

PAGE = (ROOT / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.splitlines()
]
SHARED = next(block for block in BLOCKS if "fresh_draws=True" in block)


def title(block: str) -> str:
    """The package that a block is about."""
    imports = re.findall(r"^(?:from|import) ([\w.]+)", block, re.M)
    return imports[-1] if imports else "none"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page takes as given, small and short."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (10, 12), (200, 30, 90)).save("photo.png")
    images = tiny.images(32)  # so many that some fall to three iterations of an attack
    classifier = tiny.TinyClassifier(classes=10).requires_grad_(False)
    return {
        "coup_fast": coup_fast,
        "torch": torch,
        "score_model": tiny.score_model(),
        "classifier": classifier,
        "images": images,
        "labels": classifier(images).argmax(1),
        "args": Namespace(t=5, sample_step=1, rand_t=False, log_dir="log", score_type="score_sde"),
        "config": Namespace(data=Namespace(dataset="CIFAR10"), device=torch.device("cpu")),
    }


def pipeline() -> Any:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler())


def shorten_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three iterations and two draws instead of a hundred and twenty, seeded not by the clock."""
    pyautoattack = pytest.importorskip("pyautoattack")
    whole = pyautoattack.AutoAttack.run_standard_evaluation

    def run(attack: Any, *args: Any, **options: Any) -> Any:
        attack.apgd.n_iter = attack.apgd.n_iter_orig = 3
        attack.apgd.n_iter_2 = attack.apgd.n_iter_min = attack.apgd.size_decr = 1
        attack.apgd.eot_iter = 2
        attack.seed = 0
        return whole(attack, *args, **options)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)


@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_the_examples_run(
    block: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "pipeline" in block:
        names["pipeline"] = pipeline()
    if "pyautoattack" in block:
        shorten_autoattack(monkeypatch)
    exec(SHARED, names)
    names.pop("clean", None)
    try:
        exec(block, names)
    except ImportError as error:
        package = title(block).partition(".")[0]
        if package == "coup_fast":
            raise
        pytest.skip(f"{package} cannot be imported: {error}")
    images = names["images"]
    if "clean" in names:
        assert names["clean"].shape == images.shape
        assert names["clean"].min() >= 0
        assert names["clean"].max() <= 1
    if "adversarial" in names:
        moved = (torch.as_tensor(names["adversarial"]) - images).abs().max()
        assert 0 < moved <= 8 / 255 + 1e-6
    if "runner" in names:
        assert names["x"].shape == images.shape
        written = [path.name for path in Path().glob("log/bs0_run/*")]
        assert len(written) == (0 if "CoupDiffusion" in block else 4)
    if "purify_image" in names:
        with Image.open("clean.png") as image:
            assert image.size == (10, 12)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command: str, names: dict[str, Any]) -> None:
    torch.manual_seed(0)
    save_network(Path("score.safetensors"), UNet(3, (8,)), {"kind": "eps"})
    save_network(
        Path("classifier.safetensors"),
        Classifier(3, size=8, width=4, hidden=8),
        {"kind": "classifier"},
    )
    Path("folder").mkdir()
    Image.new("RGB", (9, 7)).save("folder/one.png")
    program, *words = shlex.split(command)
    assert program == "coup-fast"
    assert main([*words, "--set", "num_steps=1"]) == 0
    with Image.open("cleaned/one.png" if "folder" in command else "clean.png") as image:
        assert image.size == ((9, 7) if "folder" in command else (10, 12))


def test_robustbench_measures_it(names: dict[str, Any]) -> None:
    """The text of its clean_accuracy, for importing the package takes torchvision and more."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None or spec.origin is None:
        pytest.skip("robustbench is not installed")
    source = (Path(spec.origin).parent / "utils.py").read_text()
    (function,) = re.findall(r"^def clean_accuracy.*?(?=^def |^class |\Z)", source, re.M | re.S)
    scope: dict[str, Any] = {"torch": torch, "nn": torch.nn, "math": __import__("math")}
    exec(function, scope)
    exec(SHARED, names)
    defended, images, labels = names["defended"], names["images"], names["labels"]
    defended.fresh_draws = False
    found = scope["clean_accuracy"](defended, images, labels, batch_size=len(images))
    assert found == pytest.approx((defended(images).argmax(1) == labels).float().mean().item())


def test_every_entry_of_the_table_exists() -> None:
    for module in re.findall(r"`integrations\.(\w+)", PAGE):
        assert importlib.util.find_spec(f"coup_fast.integrations.{module}") is not None
