"""One evaluation on several processes or GPUs; the report is that of a single process.

    torchrun --nproc-per-node=2 examples/distributed.py --out results

Every process runs this file. `evaluate` shares out the batches, and returns the report on rank 0.
"""

import argparse

import torch

from coup_fast.evaluation import evaluate, from_dict

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=32)
parser.add_argument("--out", default="results")
args = parser.parse_args()

config = from_dict(
    {
        "models": "mnist",
        "draws": 4,
        "batch_size": 4,  # a unit of work: each process takes one at a time
        "controls": False,
        "data": {"name": "digits", "images": args.images},
        "defence": [{"method": "diffpure-short", "options": {"num_steps": 5}}],
        "attack": [{"preset": "pgd40", "eps": 0.15, "steps": 2, "eot": 2}],
    }
)
device = "cuda" if torch.cuda.is_available() else "cpu"  # "cuda": one GPU for each process
report = evaluate(config, args.out, device=device, say=print)
if report is not None:
    print(report.table())
