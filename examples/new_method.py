"""A method of your own: rounds of noising and one-call denoising, as rows for the kernel.

    python examples/new_method.py

`docs/tutorials/add_a_method.md` explains the parts.
"""

import numpy as np
import torch

import coup_fast
from coup_fast.data import demo_digits
from coup_fast.methods import METHODS
from coup_fast.plan import Plan, Prediction, Rows, diffusion_row, make_plan, network_row, start_row


def rounds_of_one_shot(
    schedule: coup_fast.VPSchedule, kind: str = "eps", *, t_star: float = 0.1, rounds: int = 3
) -> Plan:
    """x ← √ᾱ x + σ z, then x ← x̂0(x), `rounds` times."""
    alpha_bar = float(schedule.alpha_bar(t_star))
    denoise = network_row(Prediction(x0=1.0), alpha_bar, kind, clip_denoised=True)
    rows, times = [denoise], [t_star]
    for _ in range(rounds - 1):
        rows += [diffusion_row(alpha_bar), denoise]
        times += [np.nan, t_star]  # forward diffusion calls no network
    start = start_row(alpha_bar)
    return make_plan("rounds", start, Rows(np.stack(rows), np.array(times)), clamp_output=True)


METHODS["rounds"] = rounds_of_one_shot
images, labels = demo_digits(16)
score_model, classifier = coup_fast.load_bundled("mnist")
purifier = coup_fast.Purifier(score_model, method="rounds", rounds=2)
print(purifier.plan.table())

clean = purifier(images, sample_ids=torch.arange(len(images)))
print(f"right: {int((classifier(clean).argmax(1) == labels).sum())} of {len(images)}")
# The exact gradient, EOT and `coup_fast.check_gradient` work for it as for every method.
print(coup_fast.check_gradient(coup_fast.PurifiedClassifier(purifier, classifier), images[:2]))
