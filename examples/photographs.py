"""A folder of photographs, each purified at the network's size and written at its own.

    python examples/photographs.py photographs cleaned

The bundled network sees 32x32 pixels, so photographs come back as blurred as that. With a network
of your pictures' size leave `resize` out.
"""

import argparse
from pathlib import Path

from PIL import Image

import coup_fast
from coup_fast.integrations.pictures import picture_id, purify_image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pictures", type=Path)
parser.add_argument("out", type=Path)
args = parser.parse_args()

score_model, classifier = coup_fast.load_bundled("cifar10")
settings = coup_fast.models.bundled_settings("cifar10")["methods"]["coup"]
purifier = coup_fast.Purifier(score_model, classifier, method="coup", **settings)

args.out.mkdir(parents=True, exist_ok=True)
known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
for path in sorted(args.pictures.iterdir()):
    if path.suffix.lower() not in known:
        print(f"{path.name}: left out, no picture")
        continue
    # The noise goes by the name, so a picture's result does not depend on the others.
    clean = purify_image(
        path, purifier, resize=32, convert_color=True, sample_id=picture_id(path.name)
    )
    clean.save(args.out / path.name)
    print(f"{path.name}: {clean.width} x {clean.height}, {clean.mode}")
