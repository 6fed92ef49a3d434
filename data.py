"""The data loader that the scripts share: where clips come from, and where they go.

A clip is L frames of H x W pixels, RGB: float (3, L, H, W) in [-1, 1], or, read from a file, uint8 (L, H, W, 3) (see
to_floats). In this order: the embedded moving shapes, reading videos and pictures, data sets of videos, encodings
(stage 1 writes them, stages 2 and 3 read them), batches, writing. How a stage trains is in its own file.
"""

import atexit
import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
from fractions import Fraction

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file


def pair(size):
    """An int, (N,) or (H, W) -> (H, W)."""
    return (size, size) if isinstance(size, int) else tuple(size) * (2 // len(size))


def digest(*values):
    """16 hexadecimal digits that stand for these values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


# ---- Moving shapes: the embedded data sets --------------------------------------------------------------------------

DISTANCE = {  # about how far (x, y), in pixels from the centre, is outside a shape's edge. reach: its size. All have
    # the same area, 2 reach^2: guidance (see sample.py) exaggerates differences, and would make smaller shapes faint.
    "circle": lambda x, y, reach: np.hypot(x, y) - (2 / np.pi) ** 0.5 * reach,
    "square": lambda x, y, reach: np.maximum(np.abs(x), np.abs(y)) - 0.5**0.5 * reach,
    "triangle": lambda x, y, reach: np.maximum((2 * np.abs(x) - (y + reach)) / 5**0.5, y - reach),  # point up
}
SHAPES = tuple(DISTANCE)
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y); y grows downwards
COLOURS = {  # RGB, 0..1
    "red": (0.88, 0.35, 0.30), "orange": (0.90, 0.58, 0.28), "yellow": (0.88, 0.84, 0.35), "green": (0.40, 0.78, 0.40),
    "cyan": (0.38, 0.78, 0.82), "blue": (0.40, 0.55, 0.90), "purple": (0.72, 0.48, 0.90), "white": (0.88, 0.88, 0.88),
}
HELD_OUT = {"red square", "green circle", "blue triangle", "white triangle"}  # in no clip of the captioned shapes


def caption_of(colour, shape, move=None):
    return f"a{'n' * (colour == 'orange')} {colour} {shape}" + (f" moving {move}" if move else "")


class MovingShapes(torch.utils.data.Dataset):
    """One shape moves in one direction over a dark background: 12 classes, made on the fly. A clip depends on (seed,
    split, key) alone. `train` is endless (its length is nominal), `test` is a fixed set of other clips. captioned: for
    text to video: no classes, no pairs of colour and shape in HELD_OUT, and a third of the captions in `train` leave
    the motion out, so that one content frame has several motions."""

    classes = [f"{shape} moving {move}" for shape in SHAPES for move in MOVES]

    def __init__(self, frames=16, size=32, seed=0, split="train", captioned=False):
        self.frames, self.size, self.seed, self.endless = frames, pair(size), seed, split == "train"
        self.captioned, self.classes = captioned, [] if captioned else self.classes
        self.identity = digest("shapes", captioned, seed)
        self.about = f"moving shapes, {'with captions' if captioned else '12 classes'}, made as they are needed"

    def __len__(self):
        return 1_000_000 if self.endless else 2_400

    def frame_rate(self):
        return 8.0  # ours to choose

    def __getitem__(self, key):
        index, number = key if isinstance(key, tuple) else (key, 0)
        if not self.endless and index >= len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, not self.endless, index, number])
        label = index % (len(SHAPES) * len(MOVES))
        shape, move = SHAPES[label // len(MOVES)], list(MOVES)[label % len(MOVES)]
        names = [name for name in COLOURS if not self.captioned or f"{name} {shape}" not in HELD_OUT]
        name = names[rng.integers(len(names))]
        video = draw_clip(rng, shape, COLOURS[name], move, self.frames, self.size)
        said = None if self.captioned and self.endless and rng.random() < 1 / 3 else move
        return dict(video=video, label=0 if self.captioned else label, caption=caption_of(name, shape, said))


def draw_clip(rng, shape, colour, move, frames, size):
    """Draws a moving shape of about that colour (RGB, 0..1); rng picks place, distance and background: float32
    (3, L, H, W) in [-1, 1]."""
    height, width = size
    y, x = np.ogrid[0.5:height, 0.5:width]  # pixel centres
    # The background: two colours blended along a random direction, darker than every shape. If some were brighter, a
    # content model that is trained for minutes would generate the mean of both kinds.
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle) + 0.5
    first, second = rng.uniform(0.15, 0.4, (2, 1)) + rng.uniform(-0.08, 0.08, (2, 3))
    background = first + np.clip(ramp, 0, 1)[..., None] * (second - first)  # (H, W, 3)
    # The path: a straight line inside the frame, 0.6 to 1 times as long as the frame allows.
    reach = rng.uniform(0.29, 0.35) * min(height, width)
    free = np.array([width, height]) - 2 * reach
    travel = free * MOVES[move] * rng.uniform(0.6, 1)
    start = reach + np.maximum(0, -travel) + rng.uniform(0, 1, 2) * (free - np.abs(travel))
    centre = start + np.linspace(0, 1, frames)[:, None] * travel  # (L, 2)
    px, py = x - centre[:, 0, None, None], y - centre[:, 1, None, None]  # (L, 1, W), (L, H, 1)
    cover = np.clip(0.5 - DISTANCE[shape](px, py, reach), 0, 1)[..., None]  # (L, H, W, 1), edges anti-aliased
    colour = np.clip(colour + rng.uniform(-0.08, 0.08, 3), 0, 1)
    clip = background + cover * (colour - background)  # (L, H, W, 3)
    return torch.from_numpy(clip.astype(np.float32) * 2 - 1).permute(3, 0, 1, 2)  # (3, L, H, W)


# ---- Reading videos and pictures ------------------------------------------------------------------------------------

VIDEO_ENDINGS = tuple(".avi .mp4 .mkv .mov .webm .gif .m4v .mpg .mpeg .wmv .flv .ogv .ts .mts .m2ts .3gp .vob".split())
# Bicubic, which FFmpeg widens when it shrinks a picture, so that nothing aliases. Accurate rounding, since the fast one
# darkens by 1.5 levels; one thread, since by default FFmpeg starts one on each core for every frame.
SCALING = dict(threads=1, interpolation=(
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT))


class BadVideo(Exception):
    """A file cannot be used; str() is the reason, without the file's name."""


def find_videos(root):
    """Sorted paths in `root` of its video files, at any depth. A file that links reach too counts once."""
    files = [file for file in glob.glob("**/*", root_dir=root, recursive=True) if file.lower().endswith(VIDEO_ENDINGS)]
    real, top = {file: os.path.realpath(os.path.join(root, file)) for file in files}, os.path.realpath(root)
    files.sort(key=lambda file: (real[file] == os.path.join(top, file), -file.count(os.sep), file))
    return sorted(file for path, file in {real[file]: file for file in files}.items() if not os.path.isdir(path))


@contextlib.contextmanager
def open_video(path):
    """Yields (open file, its main video stream). BadVideo for what cannot be read, now or inside the `with`."""
    if not os.path.isfile(path):
        raise BadVideo("no such file")
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as file:  # "12:30.mp4" is no protocol
            stream = file.streams.best("video")
            if not (of := stream and stream.codec_context) or stream.disposition & av.stream.Disposition.attached_pic:
                raise BadVideo("no video stream that can be decoded")  # only a cover picture, say
            of.thread_count, of.options = 1, {"max_pixels": str(2**26), "err_detect": "explode"}  # no smeared frames
            yield file, stream
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, IndexError, StopIteration) as error:
        raise BadVideo(getattr(error, "strerror", None) or str(error)) from None


