"""Training of score models, energy models and classifiers; see `coup-fast train --help`."""

from coup_fast.training.dsm import NCSNNoise, VPNoise
from coup_fast.training.trainer import TrainConfig, Trainer

__all__ = ["NCSNNoise", "TrainConfig", "Trainer", "VPNoise"]
