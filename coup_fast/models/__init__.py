"""Networks of this package and their files, the bundled weights, and loaders of published ones."""

from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.bundled import BUNDLED, bundled_settings, describe_bundled, load_bundled
from coup_fast.models.classifier import Classifier
from coup_fast.models.conv_net import ConvNet
from coup_fast.models.data_range import with_data_range
from coup_fast.models.ddpm import load_ddpm
from coup_fast.models.diffusers_pipelines import load_diffusers
from coup_fast.models.edm import load_edm
from coup_fast.models.guided_diffusion import load_guided_diffusion
from coup_fast.models.lucidrains import load_lucidrains
from coup_fast.models.naf_net import NAFNet
from coup_fast.models.ncsnv2 import load_ncsnv2
from coup_fast.models.network_files import load_network, save_network
from coup_fast.models.normalized import Normalized
from coup_fast.models.robustbench_timm import load_classifier
from coup_fast.models.score_sde import load_score_sde
from coup_fast.models.unet import EnergyUNet, UNet

__all__ = [
    "BUNDLED",
    "AtVPTimes",
    "Classifier",
    "ConvNet",
    "EnergyUNet",
    "NAFNet",
    "Normalized",
    "UNet",
    "bundled_settings",
    "describe_bundled",
    "load_bundled",
    "load_classifier",
    "load_ddpm",
    "load_diffusers",
    "load_edm",
    "load_guided_diffusion",
    "load_lucidrains",
    "load_ncsnv2",
    "load_network",
    "load_score_sde",
    "save_network",
    "with_data_range",
]
