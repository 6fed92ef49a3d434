"""Stage 1, the autoencoder: encodes a clip as one content frame and a small motion latent, and decodes it again.

Section 3.2 of the paper, equations 3 to 6. In: clips (B, C, L, H, W) in [-1, 1], or their Stable Diffusion latents.
Out: content frames (B, C, H, W), a learned weighted mean of the frames, and motion latents (B, D, L, H'+W') with
H' = H / patch, W' = W / patch. After training it encodes the data set into the run folder, for stages 2 and 3.

    python autoencoder.py                                            # moving shapes, minutes on a CPU
    python autoencoder.py --preset shapes_text                       # the same for text to video, on latents
    python autoencoder.py --preset ucf101 --data UCF-101             # or a folder of your own videos
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 autoencoder.py ...
"""

import argparse
import csv
import ctypes
import hashlib
import math
import os
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data

for option in (-1, -3) if sys.platform == "linux" else ():  # glibc's thresholds of trimming and of mmap
    ctypes.CDLL(None).mallopt(option, 2**30)  # keep freed memory: on a CPU a sixth less time

# ---- The video autoencoder and its loss -----------------------------------------------------------------------------

class FeedForward(nn.Module):
    """GEGLU: a second linear layer gates the hidden units."""

    def __init__(self, width):
        super().__init__()
        self.value, self.gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.reduce(self.value(x) * F.gelu(self.gate(x)))


class Attention(nn.Module):
    """Multi-head self-attention over time (at each location) or over space (in each frame)."""

    def __init__(self, width, heads, over):
        super().__init__()
        self.heads, self.over = heads, over
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, L, N, C = x.shape  # N = H' * W' locations
        # The axis attended over comes next to last, the others become batch and heads: over time (B, N*heads, L, d),
        # over space (B*L, heads, N, d). All views, no copies.
        shape = (B, L, N * self.heads, -1) if self.over == "time" else (B * L, N, self.heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(B, L, N, C))


