"""Purify with a score network and a classifier of your own: any two modules, and three facts.

    python examples/own_network.py

`docs/tutorials/checkpoint.md` says how to find the facts out.
"""

import torch
from torch import nn

import coup_fast


class YourScoreNetwork(nn.Module):
    """Predicts the noise in x [B, 3, H, W], in [-1, 1] plus noise; t [B] is 999 · time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) + self.time(t[:, None] / 999)[:, :, None, None]
        return self.last(torch.relu(hidden))


torch.manual_seed(0)
network = YourScoreNetwork()  # load your weights into it here; these are random
classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()  # pixels -> logits

score_model = coup_fast.ScoreModel(
    network.eval(), kind="eps", schedule=coup_fast.VPSchedule(), time_scale=999
)
purifier = coup_fast.Purifier(score_model, classifier, method="coup", t_star=0.1, num_steps=20)
print(purifier.plan.method, purifier.plan.num_steps, "steps")

images = torch.rand(4, 3, 32, 32)  # pixels in [0, 1]
clean = purifier(images, sample_ids=torch.arange(4))
print("purified", list(clean.shape), clean.dtype, f"moved by {(clean - images).abs().mean():.3f}")
