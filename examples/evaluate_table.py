"""Several defences under several attacks, as one table with intervals.

    python examples/evaluate_table.py --images 64 --out results

Run it again after a stop: finished batches are kept in the folder.
"""

import argparse
from pathlib import Path

from coup_fast.evaluation import evaluate, from_dict

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=16)
parser.add_argument("--steps", type=int, default=10, help="of the strong attack")
parser.add_argument("--out", default="results")
args = parser.parse_args()

short = {"num_steps": 5, "solver": "exponential"}
config = from_dict(
    {
        "models": "mnist",
        "draws": 4,
        "data": {"name": "digits", "images": args.images},
        "defence": [
            {"name": "COUP", "method": "coup", "options": short},
            {"name": "DiffPure", "method": "diffpure", "options": short},
        ],
        "attack": [
            {"preset": "pgd40", "eps": 0.15, "steps": args.steps, "eot": 4},
            {"preset": "classifier", "eps": 0.15},
        ],
    }
)
report = evaluate(config, args.out, say=print)
assert report is not None  # only the first of several processes gets it
print(report.table("markdown"))
report.write(Path(args.out))  # report.json, .md, .csv and plots
