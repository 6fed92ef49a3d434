"""Why your FVD differs: scores two sets as fvd.py does, then under the usual variations of the protocol.

    python tools/variations.py UCF-101 samples --split trainlist01.txt --i3d i3d_torchscript.pt --num 2048
    python tools/variations.py REAL FAKE --i3d i3d_torchscript.pt i3d_pretrained_400.pt     # a second detector as well
    python tools/variations.py shapes samples --i3d random --num 24                         # try it out

Each line changes one thing, and says by how much that moves the figure. `another seed` takes other clips of REAL, and
of FAKE where it has more than --num: what moves the figure no more than this is noise. Rows that resize REAL are left
out where it has FAKE's size already. About ten times the work of fvd.py.
"""

import os
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import fvd

# How a clip is read: read(videos, stem, number, size) -> uint8 (L, H, W, 3)


def plain(videos, stem, number, size):
    return videos.read(stem, size, number=number)


def first(videos, stem, number, size):
    return videos.read(stem, size, first=True)


def recoded(videos, stem, number, size):
    """Through the .mp4 that sample.py writes without --lossless."""
    clip = plain(videos, stem, number, size)
    with tempfile.TemporaryDirectory() as folder:
        data.write_video(f"{folder}/clip.mp4", clip, 8)
        return data.read_clip(f"{folder}/clip.mp4", len(clip))[:, : clip.shape[1], : clip.shape[2]]


def own_size(videos, stem, number, size):
    return videos.read(stem, None, number=number)


def resized(videos, stem, number, size, crop, antialias):
    """The whole picture, or its middle with the shape of `size`, resized bilinearly."""
    clip = torch.from_numpy(own_size(videos, stem, number, size)).permute(0, 3, 1, 2).float()  # (L, 3, H, W)
    if crop:
        scale = min(side / goal for side, goal in zip(clip.shape[2:], size))
        height, width = (round(goal * scale) for goal in size)
        top, left = (clip.shape[2] - height) // 2, (clip.shape[3] - width) // 2
        clip = clip[:, :, top : top + height, left : left + width]
    clip = F.interpolate(clip, tuple(size), mode="bilinear", antialias=antialias)
    return clip.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def squashed(*clip):
    return resized(*clip, crop=False, antialias=True)


def unfiltered(*clip):
    return resized(*clip, crop=True, antialias=False)


class Scores:
    """Features of both sets, each computed once: an array (N, 400) for each way to read, seed and detector."""

    def __init__(self, args, real, fake, detectors, size):
        self.args, self.sets, self.detectors, self.size, self.known = args, (real, fake), detectors, size, {}

    def features(self, side, read, seed, detector):
        key = side, read, seed, detector
        if key not in self.known:
            videos, network = self.sets[side], self.detectors[detector]
            videos.args = SimpleNamespace(**vars(self.args) | dict(seed=seed))
            rows = fvd.for_each_video(
                videos, lambda stem, number: read(videos, stem, number, self.size),
                lambda clips: [network([clip])[0] for clip in clips],  # one by one: they may differ in size
                videos.args, f"{('REAL', 'FAKE')[side]}, {read.__name__}", several=side == 0)
            self.known[key] = np.random.default_rng(seed).permutation(np.array(rows, np.float64))
        return self.known[key]

    def fvd(self, real=plain, fake=plain, share=1.0, seed=None, less=0, detector=0):
        """The figure; share: of the clips of both sets; less: what is taken from N where the covariance is divided."""
        seed, moments = self.args.seed if seed is None else seed, []
        for side, read in enumerate((real, fake)):
            rows = self.features(side, read, seed, detector)
            stats = fvd.Statistics().add(rows[: max(2, round(share * len(rows)))])
            moments.append(SimpleNamespace(mean=stats.mean, cov=stats.outer / (stats.num - less)))
        return fvd.frechet(*moments), stats.num


def table(scores):
    """Yields (what is varied, FVD, its N); the first is fvd.py's own."""
    yield "as fvd.py does it", *scores.fvd()
    yield "another seed: other clips", *scores.fvd(seed=scores.args.seed + 1)
    for share in (0.5, 0.25):
        yield f"N: {share:.0%} of the clips of both", *scores.fvd(share=share)
    yield "covariance over N - 1", *scores.fvd(less=1)
    yield "first frames of REAL's videos, not random ones", *scores.fvd(real=first)
    yield "codec: FAKE through .mp4 (H.264)", *scores.fvd(fake=recoded)
    yield "codec: both through .mp4", *scores.fvd(real=recoded, fake=recoded)
    if scores.sets[0].native_size() != tuple(scores.size):
        yield "size: REAL as it is, the detector alone resizes", *scores.fvd(real=own_size)
        yield "size: REAL squashed to FAKE's shape, not cropped", *scores.fvd(real=squashed)
        yield "size: REAL resized bilinearly without a filter", *scores.fvd(real=unfiltered)
    for number, detector in list(enumerate(scores.detectors))[1:]:
        yield f"detector: {fvd.KINDS[detector.kind][0]}", *scores.fvd(detector=number)


def main(argv=None):
    parser = data.Flags(__doc__)
    parser.add_argument("real", metavar="REAL", help="folder of videos or of folders of frames, or shapes")
    parser.add_argument("fake", metavar="FAKE", help="the same")
    add = parser.add_argument
    add("--i3d", nargs="+", required=True, metavar="FILE", help="as fvd.py's; further ones are a variation")
    add("-n", "--num", type="count", help="as fvd.py's")
    add("--frames", type="count", default=16, help="as fvd.py's")
    add("--size", type="count", nargs="+", help="as fvd.py's")
    add("--stride", type="count", default=1, help="as fvd.py's")
    add("--seed", type="whole", default=0, help="as fvd.py's")
    add("--split", help="as fvd.py's")
    add("--batch-size", type="count", default=4, help="videos that are read together")
    add("--workers", type="count", default=4, help="threads that read videos")
    args = parser.parse_args(argv)
    args.rank, args.world, args.device, _ = data.start(args)
    real, fake = fvd.VideoSet(args.real, args, args.split, args.stride), fvd.VideoSet(args.fake, args)
    detectors = [fvd.load_detector(path, args.device) for path in args.i3d]
    scores, base = Scores(args, real, fake, detectors, args.size or list(fake.native_size())), None
    print(f"{args.real} against {args.fake}, {args.frames} frames of {scores.size[0]}x{scores.size[1]}, codecs "
          f"{real.codec()} and {fake.codec()}, {fvd.KINDS[detectors[0].kind][0]}")
    for what, value, num in table(scores):
        base = value if base is None else base
        print(f"{what:52} N {num:6}   FVD {value:10.2f}   {value - base:+10.2f}", flush=True)


if __name__ == "__main__":
    data.launch(main)