def decode(path, span, fraction):
    """Yields (frame, its pixels' aspect ratio) from the start of a clip of `span` frames on; fraction, from 0 to below
    1, chooses among all starts. Times are only used to seek, and only in files that store when each frame is shown
    (.mp4, .mkv and their kin); headers often have a wrong number of frames, so coded frames are counted."""
    with open_video(path) as (file, stream):
        index, start = [entry for entry in stream.index_entries if not entry.is_discard], None  # discarded: edit lists
        indexed = "mov" in file.format.name and len({e.timestamp for e in stream.index_entries}) == stream.frames > 0
        packets = (packet for packet in file.demux(stream) if packet.size and not packet.is_discard)
        times = [] if indexed else [packet.pts for packet in packets]
        if (count := len(index if indexed else times)) < span:
            raise BadVideo(f"too short: has {count} frame{'s' * (count != 1)}, {span} needed")
        first = int(fraction * (count - span + 1))
        if indexed:  # a large .mp4 is not read through. Frames are stored at most 16 places from where they are shown
            file.seek(index[max(0, first - 16)].timestamp, stream=stream)
            head = next(packets)
            ahead = first - [entry.timestamp for entry in index].index(head.dts)
            start = sorted(packet.pts for packet in [head, *itertools.islice(packets, ahead + 16)])[ahead]
        elif file.format.name.startswith(("mov", "matroska")) and None not in times and len({*times}) == count:
            start = sorted(times)[first]
    with open_video(path) as (file, stream):
        oblong, frame = float(stream.sample_aspect_ratio or 1), None
        if start is not None:
            file.seek(start, stream=stream)  # to the key frame before it
            frames = itertools.dropwhile(lambda frame: frame.pts is None or frame.pts < start, file.decode(stream))
            with contextlib.suppress(av.error.FFmpegError):  # frames after an open GOP's key frame need those before it
                frame = next(frames, None)
            if frame and frame.pts == start:
                yield from ((frame, oblong) for frame in itertools.chain([frame], frames))
                return
    with open_video(path) as (file, stream):  # without times, or where seeking missed the frame
        yield from ((frame, oblong) for frame in itertools.islice(file.decode(stream), first, None))