class Block(nn.Module):
    """TimeSformer's divided attention: over time, then over space, then a feed-forward; pre-norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.time_norm, self.time = nn.LayerNorm(width), Attention(width, heads, "time")
        self.space_norm, self.space = nn.LayerNorm(width), Attention(width, heads, "space")
        self.ff_norm, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x):
        x = x + self.time(self.time_norm(x))
        x = x + self.space(self.space_norm(x))
        return x + self.ff(self.ff_norm(x))


class TimeSformer(nn.Module):
    """(B, L, H', W', C') -> the same shape. Learned positions, one table each for time, rows and columns."""

    def __init__(self, frames, grid, width, depth, heads):
        super().__init__()
        self.time_position = nn.Parameter(0.02 * torch.randn(frames, 1, 1, width))
        self.row_position = nn.Parameter(0.02 * torch.randn(grid[0], 1, width))
        self.column_position = nn.Parameter(0.02 * torch.randn(grid[1], width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.checkpointing = False

    def forward(self, x):
        x = x + self.time_position + self.row_position + self.column_position
        shape = x.shape
        x = x.flatten(2, 3)  # (B, L, N, C')
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.norm(x).view(shape)


class Autoencoder(nn.Module):
    """A clip <-> one content frame and one small motion latent (section 3.2, equations 3 to 6, figure 4).

    channels    C of a frame: 3 for pixels, 4 for Stable Diffusion's latents; frames: L, 1 or more
    size        H and W of a frame, an int or (H, W), divisible by `patch`
    width       C', the transformers' width; they have `depth` blocks with `heads` heads. Defaults: 47.4 M parameters
    motion_channels  D of the motion latent
    content     what the content frame is (table 4b): 'weights', learned; 'mean' of the frames; 'frame', the first one
    smooth      False: a weight for each pixel and channel, as in the paper. True: for each patch and channel, upsampled
                bilinearly (see SHAPES below)
    squash      True in pixel space: the output passes through 2 * sigmoid - 1"""

    def __init__(self, channels=4, frames=16, size=64, patch=2, width=384, motion_channels=8, depth=8, heads=8,
                 content="weights", smooth=False, squash=False):
        super().__init__()
        height, wide = (size, size) if isinstance(size, int) else size
        if height % patch or wide % patch:
            raise SystemExit(f"a frame of {height}x{wide} cannot be cut into patches of {patch}x{patch}")
        self.channels, self.frames, self.size, self.patch = channels, frames, (height, wide), patch
        self.content, self.smooth, self.squash = content, smooth, squash
        self.grid = (height // patch, wide // patch)  # (H', W')
        self.content_shape = (channels, height, wide)
        self.motion_shape = (motion_channels, frames, sum(self.grid))
        pixels = channels * patch**2  # of one patch
        # Linear layers on patches: the same as convolutions, or transposed ones, with kernel = stride = patch.
        self.embed = nn.Linear(pixels, width)
        self.encoder = TimeSformer(frames, self.grid, width, depth, heads)
        if content == "weights":
            self.to_logits = nn.Linear(width, channels if smooth else pixels)
        self.to_rows = nn.Linear(width, motion_channels)  # in the paper 1x1 convolutions, the same
        self.to_columns = nn.Linear(width, motion_channels)
        self.embed_content = nn.Linear(pixels, width)
        self.embed_rows = nn.Linear(motion_channels, width)
        self.embed_columns = nn.Linear(motion_channels, width)
        self.decoder = TimeSformer(frames, self.grid, width, depth, heads)
        self.to_frames = nn.Linear(width, pixels)
        # Of each motion channel over the encoded data set: the motion model works on (z - mean) / std.
        self.register_buffer("motion_mean", torch.zeros(motion_channels, 1, 1))
        self.register_buffer("motion_std", torch.ones(motion_channels, 1, 1))

    def patches(self, frames):
        return rearrange(frames, "... c (h p) (w q) -> ... h w (c p q)", p=self.patch, q=self.patch)

    def unpatches(self, tokens):
        return rearrange(tokens, "b l h w (c p q) -> b c l (h p) (w q)", p=self.patch, q=self.patch)

    def encode(self, video):
        """video (B, C, L, H, W) -> content (B, C, H, W) within the frames' range, motion (B, D, L, H'+W') in [-1, 1]"""
        if video.shape[1:] != (wanted := (self.channels, self.frames, *self.size)):
            raise SystemExit(f"this autoencoder takes clips (B, C, L, H, W) of {wanted}, not {tuple(video.shape[1:])}")
        u = self.encoder(self.embed(self.patches(video.transpose(1, 2))))  # (B, L, H', W', C')
        z_x = self.to_rows(u.mean(3))  # equation 4, the mean over columns: (B, L, H', D)
        z_y = self.to_columns(u.mean(2))  # and over rows: (B, L, W', D)
        motion = torch.cat([z_x, z_y], 2).tanh()  # (B, L, H'+W', D)
        return self.content_frame(video, u), motion.permute(0, 3, 1, 2)

    def content_frame(self, video, u):
        """Equation 3: a weighted mean of the frames, with weights of its own at every pixel (or patch). (B, C, H, W)"""
        if self.content != "weights":
            return video.mean(2) if self.content == "mean" else video[:, :, 0]
        logits = self.to_logits(u)
        if self.smooth:
            logits = rearrange(logits.float(), "b l h w c -> (b l) c h w")
            logits = F.interpolate(logits, self.size, mode="bilinear")
            logits = rearrange(logits, "(b l) c h w -> b c l h w", l=self.frames)
        else:
            logits = self.unpatches(logits)
        return (video * logits.float().softmax(2)).sum(2)

    def decode(self, content, motion):
        """content (B, C, H, W), motion (B, D, L, H'+W') -> video (B, C, L, H, W), within [-1, 1] where `squash`"""
        z_x, z_y = motion.permute(0, 2, 3, 1).split(self.grid, 2)  # (B, L, H', D), (B, L, W', D)
        # Equation 5: v[l, h, w] = E(content)[h, w] + E_x(z_x)[l, h] + E_y(z_y)[l, w], where each E is a linear layer
        v = self.embed_content(self.patches(content))[:, None]  # (B, 1, H', W', C')
        v = v + self.embed_rows(z_x)[:, :, :, None] + self.embed_columns(z_y)[:, :, None]  # (B, L, H', W', C')
        video = self.unpatches(self.to_frames(self.decoder(v)))  # Equation 6
        return 2 * video.float().sigmoid() - 1 if self.squash else video

    def forward(self, video, noise=0):
        """The reconstruction of a clip (B, C, L, H, W). noise: added to the motion latent, for training."""
        content, motion = self.encode(video)
        return self.decode(content, motion + noise)


def reconstruction_loss(output, video, kind, lpips=None, chosen=None):
    """Mean square ('mse') or absolute ('l1') error between clips (B, C, L, H, W), a number; with an LPIPS, plus the
    perceptual distance of frame chosen[b] of clip b (appendix B)."""
    error = output.float() - video
    loss = error.square().mean() if kind == "mse" else error.abs().mean()
    if lpips:
        frame = torch.arange(len(video), device=video.device), slice(None), chosen
        loss = loss + lpips(output[frame].float(), video[frame]).mean()
    return loss


# ---- Presets and flags ----------------------------------------------------------------------------------------------

PAPER = dict(  # appendix B; depth, heads and steps: docs/DIFFERENCES.md
    frames=16, patch=2, width=384, motion_channels=8, depth=8, heads=8, smooth=False, noise=0.0, lr=1e-5,
    betas=[0.5, 0.9], batch_size=24, steps=500_000, decay=False, clips=0, clips_per_video=1, save_every=2000,
    preview_every=2000, log_every=50, workers=8)
# Minutes on a CPU. Unlike the paper: a sixth of the width; one content weight for each patch, upsampled, because with
# one for each pixel so small a model hides the motion in the content frame, as a fine periodic pattern (a picture is in
# docs/ABLATIONS.md); noise on the motion latent, so that the decoder tolerates small errors of the motion model; MSE, a
# higher learning rate that decays, Adam's usual first beta: this training is short.
SHAPES = dict(
    data="shapes", size=[32], frames=16, channels=3, patch=4, width=64, motion_channels=8, depth=2, heads=4,
    smooth=True, noise=0.1, loss="mse", lr=2e-3, betas=[0.9, 0.99], batch_size=4, steps=1400, decay=True,
    clips=0, clips_per_video=1, save_every=500, preview_every=1000, log_every=50, workers=0)
TINY_SD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "tiny-sd.safetensors")
PRESETS = {
    "shapes": SHAPES,
    # The same on latents of 8x8, with captions. With patches of 1 `smooth` changes nothing.
    "shapes_text": dict(SHAPES, data="shapes_text", sd=TINY_SD, channels=4, patch=1),
    # Plus LPIPS with --lpips, which needs two files. 32 clips of each video: stages 2 and 3 see each video 3,000 times.
    "ucf101": dict(PAPER, size=[64], channels=3, loss="l1", clips_per_video=32),
    "webvid_sd15": dict(PAPER, size=[512], channels=4, loss="mse"),
    "webvid_sd21": dict(PAPER, size=[512, 1024], channels=4, loss="mse"),
}

# What --resume and --encode may change; of data, captions and split only the path
CHANGEABLE = set("run_dir resume encode data captions split steps batch_size accumulate workers dtype compile "
                 "checkpointing log_every save_every preview_every".split())
ENCODING = ["clips", "clips_per_video", "shard_size"]  # --encode may change these too,
ELSEWHERE = ["stride", "seed"]  # and these if it encodes into another folder


def read_flags():
    """(flags, checkpoint to go on from or None). Defaults are the preset's, or when resuming the checkpoint's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="fills the flags below (default: shapes)")
    add("--run-dir", help="run folder, on a disk that all ranks share (default: runs/PRESET)")
    add("--resume", action="store_true", help="go on from the run folder's checkpoint, if there is one")
    add("--encode", nargs="?", const="", metavar="RUN", help="without training, encode --data with the autoencoder of "
        "the run folder, or of another one, such as pretrained/shapes")
    add("--data", help="shapes, shapes_text, a folder of videos, or a CSV of captions")
    add("--captions", help="CSV whose paths start from --data: WebVid's columns, or path,caption")
    add("--split", help="path of a list of the videos to use, such as UCF-101's trainlist01.txt")
    add("--size", type=int, nargs="+", help="pixels: one number, or height and width")
    add("--frames", type=int, help="L, frames of a clip (table 4b: 16 or 24)")
    add("--stride", type=int, default=1, help="take every n-th frame of the video: a clip spans n times the time")
    add("--sd", help="raw Stable Diffusion or image autoencoder file: clips become its latents")
    add("--patch", type=int, help="side of a patch, in pixels or latents")
    add("--width", type=int, help="C', width of the transformers")
    add("--motion-channels", type=int, help="D (table 4b: 8 or 16)")
    add("--depth", type=int, help="blocks in the encoder and in the decoder")
    add("--heads", type=int, help="attention heads, each width / heads wide")
    add("--content", choices=["weights", "mean", "frame"], default="weights", help="what the content frame is (4b)")
    add("--smooth", action=argparse.BooleanOptionalAction, help="content weights for each patch, not for each pixel")
    add("--loss", choices=["mse", "l1"], help="squared or absolute error of the frames")
    add("--lpips", nargs=2, metavar=("VGG", "LPIPS"), help="add LPIPS: vgg16-397923af.pth, LPIPS's vgg.pth")
    add("--noise", type=float, help="standard deviation of the noise on the motion latent")
    add("--steps", type=int, help="steps in all")
    add("--batch-size", type=int, help="clips in a step, over all ranks")
    add("--accumulate", type=int, default=1, help="passes into which each rank's batch is divided")
    add("--lr", type=float, help="Adam's learning rate")
    add("--decay", action=argparse.BooleanOptionalAction, help="short rise, then cosine decay of the rate to --steps")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no limit")
    add("--seed", type=int, default=0, help="of the weights, the clips, their order and the noise")
    add("--workers", type=int, help="loader processes on each rank")
    add("--dtype", choices=["float32", "bfloat16"], help="of the arithmetic (default: bfloat16 on a GPU, else float32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU, but for shapes)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="less memory, a third more time")
    add("--log-every", type=int, help="steps between rows of autoencoder.csv")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--preview-every", type=int, help="steps between pictures in previews/")
    add("--clips", type=int, help="videos to encode; 0: all, of the endless shapes 4000")
    add("--clips-per-video", type=int, help="clips from each video, each from a random start")
    add("--shard-size", type=int, default=1024, help="clips in a file")

    given = parser.parse_args()
    preset, encode = given.preset or "shapes", given.encode is not None
    run_dir, saved = given.run_dir or f"runs/{preset}", None
    path, source = f"{run_dir}/autoencoder.pt", given.encode or run_dir
    if os.path.exists(path) and not (source == run_dir if encode else given.resume):
        raise SystemExit(f"{path} exists: --resume alone goes on with it, another --run-dir starts a new run")
    if given.resume and not os.path.exists(path) and not (given.preset or given.data):
        raise SystemExit(f"no {path} to go on with: a new run needs --preset or --data beside --resume")
    if encode or os.path.exists(path):
        saved = data.load_checkpoint(f"{source}/autoencoder.pt")
    parser.set_defaults(**(saved["args"] if saved else PRESETS[preset] | dict(preset=preset)))
    args = parser.parse_args()  # again, with these as defaults; of channels and betas there are no flags
    args.run_dir, args.resume, args.encode = run_dir, given.resume, given.encode
    args.size = args.size * 2 if len(args.size) == 1 else args.size
    if len(args.size) != 2:
        parser.error("--size: one number, or height and width")
    free = CHANGEABLE | {*ENCODING * encode, *ELSEWHERE * (source != run_dir)}
    for name in saved["args"].keys() - free if saved else ():
        if getattr(args, name) != saved["args"][name]:
            raise SystemExit(f"{path} was trained with --{name.replace('_', '-')} {saved['args'][name]}, not "
                             f"{getattr(args, name)}: drop that flag, or choose another --run-dir")
    if not args.data or args.channels == 4 and not args.sd:
        raise SystemExit(f"--preset {args.preset} needs --data{', and --sd: see RECIPES.md' * (args.channels == 4)}")
    if encode and saved["step"] < args.steps:
        raise SystemExit(f"stage 1 is at step {saved['step']} of {args.steps}: --resume or add --steps {saved['step']}")
    later = any(os.path.exists(f"{run_dir}/{stage}.pt") for stage in ("content", "motion"))
    if saved and (later or not saved.get("optimizer")) and (saved["step"] < args.steps or encode and source == run_dir):
        raise SystemExit(f"{path} {'has later stages' if later else 'comes without its optimizer'}, so it and the "
                         f"encodings stay: `--encode {run_dir} --run-dir NEW` encodes with it for new stages 2 and 3")
    return args, saved


# ---- Encoding the data set, and training ----------------------------------------------------------------------------

@torch.no_grad()
def encode_dataset(args, model, image, dataset, indices, test_set, rank, world, device, autocast, stop):
    """Encodes the data set into the run folder's shards, the ranks in turn, and sets the model's mean and deviation of
    the motion latents. Returns (identity, number of clips in each shard but the last, which is of test clips).

    The identity is a hash of all that the encodings depend on. A shard that has it is kept, so that an interrupted
    encoding goes on where it stopped."""
    model.eval()
    dataset.replace = test_set.replace = False  # an unusable clip is None
    if indices is None:
        indices = range(args.clips or 4000)  # the shapes are endless
    elif args.clips and args.clips < len(indices):  # of all classes: the files are sorted by class
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(args.seed))
        indices = order[: args.clips].tolist()
    made_of = hashlib.sha256(b"".join(weight.detach().cpu().numpy().tobytes() for weight in model.parameters()))
    made_of.update(repr([args.content, args.smooth, args.size, args.stride, args.seed, args.clips_per_video,
                         args.shard_size, dataset.identity, test_set.identity]).encode())
    for clips, chosen in ((dataset, indices), (test_set, range(len(test_set)))):
        for index in chosen:
            made_of.update(b"%d " % index + (clips.stamp(index) if hasattr(clips, "stamp") else b""))
    shared, n, total = [made_of.hexdigest()[:16]], args.clips_per_video, len(indices) * args.clips_per_video
    if world > 1:  # rank 0's: copies of the videos on other disks have other dates
        dist.broadcast_object_list(shared)
    identity = shared[0]
    for path in (f"{args.run_dir}/content.pt", f"{args.run_dir}/motion.pt"):
        if os.path.exists(path) and data.load_checkpoint(path)["identity"] != identity:
            raise SystemExit(f"{path} has learned other encodings than these flags and videos, with these dates, give: "
                             f"--encode {args.run_dir} --run-dir NEW, train in NEW")
    shards = [range(total)[i : i + args.shard_size] for i in range(0, total, args.shard_size)]
    shards += [range(len(test_set))[:64]]
    size = max(1, min(args.batch_size // (world * args.accumulate), 32))  # no larger than in training, where it fits
    os.makedirs(f"{args.run_dir}/encodings", exist_ok=True)
    bar = tqdm(total=sum(map(len, shards[rank::world])), desc="encode", unit="clip", disable=rank > 0)

    def encode_shard(number):
        clips, last = shards[number], number == len(shards) - 1
        if data.open_shard(args.run_dir, number)[2] == identity:
            bar.update(len(clips))
            return
        keys = [(i, 0) if last else (int(indices[i // n]), i % n) for i in clips]
        batches, labels, captions = [keys[i : i + size] for i in range(0, len(keys), size)], [], []
        parts = [[torch.zeros(0, *shape, dtype=torch.float16) for shape in (model.content_shape, model.motion_shape)]]
        for asked, batch in zip(batches, data.load(test_set if last else dataset, batches, args.workers)):
            if stop:
                return
            bar.update(len(asked))
            if batch:
                # Not under autocast: Stable Diffusion's latents should be as precise as in its own training.
                frames = from_pixels(data.to_floats(batch["video"].to(device, non_blocking=True)), image)
                with autocast:
                    parts.append([latent.half().to("cpu", non_blocking=True) for latent in model.encode(frames)])
                labels += batch["label"].tolist()
                captions += batch["caption"]
        if device.type == "cuda":
            torch.cuda.synchronize()  # until then, copies to the CPU may be under way
        data.write_shard(args.run_dir, number, identity, *(torch.cat(part) for part in zip(*parts)), labels, captions)

    with bar:
        for first in range(0, len(shards), world):  # in rounds, so that all ranks stop after the same one
            if first + rank < len(shards):
                encode_shard(first + rank)
            stopping = stop.clone()
            if world > 1:
                dist.all_reduce(stopping)
            if stopping:
                print("stopped while encoding: --resume goes on after the shards that are written")
                sys.exit(130)
    data.open_shard.cache_clear()
    written = [data.open_shard(args.run_dir, number) for number in range(len(shards) - 1)]
    counts = [len(captions) for _, captions, _ in written]
    if not sum(counts):
        raise SystemExit(f"not one clip of {args.data} could be encoded")
    values = sum(counts) * model.frames * sum(model.grid)  # of one channel
    mean, square = sum(shard.get_tensor("sums") for shard, _, _ in written)[..., None, None] / values  # (D, 1, 1) each
    if not mean.isfinite().all():
        raise SystemExit("motion latents are NaN or infinite: stage 1 diverged, or --sd overflows in half precision")
    model.motion_mean.copy_(mean)
    model.motion_std.copy_((square - mean**2).clamp_min(1e-12).sqrt())
    if rank == 0:
        print(f"encoded {sum(counts)} clips for training; {total - sum(counts)} left out, too short or unreadable")
    return identity, counts


def load_autoencoder(run_dir, device):
    """(Autoencoder, ImageAutoencoder or None where frames are pixels, checkpoint) of a run folder, ready for use."""
    state = data.load_checkpoint(f"{run_dir}/autoencoder.pt")
    model = Autoencoder(**state["config"])
    model.load_state_dict(state["model"])
    image = state["image_autoencoder"] and open_image_autoencoder(state["image_autoencoder"], device)
    return model.requires_grad_(False).eval().to(device), image, state


def psnr(a, b):
    """Mean over clips of the PSNR in dB, for values in [-1, 1]."""
    return (10 * torch.log10(4 / (a - b).float().square().flatten(1).mean(1).clamp_min(1e-12))).mean().item()


@torch.no_grad()
def evaluate(model, image, test_set, number, picture, device, stop):
    """{psnr, psnr_of_mean_frame} in dB: of the reconstruction, and of repeating the mean frame. Writes a picture with a
    row for each of the first 8 clips: input, reconstruction, content frame."""
    model.eval()
    ours, mean, strips, test_set.replace = [], [], [], False  # an unusable clip is None
    for item in filter(None, (test_set[index] for index in range(min(number, len(test_set))))):
        if stop:  # the checkpoint comes first: torchrun waits only 30 s
            break
        video = data.to_floats(item["video"][None].to(device))
        content, motion = model.encode(from_pixels(video, image))
        output = to_pixels(model.decode(content, motion), image)
        ours.append(psnr(output, video))
        mean.append(psnr(video.mean(2, keepdim=True).expand_as(video), video))
        if len(strips) < 3 * 8:
            strips += [clip[0].cpu() for clip in (video, output, to_pixels(content[:, :, None], image))]
    model.train()
    if stop or not ours:
        return {}
    captions = ["input", "reconstruction", "content frame"] * (len(strips) // 3)
    data.write_sheet(picture, strips, columns=3, captions=captions, frames=4)
    ours, mean, count = sum(ours) / len(ours), sum(mean) / len(mean), len(ours)
    tqdm.write(f"PSNR {ours:.1f} dB on {count} test clips, repeating the mean frame {mean:.1f} dB")
    return dict(psnr=ours, psnr_of_mean_frame=mean)


def main():
    args, saved = read_flags()
    run_dir, path, encode = args.run_dir, f"{args.run_dir}/autoencoder.pt", args.encode is not None

    # Ranks and device. torchrun sets these variables; without it, this is rank 0 of 1
    rank, local, world = int(os.getenv("RANK", 0)), int(os.getenv("LOCAL_RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where something stays in float32
        torch.backends.cudnn.benchmark = True  # convolutions see the same sizes again and again
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN (pytorch issue 196678)
    if world > 1:
        dist.init_process_group()
    if args.batch_size % (world * args.accumulate):
        raise SystemExit(f"{world} ranks * --accumulate {args.accumulate} do not divide --batch-size {args.batch_size}")
    half = args.dtype == "bfloat16" or args.dtype is None and device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, half)

    # Data
    dataset, indices, test_set, _ = data.open_dataset(args.data, args.frames, args.size, args.stride, args.split,
                                                      args.captions, args.seed)
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, (saved and saved["step"], dataset.identity))
        if len(set(found)) > 1:
            raise SystemExit(f"the ranks see different checkpoints in {run_dir}, or different videos in {args.data}")
    videos = saved["videos"] if saved else dataset.identity
    if saved and not encode and videos != dataset.identity and (saved["identity"] or saved["step"] < args.steps):
        raise SystemExit(f"{path} was trained on other videos than those of {args.data}: give it those, train anew, or "
                         f"encode these by --encode {run_dir} --run-dir NEW and train stages 2 and 3 in NEW")
    first, fps = saved["step"] if saved else 0, dataset.frame_rate()
    clips = data.load(dataset, data.batch_keys(indices, args.batch_size, args.seed, first, rank, world), args.workers)

    # Model
    torch.manual_seed(args.seed)
    image_weights = saved and saved["image_autoencoder"]
    if args.sd:  # kept in half precision, since it is only read
        image_weights = image_weights or load_image_autoencoder(args.sd).state_dict()
        image_weights = {name: tensor.to(torch.float16, copy=True) for name, tensor in image_weights.items()}
    image = image_weights and open_image_autoencoder(image_weights, device)
    factor = image.factor if image else 1
    if any(n % (factor * args.patch) for n in args.size):
        raise SystemExit(f"--size {' '.join(map(str, args.size))}: both must be multiples of {factor * args.patch}")
    config = {name: getattr(args, name) for name in (
        "channels", "frames", "patch", "width", "motion_channels", "depth", "heads", "content", "smooth")}
    config |= dict(size=[n // factor for n in args.size], squash=image is None)
    model = Autoencoder(**config).to(device)
    model.encoder.checkpointing = model.decoder.checkpointing = args.checkpointing
    lpips = load_lpips(*args.lpips).to(device) if args.lpips and not encode else None
    weights, rows = list(model.parameters()), saved.get("rows", []) if saved else []
    optimizer = torch.optim.Adam(weights, lr=args.lr, betas=args.betas, fused=True)
    if saved:
        model.load_state_dict(saved["model"])
        if saved.get("optimizer"):  # models that come with the code have none
            optimizer.load_state_dict(saved["optimizer"])
        del saved  # it maps the old file, which would stay on the disk after a new one replaces it
    compiled = device.type == "cuda" and "shapes" not in args.preset if args.compile is None else args.compile
    if compiled:
        torch._dynamo.config.suppress_errors = True  # where compiling fails, go on without
        torch._functorch.config.force_non_lazy_backward_lowering = True  # so that this covers the backward pass
        for module in (model.encoder, model.decoder, *([image.encoder] if image else [])):
            module.compile(dynamic=False)
    reconstruct = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else model

    def save(step, identity=None, encodings=None):
        if rank == 0:
            torch.save(dict(
                step=step, args=vars(args), config=config, classes=dataset.classes, fps=fps, videos=videos,
                identity=identity, encodings=encodings, rows=rows, image_autoencoder=image_weights,
                model=model.state_dict(), optimizer=optimizer.state_dict() if optimizer.state else None), f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # a kill at any moment leaves the old file or the new one, whole

    # Ctrl-C, SIGTERM or a closed terminal: save and end, all ranks after the same step. A second Ctrl-C ends at once.
    stop = torch.zeros(1)

    def receive(*_):
        stop.fill_(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, receive)

    os.makedirs(f"{run_dir}/previews", exist_ok=True)
    share = args.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)  # this rank's rows of the whole batch
    parts = torch.arange(share, device=device).chunk(args.accumulate)  # rows that pass through the model together
    generator, losses, since, skipped, in_a_row = torch.Generator(device), [], time.perf_counter(), 0, 0
    last = first if encode else max(first, args.steps)
    if rank == 0:
        print(f"{dataset.about}\nautoencoder: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, steps {first} "
              f"to {last}, {path}; {device}, {'bfloat16' if half else 'float32'}{', compiled' * compiled}")
    bar = tqdm(range(first, last), initial=first, total=last, desc="autoencoder", disable=rank > 0 or first == last)
    for step in bar:
        # The random numbers of step s depend on (seed, s) alone and are made for the whole batch, of which each rank
        # takes its rows: they are the same after a resume or with another number of ranks.
        generator.manual_seed(args.seed * 1_000_003 + step)
        noise = args.noise * torch.randn(args.batch_size, *model.motion_shape, generator=generator, device=device)[mine]
        chosen = torch.randint(args.frames, (args.batch_size,), generator=generator, device=device)[mine]  # for LPIPS
        video = from_pixels(data.to_floats(next(clips)["video"].to(device, non_blocking=True)), image)

        loss = 0
        for part in parts:
            reconstruct.require_backward_grad_sync = part is parts[-1]  # DDP exchanges gradients once a step
            with autocast:
                output = reconstruct(video[part], noise[part])
            error = reconstruction_loss(output, video[part], args.loss, lpips, chosen[part]) / len(parts)
            error.backward()
            loss += error.detach()
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip if args.clip > 0 else math.inf)
        lr = args.lr
        if args.decay:  # a short rise, then a cosine fall to a hundredth
            fall = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            lr = lr * min(1, (step + 1) / (0.05 * args.steps)) * max(0.01, fall)
        optimizer.param_groups[0]["lr"] = lr
        if finite := norm.isfinite().item():  # else the step is skipped
            optimizer.step()
        optimizer.zero_grad()

        # The rest is logging, pictures and saving.
        losses, in_a_row = losses + [loss] * finite, 0 if finite else in_a_row + 1
        skipped += not finite
        if in_a_row == 5:
            raise SystemExit("5 steps in a row had a NaN or infinite loss: lower --lr, or look at the data")
        done, stopping, scores = step + 1, stop.clone(), {}  # a signal can come at any time, and all ranks must agree
        if world > 1:
            dist.all_reduce(stopping)
        due, seconds = (done == last or done % args.preview_every == 0) and not stopping, time.perf_counter() - since
        if due and rank == 0:
            picture, number = f"{run_dir}/previews/autoencoder-{done:06d}.png", 64 if done == last else 32
            scores = evaluate(model, image, test_set, number, picture, device, stop)
        if due or done % args.log_every == 0:
            average = torch.stack(losses or [loss * math.nan]).mean() / world
            if world > 1:
                dist.all_reduce(average)
            speed = len(losses) * args.batch_size / seconds
            rows.append(dict(step=done, loss=average.item(), skipped=skipped, lr=lr, grad_norm=norm.item(),
                             clips_per_second=speed, **scores))
            bar.set_postfix_str(f"loss {average:.4f}, {speed:.1f} clips/s")
            if rank == 0:
                with open(f"{run_dir}/autoencoder.csv.tmp", "w", newline="") as file:
                    table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
                    table.writeheader()
                    table.writerows(rows)
                os.replace(f"{run_dir}/autoencoder.csv.tmp", f"{run_dir}/autoencoder.csv")
            losses, since = [], time.perf_counter()
        if done == last or stopping or done % args.save_every == 0:
            save(done)
        if stopping:
            bar.close()
            print(f"stopped after step {done}, saved: --resume goes on")
            sys.exit(130)
    if encode:
        save(last)  # marks the encodings as incomplete, and keeps the flags for the next --encode
    save(last, *encode_dataset(args, model, image, dataset, indices, test_set, rank, world, device, autocast, stop))
    if world > 1:
        dist.destroy_process_group()


# ---- Appendix: Stable Diffusion's image autoencoder, and LPIPS ------------------------------------------------------

image_norm = partial(nn.GroupNorm, eps=1e-6)


class ImageResBlock(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1 = image_norm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = image_norm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class ImageAttention(nn.Module):
    """One head over all pixels of a feature map, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = image_norm(groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # (B, 1, HW, C), contiguous, as the fast kernels require, which never store the HW x HW matrix.
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None].contiguous() for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)
        return x + self.proj_out(h)


def named(**layers):
    """Layers one after another, under the raw file's names."""
    return nn.Sequential(OrderedDict(layers))


def image_level(inputs, outputs, count, groups):
    """The residual blocks of one resolution."""
    return named(block=nn.Sequential(*(ImageResBlock(outputs if i else inputs, outputs, groups) for i in range(count))))


def image_middle(width, groups):
    return named(block_1=ImageResBlock(width, width, groups), attn_1=ImageAttention(width, groups),
                 block_2=ImageResBlock(width, width, groups))


def image_encoder(channels, multipliers, blocks, groups):
    """Images (B, 3, H, W) -> moments of the latents, mean and log variance, (B, 8, H/factor, W/factor)."""
    widths = [channels * m for m in (1, *multipliers)]
    levels = [image_level(before, width, blocks, groups) for before, width in zip(widths, widths[1:])]
    for level, width in zip(levels[:-1], widths[1:]):  # (H, W) -> (H/2, W/2), padded right and below only
        level.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))
    return named(conv_in=nn.Conv2d(3, channels, 3, padding=1), down=nn.Sequential(*levels),
                 mid=image_middle(widths[-1], groups), norm_out=image_norm(groups, widths[-1]), act=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[-1], 8, 3, padding=1))


