"""Networks: a small U-Net and classifier, their files, and the bundled weights."""

from coup_fast.models.bundled import MNIST_SETTINGS, describe_bundled, load_bundled
from coup_fast.models.classifier import Classifier
from coup_fast.models.files import load_network, save_network
from coup_fast.models.unet import EnergyUNet, UNet

__all__ = [
    "MNIST_SETTINGS",
    "Classifier",
    "EnergyUNet",
    "UNet",
    "describe_bundled",
    "load_bundled",
    "load_network",
    "save_network",
]