def read_clip(path, frames, size=None, stride=1, rng=None):
    """Every `stride`-th frame of a video, `frames` in all, in the decoder's order, RGB: np.uint8 (L, H, W, 3).

    size: int or (H, W); the picture is resized until it just covers H x W, and its centre is cut out; None keeps the
    file's size. rng: a numpy Generator that chooses the start, uniformly among those that leave room for the clip; None
    starts at the first frame. Rotated videos come out upright, oblong pixels square. BadVideo: damaged or too short."""
    span = (frames - 1) * stride + 1
    for fraction in [rng.random(), 0.0] if rng else [0.0]:  # where a file is damaged, its first frames may be whole
        try:
            scaler, chosen = VideoReformatter(), itertools.islice(decode(path, span, fraction), 0, span, stride)
            clip = [resize(frame, oblong, size, scaler) for frame, oblong in chosen]
            if len(clip) < frames:
                raise BadVideo(f"damaged: only {len(clip)} of {frames} frames can be decoded")
            return np.stack(clip)
        except (BadVideo, OSError, ValueError) as error:  # unknown colours, frames that change their size
            fault = BadVideo(getattr(error, "strerror", None) or str(error))
    raise fault


def resize(frame, oblong, size, scaler):
    """A decoded frame, upright, with square pixels, cut to (H, W): uint8 (H, W, 3)."""
    if frame.is_corrupt:
        raise BadVideo("damaged: frames are corrupt")
    wide = frame.width * oblong  # in square pixels
    matrix = np.frombuffer(frame.side_data.get("DISPLAYMATRIX", np.eye(3, dtype=np.int32)), np.int32).astype(float)
    turns = round(frame.rotation / 90) if matrix[0] * matrix[4] > matrix[1] * matrix[3] else 0  # mirrored: as stored
    H, W = (frame.height, round(wide)) if size is None else pair(size)[:: -1 if turns % 2 else 1]
    scale = max(H / frame.height, W / wide)
    height, width = max(H, round(frame.height * scale)), max(W, round(wide * scale))
    if height * width > 2**26:
        raise BadVideo(f"frames of {frame.width}x{frame.height} are too large or too oblong")
    picture = scaler.reformat(frame, width, height, "rgb24", **SCALING).to_ndarray()
    return np.rot90(picture[(height - H) // 2 :, (width - W) // 2 :][:H, :W], turns)


def read_picture(path, size=None):
    """A still picture, upright, on white where it is transparent: np.uint8 (H, W, 3). size: as in read_clip."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
            picture = Image.fromarray((np.asarray(picture).astype(np.float64) / 257).round().astype(np.uint8))
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = picture.convert("RGB")
        return np.array(ImageOps.fit(picture, pair(size)[::-1], Image.Resampling.BICUBIC) if size else picture)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadVideo(str(error)) from None


def to_floats(video):
    """uint8 (..., L, H, W, 3) -> float (..., 3, L, H, W) in [-1, 1]. What is float already stays."""
    return video if video.is_floating_point() else video.movedim(-1, -4) / 127.5 - 1


# ---- Data sets of videos --------------------------------------------------------------------------------------------

class Videos(torch.utils.data.Dataset):
    """Clips of video files. Items: dict(video uint8 (L, H, W, 3), label int, caption str). A key is an index, or
    (index, number), where number, the epoch in training, says which of the video's random clips; the same key and seed
    give the same clip anywhere. An unusable file is named on stderr once, and another, chosen by the same numbers,
    takes its place; with replace = False the item is None. rows: (path in `root`, label, caption) each."""

    replace = True

    def __init__(self, root, rows, classes, frames, size, stride, seed, about=""):
        paths, labels, captions = zip(*rows)
        text = np.dtypes.StringDType()  # no Python objects, whose reference counts would copy them into every worker
        self.paths, self.labels, self.captions = np.array(paths, text), np.array(labels), np.array(captions, text)
        self.root, self.classes, self.text = root, classes, about
        self.frames, self.size, self.stride, self.seed = frames, pair(size), stride, seed
        self.identity = digest(rows, classes)
        self.named = torch.zeros(len(rows), dtype=torch.bool).share_memory_()  # with the loader's processes

    def __len__(self):
        return len(self.paths)

    @property
    def about(self):
        return f"{self.text}; {int(self.named.sum())} too short or unreadable so far"

    def path(self, index):
        return os.path.join(self.root, self.paths[index])

    def stamp(self, index):
        stat = os.stat(self.path(index)) if os.path.exists(self.path(index)) else None
        return repr(stat and (stat.st_size, stat.st_mtime_ns)).encode()

    def __getitem__(self, key):
        index, number = key if isinstance(key, tuple) else (key, 0)
        others = np.random.default_rng([self.seed, index, number, 1]).integers(len(self), size=19).tolist()
        for chosen in [index, *others] if self.replace else [index]:
            try:
                rng = np.random.default_rng([self.seed, chosen, number])
                clip = read_clip(self.path(chosen), self.frames, self.size, self.stride, rng)
                return dict(video=torch.from_numpy(clip), label=int(self.labels[chosen]), caption=self.captions[chosen])
            except BadVideo as error:
                fault = f"{self.path(chosen)!r}: {error}"
                if not self.named[chosen]:
                    print(f"\nleft out: {fault}", file=sys.stderr, flush=True)
                self.named[chosen] = True
        if self.replace:
            raise RuntimeError(f"20 videos in a row cannot be used; the last is {fault}")

    def frame_rate(self):
        """Frames a second of the clips at the videos' own speed: the median of 20 videos, divided by the stride."""
        rates = []
        for index in np.linspace(0, len(self) - 1, 20).astype(int):
            with contextlib.suppress(BadVideo, ZeroDivisionError), open_video(self.path(index)) as (file, stream):
                times = [packet.pts or 0 for packet in itertools.islice(file.demux(stream), 100) if packet.size]
                seconds = (max(times) - min(times)) * stream.time_base  # for files whose header has no rate
                rates.append(float(stream.average_rate or (len(times) - 1) / seconds))
        return float(np.median(rates or [8.0])) / self.stride


def read_text(path):
    """A text file in UTF-8."""
    try:
        return open(path, "rb").read().decode("utf-8-sig")
    except OSError as error:
        raise SystemExit(str(error)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SystemExit(f"{path}, line {line}, is not in UTF-8: save the file in that encoding") from None


def folder_rows(root, split=None):
    """([(path in root, label, caption)], class names, what to say about them) of a folder of videos.

    A class is a first-level folder, as in UCF-101: root/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi; without such
    folders the label is 0. A caption is what the .txt beside the video says, or else the class in words ("apply eye
    makeup"). split: the path of a list such as UCF-101's trainlist01.txt; only its videos are used."""
    files = find_videos(root)
    classes = sorted({file.split(os.sep)[0] for file in files if os.sep in file})
    kept = [file for file in files if os.sep in file or not classes]
    about = f"; {len(files) - len(kept)} outside its class folders left out" * (len(kept) < len(files))
    if split:  # lines such as "Archery/v_Archery_g08_c01.avi 3"; .avi may have become .mp4
        listed = {os.path.splitext(re.sub(r"\s+\d+$", "", line))[0] for line in read_text(split).splitlines() if line}
        kept = [file for file in kept if os.path.splitext(file)[0].replace(os.sep, "/") in listed]
        about += f"; {len(kept)} of the {len(listed)} that {split} lists"
    if not kept:
        raise SystemExit(f"{root}: no such folder, or no videos in it{about}; looked for {' '.join(VIDEO_ENDINGS)}")
    rows = []
    for file in kept:
        name, text = file.split(os.sep)[0] if classes else "", os.path.join(root, os.path.splitext(file)[0] + ".txt")
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+", " ", name).strip().lower()
        caption = " ".join(read_text(text).split()) if os.path.exists(text) else words
        rows.append((file, classes.index(name) if classes else 0, caption))
    return rows, classes, about


def csv_rows(path):
    """The same of a CSV with the columns path, caption or WebVid's videoid, page_dir, name."""
    rows, bad, reader = [], [], csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        webvid = "videoid" in (columns := set(reader.fieldnames or ()))
        if not columns >= ({"videoid", "page_dir", "name"} if webvid else {"path", "caption"}):
            raise SystemExit(f"{path}: needs the columns path, caption or videoid, page_dir, name; has {columns}")
        for row in reader:
            if None in row or None in row.values():
                bad.append(reader.line_num)
            elif webvid:
                rows.append((os.path.join(row["page_dir"], row["videoid"] + ".mp4"), 0, row["name"]))
            else:
                rows.append((row["path"], 0, row["caption"]))
    except csv.Error as error:
        raise SystemExit(f"{path}, line {reader.line_num}: {error}; is a quote not closed?") from None
    about = f"; {len(bad)} rows left out, with more or fewer columns than the header (a caption with a comma needs " \
            f"quotes): lines {bad[:20]}" * bool(bad)
    if not rows:
        raise SystemExit(f"{path}: no rows that can be used{about}")
    return rows, [], about


def open_dataset(data, frames, size, stride=1, split=None, captions=None, seed=0, everything=False):
    """(training set, its indices or None for endless, test set, its indices) of what --data names: 'shapes' or
    'shapes_text' (with captions), a folder of videos, or a CSV. captions: a CSV whose paths start from `data`.

    Test clips are those of testlistNN.txt where --split is trainlistNN.txt and the other lies beside it; else one file
    in fifty, at most about 64, or all for `everything`. A hash of the path chooses them: with more videos no training
    file becomes one of them."""
    if data in ("shapes", "shapes_text"):
        if split or captions or stride > 1:
            raise SystemExit(f"--split, --captions and --stride are for videos, and --data is {data}: drop them")
        train, test = (MovingShapes(frames, size, seed, part, data != "shapes") for part in ("train", "test"))
        return train, None, test, range(len(test))
    listed = captions or data.endswith(".csv")
    if split and listed:
        raise SystemExit("--split is for a folder of videos without --captions: drop it")
    root = data if captions or not listed else os.path.dirname(os.path.abspath(data))
    rows, classes, about = csv_rows(captions or data) if listed else folder_rows(data, split)
    about = (f"{data}: {len(rows)} videos, {len(classes) or 'no'} classes{' ' * bool(classes)}"
             f"{', '.join(classes[:3])}{', ...' * (len(classes) > 3)}{about}; {len({row[2] for row in rows})} captions")
    hashed, other = sorted(rows, key=lambda row: digest(row[0])), split and split.replace("trainlist", "testlist")
    if split != other and os.path.exists(other):
        tests = sorted(folder_rows(data, other)[0], key=lambda row: digest(row[0]))
    elif everything or len({row[0] for row in rows}) < 4:
        tests, about = hashed, about + "; too few to keep one for testing: training clips are used" * (not everything)
    else:
        limit = max(min(1 / 50, 64 / len(rows)) * 2**32, int(digest(hashed[0][0])[:8], 16) + 1)  # at least one video
        kept = sum(int(digest(row[0])[:8], 16) < limit for row in rows)
        rows, tests, about = sorted(hashed[kept:]), hashed[:kept], f"{about}; {kept} of them for testing"
    train, test = (Videos(root, part, classes, frames, size, stride, seed, about) for part in (rows, tests))
    return train, range(len(train)), test, range(len(test))


# ---- Encodings: what stage 1 writes, and stages 2 and 3 read --------------------------------------------------------
# encodings/shard-00000.safetensors, up to --shard-size clips each; the last one holds up to 64 test clips:
#   content float16 (N, C, H, W), motion float16 (N, D, L, H'+W') as the autoencoder gives it, label int64 (N,),
#   sums float64 (2, D), of the motion and of its square, by channel; metadata: captions (JSON), identity (see stage 1)

def write_shard(run_dir, number, identity, content, motion, labels, captions):
    """Writes a shard whole or not at all."""
    path = f"{run_dir}/encodings/shard-{number:05d}.safetensors"
    sums = torch.stack([motion.double().pow(power).sum((0, 2, 3)) for power in (1, 2)])
    tensors = dict(content=content, motion=motion.contiguous(), label=torch.tensor(labels, dtype=torch.long), sums=sums)
    save_file(tensors, f"{path}.tmp", dict(identity=identity, captions=json.dumps(captions)))
    os.replace(f"{path}.tmp", path)


@functools.lru_cache(maxsize=128)
def open_shard(run_dir, number):
    """(memory-mapped safetensors file, captions, identity), or three times None where there is no such shard."""
    if not os.path.exists(path := f"{run_dir}/encodings/shard-{number:05d}.safetensors"):
        return None, None, None
    shard = safe_open(path, "pt")
    return shard, json.loads(shard.metadata()["captions"]), shard.metadata()["identity"]


class EncodedClips(torch.utils.data.Dataset):
    """The encodings of a run folder. Items: content (C, H, W) and motion (D, L, H'+W') float32, label int, caption str.
    stage1: its autoencoder.pt, whose identity every shard must have."""

    def __init__(self, run_dir, stage1):
        counts = stage1["encodings"] or []  # the number of clips in each shard; the shard after these is of test clips
        self.run_dir, self.last, self.starts = run_dir, len(counts), np.cumsum([0, *counts])
        if not counts or {open_shard(run_dir, number)[2] for number in range(len(counts) + 1)} != {stage1["identity"]}:
            raise SystemExit(f"{run_dir} has no encodings, or not all of its autoencoder's: `python autoencoder.py "
                             f"--run-dir {run_dir} --encode` makes them (after training, if that has not ended)")
        self.content_shape, self.motion_shape = (
            tuple(open_shard(run_dir, self.last)[0].get_slice(name).get_shape()[1:]) for name in ("content", "motion"))

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, key):
        index = range(len(self))[key[0] if isinstance(key, tuple) else key]  # IndexError beyond the end
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = int(index - self.starts[number])
        shard, captions, _ = open_shard(self.run_dir, number)
        item = {name: shard.get_slice(name)[row].float() for name in ("content", "motion")}
        return item | dict(label=int(shard.get_slice("label")[row]), caption=captions[row])

    def test_clips(self):
        """A batch of the encodings of up to 64 test clips: a dict of content, motion, label and caption."""
        shard, captions, _ = open_shard(self.run_dir, self.last)
        batch = {name: shard.get_tensor(name).float() for name in ("content", "motion")}
        return batch | dict(label=shard.get_tensor("label"), caption=captions)


def load_checkpoint(path):
    """What a stage saved, memory-mapped, on the CPU. Nothing in the file is executed."""
    if not os.path.exists(path):
        raise SystemExit(f"no {path}: train that stage first, or name another --run-dir")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


# ---- Batches --------------------------------------------------------------------------------------------------------

def batch_keys(indices, batch_size, seed, step, rank, world):
    """Yields a rank's batches of keys (index, epoch) forever, from `step` on. Step s reads positions s*B to (s+1)*B - 1
    of an endless sequence, of which each rank takes its share; position p is clip p mod n of the shuffle of epoch p div
    n. So training that is resumed, on any number of ranks, goes on at the very next clip. indices: of the clips to use;
    None for an endless data set, whose every position is a clip."""
    share, now = batch_size // world, None
    for first in itertools.count(step * batch_size + rank * share, batch_size):
        keys = []
        for position in range(first, first + share):
            epoch, place = divmod(position, len(indices)) if indices else (0, position)
            if indices and epoch != now:  # also within a batch
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                now, order = epoch, torch.randperm(len(indices), generator=generator)
            keys.append((indices[order[place]] if indices else place, epoch))
        yield keys


def load(dataset, keys, workers):
    """Iterates over the batches of an iterable of lists of keys. workers: loader processes."""
    atexit.register(lambda: [child.kill() for child in torch.multiprocessing.active_children()])  # see start_worker
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate, worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available()))


