"""Trains another model on the moving shapes, for as many CPU seconds as CMD: a video DiT, or a 3-D U-Net.

    OMP_NUM_THREADS=1 python tools/baselines.py dit out/dit --seconds 1573     # a video DiT; repeat it to go on
    pip install video-diffusion-pytorch && OMP_NUM_THREADS=1 python tools/baselines.py unet out/unet --seconds 1573
    python tools/judge.py out/dit/seed0-guidance-2 out/unet/seed0-guidance-2

Both predict clean clips by our Diffusion, and see no clip twice.
"""

import argparse
import copy
import math
import os
import resource
import sys
import time

import torch
import torch.nn as nn
from bench import macs
from einops import rearrange

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from content_diffusion import Diffusion, DiT, ddim, guided

CLASSES, DIFFUSION = data.MovingShapes.classes, Diffusion("linear", "x")
NONE = len(CLASSES)  # the label of a dropped class


class VideoDiT(nn.Module):
    """model(x, t, labels): clips x (B, 3, 16, 32, 32), t (B,) in 0..999, labels (B,) in 0..12 -> x's shape. Patches are
    of 8 frames by 4x4 pixels: a DiT of pictures of 24 channels, the second 8 frames below the first."""

    def __init__(self, width=128, depth=4):
        super().__init__()
        self.dit = DiT(24, (64, 32), 4, width, depth, width // 32, NONE)

    def forward(self, x, t, labels):
        x = self.dit(rearrange(x, "b c (n l) h w -> b (l c) (n h) w", l=8), t, labels)
        return rearrange(x, "b (l c) (n h) w -> b c (n l) h w", l=8, n=2)


class VideoUNet(nn.Module):
    """The same with the 3-D U-Net of Ho et al. (2022), as Phil Wang wrote it, 4x4 pixels folded into channels."""

    def __init__(self, width=16, depth=3):
        super().__init__()
        from video_diffusion_pytorch import Unet3D
        self.unet = Unet3D(width, cond_dim=NONE + 1, channels=48, dim_mults=[2**i for i in range(depth)])

    def forward(self, x, t, labels):
        x = rearrange(x, "b c l (h p) (w q) -> b (c p q) l h w", p=4, q=4)
        x = self.unet(x, t, nn.functional.one_hot(labels, NONE + 1).float())
        return rearrange(x, "b (c p q) l h w -> b c l (h p) (w q)", p=4, q=4)


def train(args, folder, model):
    """Trains for --seconds of CPU time, interruptions or not. Returns (the averaged model, seconds, steps)."""
    path, ema = f"{folder}/seed{args.seed}-lr{args.lr:g}.pt", copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, step, seconds = torch.optim.Adam(model.parameters(), args.lr), 0, 0.0
    parts = model, ema, optimizer
    if os.path.exists(path):
        step, seconds, states = torch.load(path, weights_only=True)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
    clips, start, due = data.MovingShapes(16, 32, args.seed), time.process_time() - seconds, seconds + 60
    while seconds < args.seconds:
        torch.manual_seed(args.seed * 1_000_003 + step)
        batch = torch.utils.data.default_collate([clips[i] for i in range(16 * step, 16 * step + 16)])
        labels = batch["label"].where(torch.rand(16) >= 0.1, NONE)  # for guidance
        t, noise = torch.randint(1000, (16,)), torch.randn_like(batch["video"])
        loss = DIFFUSION.loss(lambda x, t: model(x, t, labels), batch["video"], t, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = seconds / args.seconds  # the learning rate rises shortly, then falls like a cosine, as in our stages
        optimizer.param_groups[0]["lr"] = args.lr * min(1, 0.001 + done / 0.05, 0.51 + 0.5 * math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters()):
                average.lerp_(weight, 1 - min(0.995, (1 + step) / (10 + step)))
        step, seconds = step + 1, time.process_time() - start
        if seconds > due or seconds >= args.seconds:
            print(f"{path}: step {step}, {seconds:.0f} CPU seconds, loss {loss.item():.4f}", flush=True)
            torch.save((step, seconds, [part.state_dict() for part in parts]), f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
            due = seconds + 60
    return ema, seconds, step


@torch.no_grad()
def draw(args, model, out):
    """Writes --num clips, of all classes in turn, and captions.txt. Returns CPU seconds a clip."""
    torch.manual_seed(args.seed)
    start, labels = time.process_time(), torch.arange(args.num) % NONE
    for first in range(0, args.num, 24):
        wanted = labels[first : first + 24]
        denoise = guided(model, wanted, torch.full_like(wanted, NONE), args.guidance)
        noise = torch.randn(len(wanted), 3, 16, 32, 32)
        for i, video in enumerate(ddim(denoise, noise, DIFFUSION, 50, bounds=(-1, 1))):
            data.write_video(f"{out}/{first + i:05d}.mkv", video, 8)
    with open(f"{out}/captions.txt", "w") as file:
        file.writelines(f"{CLASSES[label]}\n" for label in labels)
    return (time.process_time() - start) / args.num


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("what", choices=["dit", "unet"])
add("folder", help="a new one, to train in")
add("--sizes", type=int, nargs=2, default=[], help="width and depth: 128 4 (dit), 16 3 (unet) by default")
add("--seconds", type=float, default=1573, help="CPU seconds of training")
add("--lr", type=float, default=2e-3)
add("--seed", type=int, default=0)
add("--num", type=int, default=240, help="clips to draw")
add("--guidance", type=float, default=2.0, help="1: none")
args = parser.parse_args()
torch.manual_seed(args.seed)
model = (VideoDiT if args.what == "dit" else VideoUNet)(*args.sizes)
cost = sum(macs(lambda: model(torch.zeros(1, 3, 16, 32, 32), torch.zeros(1), torch.zeros(1).long()))) / 1e9 * 50
os.makedirs(out := f"{args.folder}/seed{args.seed}-guidance-{args.guidance:g}", exist_ok=True)
model, seconds, steps = train(args, args.folder, model)
each, memory = draw(args, model, out), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{out}: {steps} steps in {seconds:.0f} CPU seconds; a clip {cost * (1 + (args.guidance != 1)):.1f} GMACs, "
      f"{each:.2f} CPU seconds; {memory:.2f} GB")
