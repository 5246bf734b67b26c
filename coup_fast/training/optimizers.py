"""The optimiser of a run: Adam, or SGD with Nesterov's momentum for classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import SGD, Adam, Optimizer

if TYPE_CHECKING:
    from coup_fast.training.trainer import TrainConfig


def build_optimizer(network: nn.Module, config: TrainConfig) -> Optimizer:
    """Adam over all parameters, or SGD if `config.momentum` is given.

    With SGD the biases of batch normalisation are a second group. Their learning rate is
    `config.norm_bias_rate` times that of the others, and their weight decay is divided by it, so
    that all parameters shrink alike.
    """
    if config.momentum is None:
        return Adam(network.parameters(), lr=config.learning_rate)
    biases = [m.bias for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    fast = {id(bias) for bias in biases}
    factor = config.norm_bias_rate
    groups = [
        {"params": [p for p in network.parameters() if id(p) not in fast], "factor": 1.0},
        {"params": biases, "factor": factor, "weight_decay": config.weight_decay / factor},
    ]
    return SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group the rate times its factor (1 if it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
