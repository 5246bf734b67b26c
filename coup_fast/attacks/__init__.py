"""Attacks on a defence, with the exact gradient of its purification.

    adversarial = PGD(eps=8 / 255, steps=40, eot=8)(defended, images, labels, sample_ids=ids)

`PGD` and `APGD` average their gradients over draws (EOT). `preset("pgd-linf")` and others have
published settings. `.run(…)` also returns losses and counts network calls. Measure the images that
an attack returns under draws that it did not see.
"""

from coup_fast.attacks.adaptive import AdaptiveGuided
from coup_fast.attacks.apgd import APGD
from coup_fast.attacks.attack import Attack
from coup_fast.attacks.autoattack import AutoAttack
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import GRADIENTS, WEAK_GRADIENTS
from coup_fast.attacks.pgd import PGD
from coup_fast.attacks.presets import PRESETS, preset
from coup_fast.attacks.result import FIRST_ATTACK_DRAW, AttackResult, Progress
from coup_fast.attacks.square import Square

__all__ = [
    "APGD",
    "FIRST_ATTACK_DRAW",
    "GRADIENTS",
    "LOSSES",
    "PGD",
    "PRESETS",
    "WEAK_GRADIENTS",
    "AdaptiveGuided",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Progress",
    "Square",
    "preset",
]
