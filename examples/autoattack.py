"""AutoAttack on a defended model, and the result judged under fresh draws.

    python examples/autoattack.py --images 16

The library is used as it is (pip install pyautoattack). Its `rand` version takes 100 iterations of
20 draws: days on a CPU for published chains, so this defence has five steps.
"""

import argparse

import torch
from pyautoattack import AutoAttack

import coup_fast
from coup_fast.data import demo_digits
from coup_fast.evaluation import Proportion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=16)
parser.add_argument("--iterations", type=int, default=100)
parser.add_argument("--draws", type=int, default=20)
args = parser.parse_args()

images, labels = demo_digits(args.images)
score_model, classifier = coup_fast.load_bundled("mnist")
purifier = coup_fast.Purifier(score_model, classifier, num_steps=5, solver="exponential")
defended = coup_fast.PurifiedClassifier(purifier, classifier, fresh_draws=True).eval()

attack = AutoAttack(defended, norm="Linf", eps=0.15, version="rand", seed=0)
attack.apgd.n_iter, attack.apgd.eot_iter = args.iterations, args.draws
adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=args.images)

# The library counts an image as broken after one wrong draw, so judge its images again.
ids = torch.arange(args.images)
for name, pixels in {"clean": images, "under AutoAttack": adversarial}.items():
    with torch.no_grad():  # each call takes new noise
        right = torch.stack([defended(pixels, ids).argmax(1) == labels for _ in range(4)])
    worst = Proportion(int(right.all(0).sum()), args.images)
    print(f"{name}: {right.float().mean():.1%} on average, worst of 4 draws {worst.percent()}")