def image_decoder(channels, multipliers, blocks, groups):
    """Latents (B, 4, H/factor, W/factor) -> images (B, 3, H, W)."""
    widths = [channels * m for m in (*multipliers, multipliers[-1])]
    levels = [image_level(before, width, blocks + 1, groups) for width, before in zip(widths, widths[1:])]
    for level, width in zip(levels[1:], widths[1:]):  # (H, W) -> (2H, 2W)
        level.upsample = named(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(width, width, 3, padding=1))
    up = {str(i): level for i, level in enumerate(levels)}  # numbered from the full resolution, applied in reverse
    return named(conv_in=nn.Conv2d(4, widths[-1], 3, padding=1), mid=image_middle(widths[-1], groups),
                 up=nn.Sequential(OrderedDict(reversed(up.items()))), norm_out=image_norm(groups, widths[0]),
                 act=nn.SiLU(), conv_out=nn.Conv2d(widths[0], 3, 3, padding=1))


class ImageAutoencoder(nn.Module):
    """Stable Diffusion's image autoencoder (the same in 1.x and 2.x), with the raw file's names. It computes in its
    weights' dtype and returns float32, `chunk` images at a time to save memory. Latents are the posterior's mean, and
    `factor` times smaller than images: 8 at the published sizes, which are the defaults."""

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), blocks=2):
        super().__init__()
        self.scale = 0.18215  # scales the latents to about unit variance
        self.factor = 2 ** (len(multipliers) - 1)
        groups = min(32, channels // 4)  # of the norms: 32 at the published width, fewer in a tiny model
        self.encoder = image_encoder(channels, multipliers, blocks, groups)
        self.decoder = image_decoder(channels, multipliers, blocks, groups)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def encode(self, images, chunk=4):
        """Images (N, 3, H, W) in [-1, 1] -> scaled latents (N, 4, H/factor, W/factor)."""
        images = images.to(self.quant_conv.weight.dtype)
        moments = torch.cat([self.quant_conv(self.encoder(part)) for part in images.split(chunk)])
        return self.scale * moments[:, :4].float()

    def decode(self, latents, chunk=4):
        """Scaled latents (N, 4, H/factor, W/factor) -> images (N, 3, H, W), about in [-1, 1]."""
        latents = (latents / self.scale).to(self.quant_conv.weight.dtype)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in latents.split(chunk)]).float()


