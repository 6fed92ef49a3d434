"""Makes the models that come with the code, from trained run folders: the weights alone, in half precision, of stages 2
and 3 the averaged ones.

    python tools/ship.py runs/shapes pretrained/shapes
    python tools/ship.py runs/shapes_text pretrained/shapes_text
"""

import os
import sys

import torch

run_dir, out = sys.argv[1:]
os.makedirs(out, exist_ok=True)
for stage in ("autoencoder", "content", "motion"):
    state = torch.load(f"{run_dir}/{stage}.pt", "cpu", weights_only=True)
    weights = "model" if stage == "autoencoder" else "ema"
    small = {name: state[name] for name in state if name not in ("model", "ema", "optimizer", "rows")}
    small[weights] = {name: tensor.half() for name, tensor in state[weights].items()}
    files = {name: value for name, value in state["args"].items() if name in ("sd", "text") and value}
    if not all(path.endswith("tools/tiny-sd.safetensors") for path in files.values()):
        raise SystemExit(f"{run_dir}/{stage}.pt is of {files}: it can only be of tools/tiny-sd.safetensors")
    small["args"] = state["args"] | dict.fromkeys(files, "tools/tiny-sd.safetensors") | dict(run_dir=out)
    if small.get("text_encoder"):  # the scripts read that of tools/tiny-sd.safetensors
        small["text_encoder"]["weights"] = None
    torch.save(small, f"{out}/{stage}.pt")
    print(f"{out}/{stage}.pt: {os.path.getsize(f'{out}/{stage}.pt') / 1e6:.1f} MB")
