"""The paper's headline, computed here: what CMD and ModelScope's text-to-video take for a clip of 16 frames.

    python tools/headline.py                             # multiply-accumulates and memory, minutes; nothing is run
    python tools/headline.py --time 256 256              # and seconds a step on this machine, where both fit

The abstract: a clip of 16x512x1024 for 16.7 times less computation, with 66% less memory, 7.7 times faster. The rival
is diffusers' UNet3DConditionModel (pip install diffusers) with ModelScope's sizes; CMD's models are Stable Diffusion
2.1's U-Net, the motion DiT-XL/2 and the autoencoder. Weights are random: cost depends on sizes alone. The paper counts
the multiply-accumulates of convolutions and linear layers (as its FLOPs), without guidance, the same number of steps
for all models, the whole autoencoder once, and no image decoder. Memory: the weights in bfloat16, all of CMD's at once,
and the most that a forward pass takes beside them, without guidance and the image decoder.
"""

import argparse
import gc
import os
import statistics
import time
import unittest.mock

import bench
import numpy as np
import torch
import torch.nn.functional as F
from bench import macs
from diffusers import UNet3DConditionModel

CMD, PRESET = ("content", "motion", "autoencoder"), "webvid_sd21"
MODELS = ("ModelScope", *CMD)
SIZES = (256, 256), (512, 512), (512, 1024)


def make(name, size):
    """One of MODELS on the default device. size: height and width of the frames, in pixels."""
    if name in CMD:
        return bench.make_model(name, PRESET, size)
    return UNet3DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
                                attention_head_dim=64)


def inputs_of(name, model, size, clips=1):
    if name in ("content", "motion"):
        return bench.make_inputs(name, model, PRESET, clips, size)
    video = torch.randn(clips, 4, 16, size[0] // 8, size[1] // 8)  # Stable Diffusion's latents
    return [video] if name == "autoencoder" else [video, torch.arange(clips), torch.randn(clips, 77, 1024)]


def say(size, what, kind, theirs, ours, unit, verdict):
    print(f"16x{size[0]}x{size[1]:<5} {what:<28} {kind:<16} {theirs:>9.2f} {ours:>8.2f} {unit}  {verdict}", flush=True)


def print_macs(size):
    with torch.device("meta"):
        model = make("ModelScope", size)
        theirs = np.cumsum(macs(lambda: model(*inputs_of("ModelScope", model, size)))) / 1e12  # without, with attention
    content, motion, autoencoder = (np.cumsum(bench.forward_macs(name, PRESET, size)) / 1e12 for name in CMD)
    for what, them, us in (("a step", theirs, content + motion),
                           ("50 steps, autoencoder", 50 * theirs, 50 * (content + motion) + autoencoder)):
        for kind, a, b in zip(("layers", "with attention"), them, us):
            say(size, what, kind, a, b, "T", f"{a / b:.1f}x")
    parts = {name: full / 1e12 for name, (_, full) in bench.sampling_macs(PRESET, 50, 50, 8.5, size).items()}
    a, b = 100 * theirs[1] + parts["images"], sum(parts.values())
    say(size, "50 steps, guidance, pictures", "with attention", a, b, "T", f"{a / b:.1f}x")


def formula(q, k, v, *_, **__):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@torch.no_grad()
def memory(name, size, clips, fused):
    """(GB of weights, most GB of other tensors) of a forward pass in bfloat16, on fake tensors."""
    with torch.device("meta"):
        model = make(name, size).bfloat16().eval()
    with bench.fake(model):
        inputs = [x.bfloat16() if x.is_floating_point() else x for x in inputs_of(name, model, size, clips)]
        attention = F.scaled_dot_product_attention if fused else formula
        with unittest.mock.patch.object(F, "scaled_dot_product_attention", attention), bench.Memory(model) as used:
            model(*inputs)
    return 2e-9 * sum(p.numel() for p in model.parameters()), used.peak / 1e9


def print_memory(size):
    for fused in (True, False):
        for clips in (1, 4):
            them, *ours = (memory(name, size, clips, fused) for name in MODELS)
            us = sum(weights for weights, _ in ours) + max(most for _, most in ours)
            say(size, f"bfloat16, {clips} clip{'s' * (clips > 1)}", "fused attention" if fused else "by its formula",
                sum(them), us, "GB", f"{1 - us / sum(them):.0%} less")


@torch.no_grad()
def print_seconds(size, rounds):
    """Of the CPU (what other jobs take is left out), for a step in float32, in turns. One model at a time in memory."""
    seconds = {name: [] for name in MODELS}
    for _ in range(rounds):
        for name in MODELS:
            model = make(name, size).eval()
            inputs = inputs_of(name, model, size)
            model(*inputs)  # warms up
            for _ in range(1 if name == "ModelScope" else 3):
                start = time.process_time()
                model(*inputs)
                seconds[name].append(time.process_time() - start)
            del model
            gc.collect()
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    print(f"{torch.get_num_threads()} CPU threads, load {os.getloadavg()[0]:.1f}, medians of {rounds} turns: {medians}")
    theirs, ours = medians["ModelScope"], medians["content"] + medians["motion"] + medians["autoencoder"] / 50
    say(size, "a step, autoencoder / 50", "float32", theirs, ours, "CPU s", f"{theirs / ours:.1f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--time", type=int, nargs=2, help="measure seconds a step at this height and width too")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model, for --time")
    args = parser.parse_args()
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in make(name, SIZES[0]).parameters()) / 1e6 for name in MODELS}
    print(", ".join(f"{name} {count:,.1f} M parameters" for name, count in counts.items()))
    print(f"{'':<56} ModelScope     CMD")
    for size in SIZES:
        print_macs(size)
    for size in SIZES:
        print_memory(size)
    if args.time:
        print_seconds(args.time, args.rounds)


if __name__ == "__main__":
    main()