def collate(items):
    """A batch of the items that are not None, or None."""
    return torch.utils.data.default_collate(items) if (items := [item for item in items if item]) else None


def start_worker(_):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a stop reaches loader processes too, and the main
        signal.signal(number, signal.SIG_IGN)  # process needs them until it has saved
    torch.set_num_threads(1)  # there are many of them


# ---- Writing videos and pictures ------------------------------------------------------------------------------------

def to_uint8(video):
    """Float (C, L, H, W) in [-1, 1], C = 3 or 1 -> np.uint8 (L, H, W, 3). What is uint8 (L, H, W, 3) already stays."""
    video = torch.as_tensor(video).detach().cpu()
    if video.dtype == torch.uint8:
        return video.numpy()
    video = video.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return video.expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().numpy()


def tile(videos, columns, gap=2, colour=0):
    """Equal videos side by side, `columns` in a row, `gap` pixels of grey level `colour` apart: uint8 (L, H, W, 3)."""
    videos = np.stack([to_uint8(video) for video in videos])  # (N, L, H, W, 3)
    pad = [(0, -len(videos) % columns), (0, 0), (0, gap), (0, gap), (0, 0)]
    videos = np.pad(videos, pad, constant_values=colour)
    return rearrange(videos, "(r c) l h w rgb -> l (r h) (c w) rgb", c=columns)[:, :-gap, :-gap]


