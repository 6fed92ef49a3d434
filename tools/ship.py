"""Makes pretrained/shapes, from which sample.py draws until there is a runs/shapes/autoencoder.pt: a run's
weights alone, in half precision, the averaged ones of stages 2 and 3.

    python tools/ship.py runs/shapes
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEPT = ("stage", "step", "args", "config", "classes", "fps", "shape", "fingerprint", "encodings", "image_autoencoder",
        "text_encoder")


def main():
    parser = data.Flags(__doc__)
    parser.add_argument("run_dir", help="trained run folder of the shapes preset")
    args, out = parser.parse_args(), os.path.join(ROOT, "pretrained", "shapes")
    os.makedirs(out, exist_ok=True)
    for stage in data.SCRIPTS:
        state = data.load_checkpoint(f"{args.run_dir}/{stage}.pt", stage)
        small = {name: state[name] for name in KEPT if name in state}
        for name in ("model",) if stage == "autoencoder" else ("ema",):
            small[name] = {key: tensor.half() for key, tensor in state[name].items()}
        data.save_checkpoint(f"{out}/{stage}.pt", small)
        print(f"{out}/{stage}.pt: {os.path.getsize(f'{out}/{stage}.pt') / 1e6:.1f} MB")


if __name__ == "__main__":
    data.launch(main)
