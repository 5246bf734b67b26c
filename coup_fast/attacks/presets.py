"""Attacks by name, with published settings where there are any; `preset(name, eps=…)`.

| name | what | source of its numbers |
|---|---|---|
| pgd-linf | PGD-200, step 0.007, EOT 20, exact gradient | Lee & Kim, ICCV 2023 (a) |
| pgd-l2 | PGD-200, normalised steps, EOT 20 | the same (a); step 2.5 · eps / steps is ours |
| pgd40 | PGD-40, EOT 8: what one CPU can do | the demo's |
| apgd-ce, apgd-dlr | APGD-100, EOT 20 | AutoAttack `rand`: Croce & Hein, ICML 2020 (b) |
| apgd-t | APGD-100 towards each of 9 wrong classes, EOT 20 | AutoAttack's `apgd-t`, with EOT (d) |
| autoattack-rand | AutoAttack's `rand` by pyautoattack, EOT 20 | Croce & Hein, ICML 2020 |
| autoattack-standard | its `standard`, on the defence under draw 0 | the same |
| fixed-noise | PGD-200 under draw 0 throughout | Liu et al., arXiv 2404.14309 |
| stopped | pgd-linf with the guidance held constant; weak | released COUP attack |
| bpda | BPDA + EOT, 50 steps of 2/255, 15 draws; weak | Hill et al., ICLR 2021 (c) |
| classifier | PGD-40 on the bare classifier; weak | |
| adaptive-guided | the worst of three gradients on each image, EOT 4 | ours |
| diffhammer | APGD-50 on the draws that share a weakness, EOT 10 | Wang et al., NeurIPS 2024 (f) |
| diffattack | apgd-ce and the deviation of the states, λ = 1 | Kang et al., NeurIPS 2023 (g) |
| pgd-low-frequency | pgd-linf in a quarter of the frequencies along each axis | ours |
| square | Square by mean margins, 1000 queries, EOT 4 | Andriushchenko et al., ECCV 2020 (e) |

Where released code differs: (a) It starts at the image, `random_start=False`; its ℓ2 attack takes
steps of 0.007 along signs. (b) It starts on the ball's surface, here anywhere in the ball, and
calls an image broken by its last draw alone. (c) Its loss is that of the mean logits of the 15
draws: `eot=1` on a `PurifiedClassifier(num_draws=15)`; it stops at the first success. (d) It aims
at the nine best wrong classes of its first forward, here at all nine of ten classes.
(e) It is for deterministic classifiers, stops at the first success, and takes 5000 queries.
(f) It takes the margin, CE and DLR in three restarts, here the margin. It restarts only images that
under half of the draws misclassify. It has one backward pass, of the weighted gradients at the
purified images through one of the draws; here each draw has its own, which its ablation found
stronger. (g) It takes CE in a first round and DLR in a second, here CE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coup_fast import checks
from coup_fast.attacks import units
from coup_fast.attacks.adaptive import AdaptiveGuided
from coup_fast.attacks.apgd import APGD
from coup_fast.attacks.attack import MAX_COUNT, Attack
from coup_fast.attacks.autoattack import AutoAttack
from coup_fast.attacks.options import AttackOptions
from coup_fast.attacks.pgd import PGD
from coup_fast.attacks.square import Square

if TYPE_CHECKING:
    from typing_extensions import Unpack

PRESETS: dict[str, Attack] = {
    "pgd-linf": PGD(),
    "pgd-l2": PGD(norm="l2", eps=0.5, step_size=2.5 * 0.5 / 200),
    "pgd40": PGD(steps=40, eot=8),
    "apgd-ce": APGD(),
    "apgd-dlr": APGD(loss="dlr"),
    "apgd-t": APGD(loss="dlr", targeted=True, restarts=9),
    "autoattack-rand": AutoAttack(),
    "autoattack-standard": AutoAttack(version="standard", noise="fixed", eot=1),
    "fixed-noise": PGD(noise="fixed", eot=1),
    "stopped": PGD(gradient="stopped"),
    "bpda": PGD(gradient="bpda", steps=50, step_size=2 / 255, eot=15),
    "classifier": PGD(gradient="classifier", steps=40, step_size=2 / 255, eot=1),
    "adaptive-guided": AdaptiveGuided(),
    "diffhammer": APGD(
        steps=50, restarts=3, eot=10, loss="margin", draw_weights="em", gradient_averaging=0.5
    ),
    "diffattack": APGD(deviation=1.0),
    "pgd-low-frequency": PGD(low_frequency=0.25),
    "square": Square(),
}
"""The attack of each name; the module's table says what they are and where they come from."""


def preset(name: str, **changes: Unpack[AttackOptions]) -> Attack:
    """The attack of that name, with these options changed.

    Unless step_size is given, PGD's step keeps its proportion to eps (for "pgd-l2" to eps / steps):
    half the radius halves the step.

    Args:
        name: a key of `PRESETS`.
        **changes: options of the attack, as `PGD`, `APGD` or `AutoAttack` takes them.

    Raises:
        ValueError: the name is unknown (the message lists those that exist), or an option is out of
            range.
        TypeError: the attack does not have such an option, or it is of the wrong kind.
    """
    checks.choice("attack", name, PRESETS)
    attack = PRESETS[name]
    if isinstance(attack, PGD) and "step_size" not in changes:
        norm = units.norm(changes.get("norm", attack.norm))
        eps = units.length("eps", changes.get("eps", attack.eps), norm)
        step_size = attack.step_size * eps / attack.eps
        if name == "pgd-l2":
            steps = checks.integer("steps", changes.get("steps", attack.steps), 1, MAX_COUNT)
            step_size *= attack.steps / steps
        changes["step_size"] = step_size
    return attack.replace(**changes)
