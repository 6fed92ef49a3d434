"""Prints what sampling costs with a run's models: multiply-accumulates, seconds and memory, as in the paper's table 9.

    python tools/cost.py --run-dir runs/shapes --num 1
    python tools/cost.py --run-dir runs/webvid_sd21 --prompt "a ship in a storm" --num 1 --compile

It takes sample.py's flags and draws --num clips at once, after a few steps to warm up. It keeps no files.
"""

import os
import sys

from bench import warm_up_and_draw
from macs import sampling_macs

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import sample


def main():
    parser = sample.flags()
    parser.description = __doc__.split("\n")[0]
    args = parser.parse_args()
    sample.check_flags(args)
    if args.image or args.same_content or args.reconstruct or args.predict_motion:
        raise data.InputError("only clips drawn from noise are measured: drop --image, --same-content, --reconstruct "
                              "or --predict-motion")
    _, _, device, dtype = data.start(args)
    sampler = sample.Sampler(args, device, dtype)
    with_text = bool(sampler.content.text or sampler.motion.text)
    wishes, _ = sample.read_wishes(args, with_text, sampler.state["classes"])
    seconds, peaks = warm_up_and_draw(sampler, wishes)
    parts = sampling_macs(sampler)
    paper, full = (sum(part[i] for part in parts.values()) / 1e12 for i in (0, 1))
    print(f"a clip: {paper:.4g} TFLOPs as the paper counts (multiply-accumulates of convolutions and linear layers, "
          f"one branch of guidance, no image decoder)\n        {full:.4g} T multiply-accumulates in full: "
          + ", ".join(f"{name} {part[1] / 1e12:.4g}" for name, part in parts.items()))
    print(f"{len(wishes)} clip{'s' * (len(wishes) > 1)}: {sum(seconds.values()):.2f} s ("
          + ", ".join(f"{part} {time:.2f}" for part, time in seconds.items())
          + f"), peak memory {peaks[1] / 1e9:.2f} GB")


if __name__ == "__main__":
    data.launch(main)