def write_video(path, video, fps):
    """Writes a video, float (C, L, H, W) in [-1, 1] or uint8 (L, H, W, 3), or a list of them side by side in rows of 6.
    The ending chooses: .mp4, H.264 (odd sides grow by one pixel, which repeats the edge); .mkv, FFV1, whose frames
    read_clip returns to the last bit; or .gif, 256 colours, without dithering, which would make still areas flicker."""
    video = tile(video, min(6, len(video))) if isinstance(video, list) else to_uint8(video)
    ending = os.path.splitext(path)[1].lower()
    if ending == ".gif":
        L, H, W, _ = video.shape
        palette = Image.fromarray(video.reshape(L * H, W, 3)).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
        first, *rest = (Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE) for x in video)
        times = np.diff((np.arange(L + 1) * 100 / fps).round()).clip(2)  # in 1/100 s; viewers slow down shorter
        first.save(path, save_all=True, append_images=rest, duration=(times * 10).tolist(), loop=0)
        return
    if ending == ".mp4":
        video = np.pad(video, [(0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)], mode="edge")
    with av.open(path, "w") as file:
        stream = file.add_stream("ffv1" if ending == ".mkv" else "libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "bgr0" if ending == ".mkv" else "yuv420p"
        if ending == ".mp4":  # mbtree reads uninitialised memory in small pictures: other bytes each time
            stream.options = {"crf": "18", "x264-params": "mbtree=0"}
            of = stream.codec_context
            of.colorspace = of.color_primaries = of.color_trc = of.color_range = 1  # BT.709, limited range
        for i, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", **SCALING)
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_sheet(path, videos, columns, captions=None, frames=9):
    """One .png to look at: each video (see to_uint8; all of one height and width) is a strip of up to `frames` frames,
    evenly spread, under as much of its caption as fits; `columns` strips side by side. Small pictures are enlarged."""
    videos, strips = [to_uint8(video) for video in videos], []
    longest, times = min(frames, max(map(len, videos))), math.ceil(96 / min(videos[0].shape[1:3]))
    for video, caption in zip(videos, captions or itertools.repeat("")):
        video = video[np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)]
        strip = tile(video.repeat(times, 1).repeat(times, 2)[:, None], columns=longest, colour=255)[0]
        strip = Image.fromarray(np.pad(strip, [(20 if captions else 0, 0), (0, 0), (0, 0)], constant_values=255))
        ImageDraw.Draw(strip).text((0, 0), caption[:500], "black", ImageFont.load_default(14))
        strips.append(np.array(strip)[None])  # (1, H, W, 3)
    Image.fromarray(tile(strips, min(columns, len(strips)), 10, 255)[0]).save(path)