def load_image_autoencoder(path):
    """The ImageAutoencoder (float32, frozen, on the CPU) of a full Stable Diffusion file or of its own."""
    if "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in (tensors := read_checkpoint(path)):
        raise SystemExit(f"{path} is Stable Diffusion XL's, whose latents are others: this takes 1.5 and 2.1-base")
    names = ["encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"]
    tensors = find_part(tensors, "first_stage_model.", names, f"{path} holds no Stable Diffusion image autoencoder")
    tensors = {  # newer files store the attention's 1x1 convolutions as linear layers
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items() if name.startswith(("encoder.", "decoder.", "quant_", "post_quant_"))}
    return open_image_autoencoder(tensors, torch.device("cpu"), f"{path}: the image autoencoder")


def open_image_autoencoder(tensors, device, what="the run folder's image autoencoder"):
    """A frozen ImageAutoencoder with these tensors, whose shapes tell its sizes. In half precision on a GPU."""
    channels = len(tensors["encoder.conv_in.weight"])
    blocks = [name for name in sorted(tensors) if name.startswith("encoder.down.") and name.endswith("conv1.weight")]
    multipliers = [len(tensors[name]) // channels for name in blocks if ".block.0." in name]
    with torch.device("meta"):
        model = ImageAutoencoder(channels, multipliers, len(blocks) // len(multipliers))
    load_weights(model, tensors, what)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return model.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)


def from_pixels(video, image):
    """Clips (B, 3, L, H, W) as the video autoencoder takes them: latents (B, 4, L, H/factor, W/factor) with `image`."""
    if image is None:
        return video
    latents = image.encode(rearrange(video, "b c l h w -> (b l) c h w"))
    return rearrange(latents, "(b l) c h w -> b c l h w", b=len(video))


def to_pixels(video, image):
    """The inverse: (B, C, L, h, w) -> (B, 3, L, H, W) in [-1, 1]. A content frame is a clip with L = 1."""
    if image is not None:
        pixels = image.decode(rearrange(video, "b c l h w -> (b l) c h w"))
        video = rearrange(pixels, "(b l) c h w -> b c l h w", b=len(video))
    return video.float().clamp(-1, 1)


class LPIPS(nn.Module):
    """The perceptual distance of Zhang et al. (2018), VGG16 version 0.1, frozen: images (N, 3, H, W) twice, in [-1, 1],
    of at least 16x16 -> (N,), 0 for equal images."""

    def __init__(self):
        super().__init__()
        layers, inputs = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: pooling
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            inputs = width or inputs
        self.features = nn.Sequential(*layers)  # numbered as in torchvision's VGG16
        self.lin = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in (64, 128, 256, 512, 512))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def stages(self, x):
        """The five stages' last activations, with each pixel's channel vector scaled to length 1."""
        x = (x - self.mean) / self.deviation
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (3, 8, 15, 22, 29):  # the last ReLU before each pooling, and the last of all
                yield F.normalize(x.float(), eps=1e-10)

    def forward(self, images, others):
        return sum(lin((a - b).square()).mean((1, 2, 3))
                   for lin, a, b in zip(self.lin, self.stages(images), self.stages(others)))


