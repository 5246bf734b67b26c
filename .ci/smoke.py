"""An installed coup_fast, away from its source tree: the compiled operators compute."""

from importlib.metadata import distribution

import torch

import coup_fast

info = coup_fast.build_info()
assert info["extension"]["loaded"], info
assert "site-packages" in coup_fast.__file__, coup_fast.__file__
assert "Tag: cp310-abi3-" in str(distribution("coup-fast").read_text("WHEEL"))

keys = coup_fast.noise.step_keys(0, torch.arange(2), 0, 1, 48)[0]
noise = coup_fast.ops.normal(keys, (2, 3, 4, 4))
expected = coup_fast.reference.normal(keys, (2, 3, 4, 4))
assert torch.allclose(noise, expected, rtol=0, atol=1e-6), (noise - expected).abs().max()
print(f"coup_fast {coup_fast.__version__} installed and computing ({info['cpu_capability']})")
