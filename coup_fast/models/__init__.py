"""Networks: a small U-Net and classifier, their files, and the bundled weights."""

from coup_fast.models.classifier import Classifier
from coup_fast.models.files import load_network, save_network
from coup_fast.models.unet import EnergyUNet, UNet

__all__ = ["Classifier", "EnergyUNet", "UNet", "load_network", "save_network"]