def load_lpips(vgg_path, lpips_path):
    """LPIPS from torchvision's vgg16-397923af.pth and LPIPS's own vgg.pth (version 0.1)."""
    model, vgg, own = LPIPS(), read_checkpoint(vgg_path), read_checkpoint(lpips_path)
    tensors = {name: tensor for name, tensor in vgg.items() if name.startswith("features.")}
    tensors |= {name.replace("lin", "lin.").replace("model.1.", ""): tensor for name, tensor in own.items()}
    load_weights(model, tensors, f"--lpips {vgg_path} {lpips_path}")
    return model


# ---- Appendix: reading raw checkpoints ------------------------------------------------------------------------------

def find_tensors(tree):
    """The dictionary of tensors in what a checkpoint holds, without the levels that training programs add around it."""
    if not isinstance(tree, dict):
        return {}
    for key in ("state_dict", "ema", "model", "module", "params"):
        if inner := find_tensors(tree.get(key)):
            return inner
    return {name: tensor.detach() for name, tensor in tree.items() if isinstance(name, str) and torch.is_tensor(tensor)}


def read_checkpoint(path):
    """Raw weights: .safetensors, or PyTorch's .ckpt / .pt / .pth in its zip or old format, recognised by content.

    {name: tensor} on the CPU, in the file's dtype; most are views of the mapped file, so copy what you keep. Nothing in
    the file is executed. The levels around the tensors are left out ('state_dict', 'ema' before 'model' and so on)."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if head[8:9] == b"{":
            tensors = load_file(path)
        else:
            tensors = find_tensors(torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except (OSError, MemoryError) as error:
        raise SystemExit(f"{path} cannot be read: {error!r}") from None
    except Exception as error:  # a damaged file can raise anything
        fault = "it is half a download, or not a file of weights: download it again"
        if head.startswith(b"version https://git-lfs"):
            fault = "it is a Git LFS pointer: run git lfs pull"
        elif head.lstrip().startswith(b"<"):
            fault = "it is an HTML page, not weights: download it again"
        elif "operand" not in str(error) and ("nsupported" in str(error) or "TorchScript" in str(error)):
            fault = "it holds other objects beside weights: take the .safetensors of the same model"
        raise SystemExit(f"{path}: {fault} ({' '.join(str(error).split())[:120]!a})") from None
    for wrapper in ("module.", "_orig_mod."):  # DistributedDataParallel's and torch.compile's
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise SystemExit(f"{path} holds no tensors by name: save a state_dict(), not a whole model, with torch.save")
    return tensors


def find_part(tensors, prefix, names, what):
    """The tensors named prefix..., without it, or all where there are none. Without all of `names`, `what` is said."""
    part = {name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)} or tensors
    if set(names) <= part.keys():
        return part
    raise SystemExit(f"{what}: it holds {len(tensors)} tensors, the first named {', '.join(list(tensors)[:3])}")


def load_weights(module, tensors, what):
    """Copies {name: tensor} into a module, also on the meta device, in its dtype. `what`: how an error begins."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise SystemExit(f"{what}: {name} holds values that are not finite: the file is damaged")
    own = module.state_dict()
    tensors = {name: tensor.to(own[name].dtype if name in own else None, copy=True) for name, tensor in tensors.items()}
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise SystemExit(f"{what}: {' '.join(str(error).split())[:400]}") from None


if __name__ == "__main__":
    main()
