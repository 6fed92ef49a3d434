"""What the scripts share. Stage 1 (autoencoder.py) turns a clip into one content frame, a picture, and a motion latent,
a small array. Stages 2 and 3 (content_diffusion.py, motion_diffusion.py) learn to generate these two; sample.py
generates both and decodes them. A clip is a float tensor (3, L, H, W) in [-1, 1]: L frames of H x W pixels.

In order: the embedded moving shapes; reading videos; data sets of videos; writing videos; encodings, which stage 1
writes and stages 2 and 3 read; batches; checkpoints and logs; the start and end of a process; command-line flags.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import errno
import fcntl
import functools
import glob
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from fractions import Fraction

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


class InputError(ValueError):
    """The user's input is wrong: the message is one line that says what is wrong and how to fix it."""


def pair(size):
    """An int, (N,) or (H, W) -> (H, W)."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path, which is renamed to `path` on success and deleted on failure: a kill at any moment
    leaves the earlier file or the new one, whole. InputError where it cannot be written."""
    try:
        yield f"{path}.tmp"
        with open(f"{path}.tmp", "rb") as file:
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, SafetensorError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        free = shutil.disk_usage(os.path.dirname(path) or ".").free / 1e6
        raise InputError(f"cannot write {path} ({str(e).splitlines()[0]}); {free:.0f} MB are free on its disk, and an "
                         "earlier file is as it was") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.tmp")


def read_lines(path):
    """The lines of a text file in UTF-8, stripped, without empty ones."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not a text file in UTF-8: {e}") from None


def write_lines(path, lines):
    """Writes lines of text, in UTF-8."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(f"{line}\n" for line in lines)


def printable(text):
    """Control characters, from a hostile file or its name, as \\x1b and the like."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def print_once(text):
    """Prints to stderr on rank 0 only."""
    if RANK == 0:
        print(printable(text), file=sys.stderr, flush=True)


# ---- Moving shapes: the embedded data sets --------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y); y grows downwards
COLOURS = {  # RGB, 0..1
    "red": (0.88, 0.35, 0.30), "orange": (0.90, 0.58, 0.28), "yellow": (0.88, 0.84, 0.35), "green": (0.40, 0.78, 0.40),
    "cyan": (0.38, 0.78, 0.82), "blue": (0.40, 0.55, 0.90), "purple": (0.72, 0.48, 0.90), "white": (0.88, 0.88, 0.88),
}
HELD_OUT = {"red square", "green circle", "blue triangle", "white triangle"}  # in no clip of the captioned shapes
TINY_SD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "tiny-sd.safetensors")  # draws them


def caption_of(colour, shape, move=None):
    return f"a{'n' * (colour == 'orange')} {colour} {shape}" + (f" moving {move}" if move else "")


class MovingShapes(torch.utils.data.Dataset):
    """One shape moves in one direction over a dark background: 12 classes, made on the fly. Clip i depends on (seed,
    split, i) alone. `train` is endless (its length is nominal), `test` is a fixed set of other clips.

    captioned: for text-to-video. No classes; the pairs of colour and shape in HELD_OUT never occur; and a third of the
    captions in `train` leave the motion out, so that one content frame has several motions."""

    classes = [f"{shape} moving {move}" for shape in SHAPES for move in MOVES]

    def __init__(self, frames=16, size=32, seed=0, split="train", captioned=False):
        self.frames, self.size, self.seed, self.endless = frames, pair(size), seed, split == "train"
        self.captioned, self.classes = captioned, [] if captioned else self.classes

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
        silent = self.captioned and self.endless and rng.random() < 1 / 3
        return dict(video=video, label=0 if self.captioned else label,
                    caption=caption_of(name, shape, None if silent else move))


def draw_clip(rng, shape, colour, move, frames, size):
    """A shape, also a star, of about that colour (RGB, 0..1) that moves over a dark background, at a place, over a
    distance and before a background that rng chooses: float32 (3, L, H, W) in [-1, 1]. One frame is a still picture."""
    height, width = size
    y, x = np.ogrid[0.5:height, 0.5:width]  # pixel centres
    # The background: two colours blended along a random direction, darker than every shape, since a content model that
    # is trained for minutes would generate the mean of darker and brighter ones.
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
    px = x - centre[:, 0, None, None]  # (L, 1, W)
    py = y - centre[:, 1, None, None]  # (L, H, 1)
    # Distance to the edge in pixels, negative inside; the last half pixel is anti-aliased. All shapes have the same
    # area, 2 reach^2: guidance (see sample.py) exaggerates differences, and would make smaller shapes faint.
    if shape == "circle":
        distance = np.hypot(px, py) - (2 / np.pi) ** 0.5 * reach
    elif shape == "square":
        distance = np.maximum(np.abs(px), np.abs(py)) - 0.5**0.5 * reach
    elif shape == "triangle":  # point up, as wide as high
        distance = np.maximum((2 * np.abs(px) - (py + reach)) / 5**0.5, py - reach)
    else:  # a star with five points, one up, of a fifth less area: with the same they would leave the frame
        radius, turn = np.hypot(px, py), np.pi / 5
        around = np.abs((np.arctan2(px, -py) + turn) % (2 * turn) - turn)  # angle from the nearest point
        tip, dent = 1.1 * reach, 0.5 * reach * np.exp(1j * turn)
        along = (dent - tip) / np.abs(dent - tip)  # the edge from a point to the dent beside it
        distance = ((radius * np.exp(1j * around) - tip) / along).imag * -1
    cover = np.clip(0.5 - distance, 0, 1)[..., None]  # (L, H, W, 1)
    colour = np.clip(colour + rng.uniform(-0.08, 0.08, 3), 0, 1)
    clip = background + cover * (colour - background)  # (L, H, W, 3)
    return torch.from_numpy(clip.astype(np.float32) * 2 - 1).permute(3, 0, 1, 2)  # (3, L, H, W)


# ---- Reading videos -------------------------------------------------------------------------------------------------

VIDEO_ENDINGS = tuple(".avi .mp4 .mkv .mov .webm .gif .m4v .mpg .mpeg .wmv .flv .ogv .ts .mts .m2ts .3gp .vob".split())
# Bicubic, which FFmpeg widens when it shrinks a picture, so that nothing aliases. Accurate rounding, since the fast one
# darkens by 1.5 levels; one thread, since by default FFmpeg starts one on each core for every frame.
SCALING = dict(threads=1, interpolation=(
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT))


class BadVideo(Exception):
    """A file cannot be used; str() is the reason, without the file's name."""


def find_videos(root):
    """Sorted paths, relative to `root`, of the video files at any depth, told by their endings. Follows links."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder) + os.sep  # a link to a folder above would be followed for ever
        folders[:] = [d for d in folders if not here.startswith(os.path.realpath(os.path.join(folder, d)) + os.sep)]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names
                  if name.lower().endswith(VIDEO_ENDINGS) and not name.startswith(".")]
    return sorted(found)


def read_packets(file):
    """Yields (video stream, packet, when shown) for each coded frame in the file's order, without decoding it. The last
    packet is empty and flushes the decoder. A truncated file yields what it has."""
    try:
        # FFmpeg would read the start of "12:30.mp4" as a protocol.
        file = io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else os.path.abspath(file)
        container = av.open(file, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as e:
        raise BadVideo(getattr(e, "strerror", None) or str(e)) from None
    with container, contextlib.suppress(av.error.FFmpegError):
        streams = [stream for stream in container.streams.video  # not the cover picture of a song
                   if stream.codec_context and not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise BadVideo("no video stream that can be decoded")
        streams[0].codec_context.thread_count = 1  # the loader's workers are the parallelism
        streams[0].codec_context.options = {"max_pixels": str(2**26)}  # a few hostile bytes can claim more
        for packet in container.demux(streams[0]):
            yield streams[0], packet, packet.pts if packet.pts is not None else packet.dts or 0


@functools.lru_cache(maxsize=8)  # for films of many hours
def index_video(file, changed):
    """(time of each frame, whether it is a key frame), int64 (N,), in the file's order; headers are often wrong about
    both. changed: the file's modification time, part of the cache's key."""
    index = [(shown, packet.is_keyframe) for _, packet, shown in read_packets(file) if packet.size]
    return np.array(index, np.int64).reshape(-1, 2).T


def read_clip(file, frames, size=None, stride=1, rng=None):
    """Every `stride`-th frame of a video from a random start, `frames` in all, RGB: np.uint8 (L, H, W, 3).

    file: a path or an io.BytesIO. size: int or (H, W); the picture is resized until it just covers H x W, and its
    centre is cut out; None keeps the file's size. rng: a numpy Generator that chooses the start, uniformly among those
    that leave room for the clip; None starts at the first frame. Rotated and mirrored videos come out upright, oblong
    pixels square. Raises BadVideo: unreadable, damaged, or fewer than (frames - 1) * stride + 1 frames.
    """
    if isinstance(file, io.BytesIO):
        shown, is_key = index_video.__wrapped__(file, None)
    else:
        if not os.path.isfile(file):
            raise BadVideo("No such file")
        shown, is_key = index_video(file, os.stat(file).st_mtime_ns)
    times, span = np.sort(shown), (frames - 1) * stride + 1
    if len(times) < span:
        raise BadVideo(f"too short: has {len(times)} frame{'s' * (len(times) != 1)}, {span} needed")
    # Up to four random starts, the next one if the file is damaged there; last, or without rng, the first frame.
    for place in [*(rng.random() for _ in range(4 if rng else 0)), 0.0]:
        start = times[int(place * (len(times) - span + 1))]
        key = max(np.flatnonzero(is_key & (shown <= start)), default=0)
        try:
            clip = to_rgb(itertools.islice(decode(file, key, start), 0, span, stride), size)
            if len(clip) == frames:
                return clip
            fault = f"only {len(clip)} of {frames} frames can be decoded"
        except (av.error.FFmpegError, ValueError, OverflowError) as e:
            fault = getattr(e, "strerror", None) or str(e)
    raise BadVideo(f"damaged: {fault}")


def decode(file, key, start):
    """Yields (video stream, frame) for the frames shown from time `start` on, decoded from packet number `key` on."""
    for stream, packet, shown in itertools.islice(read_packets(file), key, None):
        # Before the start, only frames that others are predicted from need decoding.
        stream.codec_context.skip_frame = "NONREF" if packet.size and shown < start else "DEFAULT"
        for frame in packet.decode():
            if frame.pts is None or frame.pts >= start:
                yield stream, frame


def to_rgb(frames, size):
    """(stream, frame) pairs -> np.uint8 (L, H, W, 3): resized as the colours are converted, cropped, turned upright."""
    clip, scaler = [], VideoReformatter()  # one for the clip: its set-up costs more than a frame
    for stream, frame in frames:
        if frame.is_corrupt:
            raise ValueError("frames are corrupt")
        if not clip:
            # (x, y) is shown at (a x + c y, b x + d y), in units of 1/65536. frame.rotation cannot tell mirroring from
            # a half turn. Read only if needed: PyAV 18 keeps frames whose side data was read in memory for long.
            matrix = frame.rotation and frame.side_data.get("DISPLAYMATRIX")
            a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist() if matrix else (1, 0, 0, 0, 1)
            sideways = abs(a) + abs(d) < abs(b) + abs(c)
        wide = frame.width * min(max(float(stream.sample_aspect_ratio or 1), 0.1), 10)  # in square pixels
        H, W = (frame.height, round(wide)) if size is None else pair(size)[:: -1 if sideways else 1]
        scale = max(H / frame.height, W / wide)
        height, width = max(H, round(frame.height * scale)), max(W, round(wide * scale))
        if height * width > 2**26:
            raise ValueError(f"frames of {frame.width}x{frame.height} are too oblong")
        picture = scaler.reformat(frame, width, height, "rgb24", **SCALING).to_ndarray()
        top, left = (height - H) // 2, (width - W) // 2
        clip.append(picture[top : top + H, left : left + W])
    clip = np.stack(clip)
    if sideways:
        clip, a, d = clip.swapaxes(1, 2), c, b
    return np.ascontiguousarray(clip[:, :: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


# ---- Data sets of video files ---------------------------------------------------------------------------------------

class VideoFiles(torch.utils.data.Dataset):
    """What data sets of video files share. A subclass defines locate(index) -> (file for read_clip, label, caption).

    Items: dict(video float32 (3, L, H, W) in [-1, 1], label int, caption str). A key is an index or (index, number):
    number says which of the video's random clips. The same (seed, index, number) gives the same clip in any process. An
    unusable file is named on stderr once, and replaced by another that the same numbers choose; where `replace` is
    false, None takes its place. InputError after 20 unusable ones in a row. Where `raw` is true, as in `load`, videos
    are uint8 (L, H, W, 3), a quarter of the bytes.
    """

    classes, replace, raw = [], True, False

    def __init__(self, count, frames, size, stride, seed):
        self.count, self.frames, self.size, self.stride, self.seed = count, frames, size, stride, seed
        self.named = torch.zeros(count, dtype=torch.bool).share_memory_()  # with the loader's workers

    def __len__(self):
        return self.count

    def frame_rate(self):
        """Frames a second of the clips at the videos' own speed: the median of 20 videos, divided by the stride."""
        rates = []
        for index in np.linspace(0, len(self) - 1, 20).astype(int):
            with contextlib.suppress(BadVideo, OSError):
                stream, _, _ = next(read_packets(self.locate(index)[0]), (None, 0, 0))
                rates += [float(stream.average_rate)] if stream and stream.average_rate else []
        return float(np.median(rates or [8.0])) / self.stride

    def __getitem__(self, key):
        index, number = key if isinstance(key, tuple) else (key, 0)
        index = range(len(self))[index]  # IndexError beyond the end
        others = np.random.default_rng([self.seed, index, number, 1]).integers(len(self), size=19).tolist()
        for chosen in [index, *others] if self.replace else [index]:
            file, label, caption = self.locate(chosen)
            try:
                rng = np.random.default_rng([self.seed, chosen, number])
                clip = torch.from_numpy(read_clip(file, self.frames, self.size, self.stride, rng))
                return dict(video=clip if self.raw else to_floats(clip), label=label, caption=caption)
            except BadVideo as e:
                fault = f"{getattr(file, 'name', file)}: {e}"
                if not self.named[chosen]:
                    print(printable(f"left out: {fault}"), file=sys.stderr, flush=True)
                self.named[chosen] = True
        if self.replace:
            raise InputError(f"20 videos in a row cannot be used; the last is {fault}")


def to_floats(video):
    """uint8 (..., L, H, W, 3) -> float (..., 3, L, H, W) in [-1, 1]. What is float already stays."""
    return video if video.is_floating_point() else video.movedim(-1, -4) / 127.5 - 1


class VideoFolder(VideoFiles):
    """Videos in class folders, as UCF-101 has them: root/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi.

    A class is a first-level folder of `root` (its files may lie deeper), numbered in alphabetical order; a caption is
    its name in words ("apply eye makeup"). Without class folders the label is 0 and the caption ""; with them, files
    outside are left out. split: the path of a list such as UCF-101's trainlist01.txt; only its files are used.
    """

    def __init__(self, root, frames, size, split=None, stride=1, seed=0):
        self.root, files = str(root), find_videos(root)
        class_of = {file: os.path.dirname(file).split(os.sep)[0] for file in files}  # "" in root itself
        self.classes = sorted(set(class_of.values()) - {""})
        if split:  # lines such as "Archery/v_Archery_g08_c01.avi 3"; .avi may have become .mp4
            listed = {os.path.splitext(re.sub(r"\s+\d+$", "", line))[0] for line in read_lines(split)}
            files = [file for file in files if os.path.splitext(file)[0].replace(os.sep, "/") in listed]
            print_once(f"{split}: {len(files)} of its {len(listed)} videos are in {root}")
        self.files = [file for file in files if class_of[file] or not self.classes]
        if len(self.files) < len(files):
            print_once(f"{root}: {len(files) - len(self.files)} videos outside its class folders are left out")
        if not self.files:
            raise InputError(f"{root}: no such folder, or no videos in it{f' that {split} lists' if split else ''}; "
                             f"looked for {' '.join(VIDEO_ENDINGS)}")
        self.labels = [self.classes.index(class_of[file]) if self.classes else 0 for file in self.files]
        # In words: a space where a small letter or digit meets a capital, and for what is neither letter nor digit.
        self.captions = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+", " ", name).strip().lower()
                         for name in self.classes] or [""]
        super().__init__(len(self.files), frames, size, stride, seed)

    def locate(self, index):
        label = self.labels[index]
        return os.path.join(self.root, self.files[index]), label, self.captions[label]


class CaptionedVideos(VideoFiles):
    """Videos with captions, for text-to-video; label 0. `csv` is one of
    - a CSV file with the columns videoid, page_dir, name (WebVid's; the file is root/page_dir/videoid.mp4),
    - a CSV file with the columns path, caption (path relative to `root`, or absolute),
    - a .tar or a folder of them as video2dataset writes them: N.mp4 with N.txt; root is not used.

    root: None is the CSV's own folder. A process holds 8 bytes for each row (.tar: 40), the rest stays on disk. Rows
    with too few or too many columns are left out, and named by their line.
    """

    def __init__(self, csv, root, frames, size, stride=1, seed=0):
        self.csv, self.root = str(csv), os.path.dirname(os.path.abspath(csv)) if root is None else str(root)
        self.tars = [self.csv] if self.csv.endswith(".tar") else sorted(glob.glob(f"{glob.escape(self.csv)}/*.tar"))
        if self.tars:
            with concurrent.futures.ProcessPoolExecutor(min(8, len(self.tars))) as pool:  # millions of headers
                rows = [[tar, *row] for tar, rows in enumerate(pool.map(scan_tar, self.tars)) for row in rows]
            self.rows = np.array(rows, np.int64)
        else:
            self.rows = self.csv_rows()
        if not len(self.rows):
            raise InputError(f"{csv}: no videos in it")
        super().__init__(len(self.rows), frames, size, stride, seed)

    def csv_rows(self):
        """The byte at which each good row starts, int64 (N,)."""
        starts, bad = [], []
        with open(self.csv, "rb") as file:
            reader = read_rows(file)
            self.columns, line, start = next(reader, []), reader.line_num, file.tell()
            self.webvid = {"videoid", "page_dir", "name"} <= set(self.columns)
            if not self.webvid and not {"path", "caption"} <= set(self.columns):
                raise InputError(f"{self.csv}: its columns are {', '.join(self.columns)[:200]!a}; needed are videoid, "
                                 "page_dir and name (WebVid's) or path and caption")
            try:
                for row in reader:
                    if len(row) == len(self.columns):
                        starts.append(start)
                    elif row:
                        bad.append(line + 1)
                    line, start = reader.line_num, file.tell()
            except csv.Error as e:
                raise InputError(f"{self.csv}, line {line + 1}: {e}; is a quote not closed?") from None
        left_out = (f", with more or fewer columns than the header (captions with a comma need quotes); lines: "
                    f"{', '.join(map(str, bad[:20]))}{', ...' * (len(bad) > 20)}") if bad else ""
        print_once(f"{self.csv}: {len(starts)} rows used, {len(bad)} left out{left_out}")
        return np.array(starts, np.int64)

    def locate(self, index):
        if self.tars:
            tar, video, size, text, text_size = self.rows[index].tolist()
            with open(self.tars[tar], "rb") as file:
                file.seek(text)
                caption = file.read(text_size).decode("utf-8", "replace").strip()
                file.seek(video)
                part = io.BytesIO(file.read(size))
            part.name = f"{self.tars[tar]} at byte {video}"
            return part, 0, caption
        with open(self.csv, "rb") as file:
            row = dict(zip(self.columns, next(read_rows(file, self.rows[index]))))
        path = os.path.join(row["page_dir"], row["videoid"] + ".mp4") if self.webvid else row["path"]
        return os.path.join(self.root, path), 0, row["name" if self.webvid else "caption"]


def read_rows(file, start=0):
    """The rows of a CSV file, open in binary, from byte `start` on. A row may span lines."""
    file.seek(start)
    lines = (line.decode("utf-8", "replace").lstrip("\ufeff").replace("\r", "") for line in file)
    return csv.reader(lines, strict=True)


def scan_tar(path):
    """[first byte and size of the video, the same of its .txt (else 0)] of each sample."""
    videos, texts = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, ending = member.name.lower().rpartition(".")
                whole = member.isfile() and 0 < member.size <= os.path.getsize(path) - member.offset_data
                if whole and "." + ending in VIDEO_ENDINGS:
                    videos[key] = member.offset_data, member.size
                elif whole and ending == "txt":
                    texts[key] = member.offset_data, member.size
    except Exception as e:  # a damaged file can raise anything
        print(printable(f"{path}: {e}; {len(videos)} samples before that"), file=sys.stderr)
    return [[*video, *texts.get(key, (0, 0))] for key, video in videos.items()]


# ---- Writing videos and pictures ------------------------------------------------------------------------------------

def to_uint8(video):
    """Float (C, L, H, W) in [-1, 1], C = 3 or 1 -> np.uint8 (L, H, W, 3). What is uint8 (L, H, W, 3) already stays."""
    video = torch.as_tensor(video).detach().cpu()
    if video.dtype == torch.uint8:
        return video.numpy()
    video = video.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return video.expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().numpy()


def tile(videos, columns, gap=2, colour=0):
    """Equally large videos (see to_uint8) side by side, in rows of `columns`, `gap` pixels of grey level `colour`
    apart: np.uint8 (L, H', W', 3)."""
    videos = np.stack([to_uint8(video) for video in videos])  # (N, L, H, W, 3)
    rows = math.ceil(len(videos) / columns)
    pad = [(0, rows * columns - len(videos)), (0, 0), (0, gap), (0, gap), (0, 0)]
    videos = np.pad(videos, pad, constant_values=colour)
    _, L, H, W, _ = videos.shape
    videos = videos.reshape(rows, columns, L, H, W, 3).transpose(2, 0, 3, 1, 4, 5)  # (L, rows, H, columns, W, 3)
    return videos.reshape(L, rows * H, columns * W, 3)[:, :-gap, :-gap]


def write_video(path, video, fps):
    """Writes a video, float (C, L, H, W) in [-1, 1] or uint8 (L, H, W, 3), or a list of them side by side in rows of 6.
    The ending chooses: .mp4, H.264 that plays everywhere (odd sides grow by one pixel, which repeats the edge); .mkv,
    FFV1, whose frames read_clip returns to the last bit; or .gif, 256 colours chosen for this video, without dithering,
    so that what stands still does not flicker."""
    video = tile(video, min(6, len(video))) if isinstance(video, list) else to_uint8(video)
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".mp4", ".mkv", ".gif"):
        raise InputError(f"{path}: videos are written as .mp4, .mkv or .gif")
    with atomic_write(path) as temporary:
        if ending == ".gif":
            L, H, W, _ = video.shape
            palette = Image.fromarray(video.reshape(L * H, W, 3)).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
            first, *rest = (Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE) for x in video)
            times = np.diff((np.arange(L + 1) * 100 / fps).round()).clip(2)  # in 1/100 s; viewers slow down shorter
            first.save(temporary, "GIF", save_all=True, append_images=rest, duration=(times * 10).tolist(), loop=0)
            return
        codec, layout, container = ("ffv1", "bgr0", "matroska") if ending == ".mkv" else ("libx264", "yuv420p", "mp4")
        if ending == ".mp4":
            video = np.pad(video, [(0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)], mode="edge")
        with av.open(temporary, "w", format=container) as file:
            stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], layout
            if ending == ".mp4":
                # mbtree reads uninitialised memory in small pictures: the same video would give other bytes each time.
                stream.options = {"crf": "18", "x264-params": "mbtree=0"}
                of = stream.codec_context
                of.colorspace = of.color_primaries = of.color_trc = of.color_range = 1  # BT.709, limited range
            for i, picture in enumerate(video):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(format=layout, dst_colorspace="ITU709", **SCALING)
                frame.pts = i
                file.mux(stream.encode(frame))
            file.mux(stream.encode())


def write_sheet(path, videos, columns, captions=None, frames=9):
    """One .png to look at: each video (see to_uint8; all of one height and width) is a strip of up to `frames` frames,
    evenly spread, under as much of its caption as fits; `columns` strips side by side. Small pictures are enlarged,
    pixel by pixel, to 96 pixels or more."""
    videos, strips, font = [to_uint8(video) for video in videos], [], ImageFont.load_default(14)
    longest = min(frames, max(map(len, videos)))
    for video, caption in zip(videos, captions or itertools.repeat("")):
        video = video[np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)]
        times = math.ceil(96 / min(video.shape[1:3]))
        video = video.repeat(times, 1).repeat(times, 2)
        strip = tile(video[:, None], columns=longest, colour=255)[0]  # each frame a video of one frame
        strip = Image.fromarray(np.pad(strip, [(20 if captions else 0, 0), (0, 0), (0, 0)], constant_values=255))
        ImageDraw.Draw(strip).text((0, 0), caption[:500], "black", font)
        strips.append(np.array(strip)[None])  # (1, H, W, 3)
    with atomic_write(path) as temporary:
        Image.fromarray(tile(strips, min(columns, len(strips)), 10, 255)[0]).save(temporary, format="PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Encodings: what stage 1 writes, and stages 2 and 3 read, in files of up to --shard-size clips. The last file holds up
# to 64 test clips, on which no stage trains:
#
# encodings/shard-00000.safetensors
#     content   float16 (N, C, H, W)       content frames
#     motion    float16 (N, D, L, H'+W')   motion latents, as the autoencoder gives them
#     label     int64 (N,)
#     sums      float64 (2, D)             of the motion latents and of their squares, by channel
#     metadata  JSON: captions, a list; settings, what they were made with; crc32, a checksum


def shard_path(run_dir, number):
    return f"{run_dir}/encodings/shard-{number:05d}.safetensors"


def checksum(tensors, captions):
    tensors = [tensors[name] for name in ("content", "motion", "label", "sums")]
    about = json.dumps([captions, *([str(x.dtype), *x.shape] for x in tensors)]).encode()
    return zlib.crc32(b"".join([about, *(x.numpy().tobytes() for x in tensors)]))


def write_shard(run_dir, number, settings, content, motion, labels, captions):
    """Writes a shard whole or not at all. settings: a dict of all that the encodings depend on."""
    sums = torch.stack([motion.double().pow(power).sum((0, 2, 3)) for power in (1, 2)])
    tensors = dict(content=content, motion=motion.contiguous(), label=torch.tensor(labels, dtype=torch.long), sums=sums)
    about = dict(settings=settings, captions=captions, crc32=checksum(tensors, captions))
    os.makedirs(f"{run_dir}/encodings", exist_ok=True)
    with atomic_write(shard_path(run_dir, number)) as temporary:
        save_file(tensors, temporary, dict(about=json.dumps(about)))


@functools.lru_cache(maxsize=128)
def open_shard(run_dir, number, check=False):
    """(open safetensors file, captions, settings) of a shard, memory-mapped. check: reads it all for the checksum."""
    path = shard_path(run_dir, number)
    try:
        shard = safe_open(path, "pt")
        about = json.loads(shard.metadata()["about"])
        tensors = {name: shard.get_tensor(name) for name in shard.keys()} if check else None
        if check and about["crc32"] != checksum(tensors, about["captions"]):
            raise ValueError("its checksum differs")
        return shard, about["captions"], dict(fingerprint=None) | about["settings"]
    except Exception as e:  # a damaged file can raise anything
        raise InputError(f"{path} is missing or damaged ({e}): delete it and run `python autoencoder.py --run-dir "
                         f"{run_dir} --encode`") from None


class EncodedClips(torch.utils.data.Dataset):
    """The encodings of a run folder. Items: content (C, H, W) and motion (D, L, H'+W') float32, label int, caption str.

    InputError where they are not complete, not of `data`, of another autoencoder than the run folder's or that of the
    `resumed` checkpoint, or damaged (checksums are compared where there are fewer than 10,000 clips).
    """

    def __init__(self, run_dir, data=None, resumed=None):
        state = load_checkpoint(f"{run_dir}/autoencoder.pt", "autoencoder")
        if state["encodings"] is None:
            raise InputError(f"{run_dir} has no complete encodings: finish stage 1 with `python autoencoder.py "
                             f"--run-dir {run_dir} --resume`")
        if data not in (None, state["args"]["data"]):
            raise InputError(f"the encodings in {run_dir} are of {state['args']['data']}, not of {data}: drop --data, "
                             "or train `autoencoder.py` on it in another --run-dir")
        self.run_dir, self.classes, self.fingerprint = run_dir, state["classes"], state["fingerprint"]
        self.motion_mean, self.motion_std = state["model"]["motion_mean"], state["model"]["motion_std"]  # (D, 1, 1)
        self.starts = np.cumsum([0, *state["encodings"]])  # state["encodings"]: the number of clips in each shard
        for number, count in enumerate([*state["encodings"], None]):  # the last one holds the test clips
            shard, captions, settings = open_shard(run_dir, number, check=len(self) < 10_000)
            if (settings["fingerprint"], len(captions)) != (self.fingerprint, count or len(captions)):
                raise InputError(f"the encodings in {run_dir} were made by another autoencoder than its autoencoder.pt"
                                 f": encode again with `python autoencoder.py --run-dir {run_dir} --encode`")
        if resumed and resumed["fingerprint"] != self.fingerprint:
            raise InputError(f"the {resumed['stage']} model in {run_dir} was trained on the encodings of another "
                             "autoencoder: use another --run-dir")
        self.content_shape, self.motion_shape = (
            tuple(shard.get_slice(name).get_shape()[1:]) for name in ("content", "motion"))

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, key):
        index = range(len(self))[key[0] if isinstance(key, tuple) else key]
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = int(index - self.starts[number])
        shard, captions, _ = open_shard(self.run_dir, number)
        item = {name: shard.get_slice(name)[row].float() for name in ("content", "motion")}
        return item | dict(label=int(shard.get_slice("label")[row]), caption=captions[row])

    def test_clips(self):
        """A batch of the encodings of up to 64 test clips: a dict of content, motion, label and caption."""
        shard, captions, _ = open_shard(self.run_dir, len(self.starts) - 1)
        batch = {name: shard.get_tensor(name).float() for name in ("content", "motion")}
        return batch | dict(label=shard.get_tensor("label"), caption=captions)


# ---- Batches --------------------------------------------------------------------------------------------------------

def batch_keys(indices, batch_size, seed, step, rank, world):
    """Which clips a rank reads: yields a batch of keys (index, epoch) for each step from `step` on, without end.

    Step s reads positions s*B to (s+1)*B - 1 of an endless sequence, and each rank takes its share of them. Position p
    is clip p mod n of the shuffle of epoch p div n. So (seed, step) is the whole data position, and training resumed on
    more or fewer ranks or workers goes on at the very next clip.
    """
    share = batch_size // world

    @functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
    def shuffled(epoch):
        return torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    def key(position):
        if indices is None:  # an endless data set: every position is a clip of its own
            return position, 0
        epoch, place = divmod(position, len(indices))
        return int(indices[int(shuffled(epoch)[place])]), epoch

    while True:
        first = step * batch_size + rank * share
        yield [key(position) for position in range(first, first + share)]
        step += 1


def batches(dataset, indices, batch_size, seed=0, step=0, workers=0):
    """An endless iterator over this rank's batches from `step` on. indices: of the clips to use, None for an endless
    data set. batch_size: over all ranks."""
    return load(dataset, batch_keys(indices, batch_size, seed, step, RANK, WORLD), workers)


def load(dataset, keys, workers):
    """Iterates over the batches of an iterable of lists of keys; videos in them are for `to_floats`, on the device.
    workers: processes on each rank, on a machine in all at most one for each core."""
    dataset = copy.copy(dataset)
    dataset.raw = True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's number of ranks on this machine
    loader = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=min(workers, cores), collate_fn=collate,
        worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available()))
    # torch's handler raises a worker's death at any point of the main process, even while it reports another error.
    # Without the handler the loader notices by itself, within 5 seconds.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return loader


def collate(items):
    """A batch of the items that are not None, or None."""
    items = [item for item in items if item]
    return torch.utils.data.default_collate(items) if items else None


def ignore_signals(_):
    """Ctrl-C and torchrun's SIGTERM reach a loader's processes too; the main process needs them until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)  # there are many of them


def open_dataset(data, frames, size, stride=1, split=None, captions=None, seed=0):
    """(data set, training indices or None for endless, test set, test indices) of what --data names: 'shapes' or
    'shapes_text' (with captions), a folder of videos, a CSV, a .tar or a folder of them; or, with `captions` (a CSV),
    the folder that its paths start from. Test clips, in random order, are those of testlistNN.txt where --split is
    trainlistNN.txt and the other lies beside it; otherwise one file in fifty, at most 64, is kept out of training.
    seed: of training, which it depends on."""
    captioned = captions or data.endswith((".csv", ".tar")) or glob.glob(f"{glob.escape(data)}/*.tar")
    if split and (captioned or data in ("shapes", "shapes_text")):
        raise InputError(f"--split is for a folder of videos without captions, and --data {data} is not one: drop it")
    if data in ("shapes", "shapes_text"):
        train, test = (MovingShapes(frames, size, seed, split, data != "shapes") for split in ("train", "test"))
        return train, None, test, range(len(test))
    if not os.path.isdir(data) and not (os.path.isfile(data) and data.endswith((".csv", ".tar"))):
        raise InputError(f"--data {data} does not exist, or is not a folder of videos, a .csv or a .tar ('shapes' and "
                         "'shapes_text' are the embedded sets); if it moved since training, give its new place")
    if captioned:
        dataset = CaptionedVideos(captions or data, data if captions else None, frames, size, stride, seed)
    else:
        dataset = VideoFolder(data, frames, size, split, stride, seed)
        other = split and split.replace("trainlist", "testlist")
        if split != other and os.path.exists(other):
            test = VideoFolder(data, frames, size, other, stride, seed)
            return dataset, range(len(dataset)), test, np.random.default_rng(seed).permutation(len(test))
    kept = min(64, len(dataset) // 50) or int(len(dataset) > 3)
    if not kept:
        print_once(f"{data}: too few videos to keep one out of training: test clips are training clips")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).numpy()
    return dataset, np.sort(order[kept:]), dataset, order[:kept] if kept else order


# ---- The run folder: checkpoints and logs ---------------------------------------------------------------------------

def lock(run_dir, stage):
    """On rank 0. No other process can train a stage in this run folder until this one ends, however it ends."""
    if RANK > 0:
        return
    path = f"{run_dir}/{stage}.lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT)  # never closed, since that would release it
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another process ({os.read(file, 99).decode()}) is using {run_dir}/{stage}.pt: "
                         "wait until it ends, or choose another --run-dir") from None
    except OSError as e:
        print_once(f"{path} cannot be locked ({e}): make sure that no other process uses this run folder")
    os.truncate(file, 0)
    os.write(file, f"pid {os.getpid()} on {os.uname().nodename}".encode())


SCRIPTS = {"autoencoder": "autoencoder.py", "content": "content_diffusion.py", "motion": "motion_diffusion.py"}


def save_checkpoint(path, state):
    if RANK == 0:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)


def check_zip(path, checksums=True):
    """ValueError if a zip file (.pt, .npz) is damaged, or unpacks to more than its size: neither torch nor numpy checks
    this, and both store without compression."""
    with zipfile.ZipFile(path) as file:
        if sum(member.file_size for member in file.infolist()) > os.path.getsize(path) or checksums and file.testzip():
            raise ValueError("a damaged zip file, or a compressed one, as TorchScript is")


def load_checkpoint(path, stage):
    """The dict that a stage ('autoencoder', 'content' or 'motion') saved, memory-mapped on the CPU. Runs no code from
    the file (weights_only). Raises InputError for any other file."""
    script = SCRIPTS[stage]
    if not os.path.isfile(path):
        raise InputError(f"no {path}: train it first with `python {script} --run-dir {os.path.dirname(path)}`")
    try:
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state["stage"] == stage:
            return state
        fault = f"was written by {SCRIPTS[state['stage']]}, not by {script}"
    except Exception:  # a damaged or hostile pickle can raise anything
        fault = f"is damaged, or not a checkpoint: delete it and train again with {script}"
    raise InputError(f"{path} {fault}")


class Progress:
    """What a training loop reports, in a CSV and beside its bar, and requests to stop: Ctrl-C and SIGTERM ask it to
    save and end, a second Ctrl-C ends it at once."""

    def __init__(self, args, stage, step, device, saved=None):
        saved = saved or dict(loss_sum=0.0, summed=0, skipped=0, skipped_in_a_row=0, rows=[])
        self.args, self.path, self.since, self.clock = args, f"{args.run_dir}/{stage}.csv", step, time.perf_counter()
        self.loss_sum, self.summed = torch.tensor(saved["loss_sum"], device=device), saved["summed"]
        self.skipped, self.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
        # When a finished run gets more steps: without the row of its old last step, which unbroken runs do not have.
        self.rows = [row for row in saved["rows"]
                     if row["step"] % args.log_every == 0 or row["step"] % args.preview_every == 0]
        os.makedirs(f"{args.run_dir}/previews", exist_ok=True)
        lock(args.run_dir, stage)  # for a new folder; that of a run that goes on is locked before it is read
        self.stop = False
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, *_):
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopping(self):
        """Whether any rank was told to stop. All end after the same step, so all must ask at the same place."""
        stop = torch.tensor(float(self.stop))
        if WORLD > 1:
            torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
        return bool(stop)

    def add(self, loss, finite):
        """finite: whether the gradient was; if not, the step was skipped. InputError after five of those in a row."""
        self.now = time.perf_counter()
        if finite:
            self.loss_sum, self.summed, self.skipped_in_a_row = self.loss_sum + loss, self.summed + 1, 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 5:
            raise InputError("the last 5 steps had a NaN or infinite loss and were skipped: lower --lr, or look at the "
                             "data; the last checkpoint, if there is one, holds good weights")

    def state(self):
        """What checkpoints keep. Every rank must call it: it averages the loss over the ranks."""
        if WORLD > 1:
            torch.distributed.all_reduce(self.loss_sum)
            self.loss_sum /= WORLD
        return dict(loss_sum=self.loss_sum.item(), summed=self.summed, skipped=self.skipped,
                    skipped_in_a_row=self.skipped_in_a_row, rows=self.rows)

    def write(self, bar, step, **values):
        """A row: the mean loss since the last multiple of --log-every, the speed, and values."""
        loss = self.state()["loss_sum"] / max(1, self.summed)
        speed = (step - self.since) * self.args.batch_size / (self.now - self.clock)
        row = dict(step=step, loss=loss, skipped=self.skipped, clips_per_second=speed, **values)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} clips/s")
        self.rows.append({name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in row.items()})
        if step % self.args.log_every == 0:
            self.loss_sum, self.summed = torch.zeros_like(self.loss_sum), 0
            self.since, self.clock = step, time.perf_counter()
        if RANK == 0:
            names = list(dict.fromkeys(name for row in self.rows for name in row))
            table = [names, *([row.get(name, "") for name in names] for row in self.rows)]
            write_lines(self.path, [",".join(map(str, row)) for row in table])


# ---- The start and the end of a process -----------------------------------------------------------------------------

def start(args, run_dir=None, saved=None):
    """(rank, world, device, dtype of the models' arithmetic), in a process group where torchrun started this process:
    tensors on the CPU are reduced by gloo, those on GPUs by nccl, and half an hour without an answer is an error.
    InputError on all ranks unless they see the same run folder and found the same checkpoint in it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where something stays in float32
        torch.backends.cudnn.benchmark = True  # convolutions see the same sizes again and again
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN on an H100 (pytorch issue 196678)
    elif torch.version.cuda and glob.glob("/dev/nvidia[0-9]*") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise InputError("there is a GPU, but CUDA does not start: is its driver (nvidia-smi) too old for CUDA "
                         f"{torch.version.cuda}? Install one that fits, or set CUDA_VISIBLE_DEVICES= to run on the CPU")
    else:
        keep_freed_memory()
    if WORLD > 1:
        # torchrun may keep its store when it restarts the ranks, and with it the addresses of those that died.
        store = next(torch.distributed.rendezvous("env://"))[0]
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
        if run_dir:
            compare_views(run_dir, saved)
    torch.manual_seed(args.seed)
    dtype = getattr(args, "dtype", None) or ("bfloat16" if device.type == "cuda" else "float32")
    return RANK, WORLD, device, getattr(torch, dtype)


def compare_views(folder, saved=None):
    """InputError on all ranks unless all find the file that rank 0 makes in the folder, and the same checkpoint."""
    os.makedirs(folder, exist_ok=True)
    token = [tempfile.mkstemp(prefix="shared-", dir=folder)[1] if RANK == 0 else ""]
    torch.distributed.broadcast_object_list(token)
    found = os.path.exists(os.path.join(folder, os.path.basename(token[0])))
    views = [None] * WORLD
    torch.distributed.all_gather_object(views, (found, saved and (saved["step"], saved["fingerprint"])))
    if RANK == 0:
        os.remove(token[0])
    if set(views) != {(True, views[0][1])}:
        raise InputError(f"the ranks do not see the same files in {folder}: --run-dir must be on a disk that they "
                         "share")


def compile_modules(args, preset, device, *modules, **options):
    """Compiles modules in place, each at its first call and for inputs of that kind alone: others, such as a last,
    smaller batch, run as they are, and so do all if compiling fails. By default on a GPU with Triton at the paper's
    sizes, since small models would wait longer than they save. Returns what a script's first line says about it."""
    large = not preset.startswith("shapes")
    default = large and device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if not (default if args.compile is None else args.compile):
        return "not compiled"
    modules = [module for module in modules if module is not None]
    with contextlib.suppress(AttributeError):  # torch 2.6 has no such flag
        torch._functorch.config.force_non_lazy_backward_lowering = True  # so that a failure is met in the first call
    for module in modules:
        module.compile(dynamic=False, **options)
        module._compiled_call_impl = functools.partial(call_compiled, module._compiled_call_impl, module, modules, [])
    return "compiled"


def call_compiled(compiled, module, modules, called, *inputs):
    try:
        with torch.compiler.set_stance("eager_on_recompile" if called else "default"):
            result = compiled(*inputs)
        called[:] = [True]
        return result
    except Exception as e:  # a compiler can raise anything
        print_once(f"goes on without torch.compile, which failed: {' '.join(str(e).split())[:120]}")
        for one in modules:
            one._compiled_call_impl = None
        return module(*inputs)


def keep_freed_memory():
    """Has glibc keep what tensors free: returning it to the kernel costs a fifth of a training step on the CPU."""
    if sys.platform == "linux":
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def launch(main):
    """Calls a script's main(). Errors caused by the user's input or the machine are reported in one line, without a
    traceback: an InputError, an unusable path, a full disk, a killed loader process, the end of another rank. Ctrl-C
    ends with status 130."""
    name = os.path.basename(sys.argv[0])
    warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"
    try:
        main()
    except KeyboardInterrupt as e:
        print_once(f"{name}: {str(e) or 'interrupted'}")
        sys.exit(130)
    except Exception as e:
        line = " ".join(str(e).split())
        if isinstance(e, InputError):
            line = line.split("InputError: ")[-1]  # from a loader's process, whose traceback stands before it
        elif isinstance(e, torch.OutOfMemoryError):
            line = ("the GPU's memory is too small: use a larger --accumulate, --checkpointing where one clip alone "
                    f"does not fit, or, as in sampling, a smaller --batch-size ({line[:100]})")
        elif line.startswith("DataLoader worker") or "shared memory(shm)" in line:
            line = line.split("RuntimeError: ")[-1] + (
                ". Memory may have run out: use fewer --workers, a larger /dev/shm, and go on with --resume")
        elif WORLD > 1 and (isinstance(e, torch.distributed.DistError) or "gloo" in line):
            line = f"lost the other ranks; the one that ended first says why ({line[-150:]})"
        elif not (isinstance(e, OSError) and (e.filename or e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))):
            raise
        sys.exit(printable(f"{name}: {line}"))
    finally:
        for child in multiprocessing.active_children():  # loader processes, which ignore SIGTERM
            child.kill()
        # After an error on this rank alone nccl would wait here for the others, and the message with it; gloo does not.
        failed = sys.exc_info()[0] is not None
        if torch.distributed.is_initialized() and not (failed and torch.cuda.is_initialized()):
            torch.distributed.destroy_process_group()


# ---- Command-line flags ---------------------------------------------------------------------------------------------

class Flags(argparse.ArgumentParser):
    """argparse, where a mistake costs one line, and with types that check ranges (see `number`)."""

    def __init__(self, docstring):
        super().__init__(description=docstring.split("\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, *limits in (("count", int, 1, 1e9), ("whole", int, 0, 1e12), ("number", float, 0, 1e300),
                              ("share", float, 0, 1)):
            self.register("type", name, functools.partial(self.number, *limits))

    def number(self, kind, low, high, text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} must be a {'whole ' * (kind is int)}number from {low} to {high:g}")

    def format_help(self):
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())  # flags without a default

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

    def parse_args(self, *args):
        args = super().parse_args(*args)
        if getattr(args, "size", None):
            if len(args.size) > 2:
                raise InputError("--size takes one number, or height and width")
            args.size = list(pair(args.size))
        return args

    def add_run(self, presets):
        add = self.add_argument_group("run folder").add_argument
        add("--preset", choices=presets, help="fills the defaults of the flags below (default: the run's, else shapes)")
        add("--run-dir", help="run folder, on a disk that all ranks share (default: runs/PRESET)")
        add("--resume", action="store_true", help="go on from the run folder's checkpoint, if there is one")
        add("--seed", type="whole", default=0, help="random seed for the weights, the clips, their order and the noise")
        add("--workers", type="whole", help="loader processes on each rank, at most one for each core")
        return add

    def add_training(self):
        add = self.add_argument_group("training").add_argument
        add("--steps", type="count", help="steps in all")
        add("--batch-size", type="count", help="clips in a step, over all ranks")
        add("--accumulate", type="count", default=1, help="passes into which each rank's batch is divided")
        add("--lr", type="number", help="Adam's learning rate")
        add("--decay-steps", type="whole", help="short rise, then cosine decay of the rate to this step; 0: constant")
        add("--clip", type="number", default=1.0, help="largest gradient norm")
        add("--dtype", choices=["float32", "bfloat16"],
            help="of the model's arithmetic, not of its weights (default: bfloat16 on a GPU, float32 on a CPU)")
        add("--compile", action=argparse.BooleanOptionalAction,
            help="torch.compile the models (default: on a GPU, but for the shapes preset)")
        add("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
        add("--log-every", type="count", help="steps between rows of the log")
        add("--save-every", type="count", help="steps between checkpoints")
        add("--preview-every", type="count", help="steps between pictures in previews/")
        return add

    def parse(self, presets, stage):
        """(flags, checkpoint or None) of a training stage. From weakest to strongest: preset, checkpoint when resuming,
        command line. --resume without a checkpoint starts from nothing, so that one command serves a first start and
        torchrun's restarts. InputError where a checkpoint would be overwritten, or resumed as another model."""
        self.set_defaults(**presets["shapes"])  # for --help
        given, _ = self.parse_known_args()
        autoencoder, preset = f"{given.run_dir}/autoencoder.pt", given.preset or "shapes"
        if not given.preset and os.path.exists(autoencoder):
            preset = load_checkpoint(autoencoder, "autoencoder")["args"]["preset"]
        run_dir, encode = given.run_dir or f"runs/{preset}", getattr(given, "encode", False)
        path, saved = f"{run_dir}/{stage}.pt", None
        if os.path.isdir(run_dir):
            lock(run_dir, stage)
        if os.path.exists(path) and not given.resume and not encode:
            raise InputError(f"{path} exists: --resume goes on with it, another --run-dir starts a new run")
        if os.path.exists(path) or encode:
            saved = load_checkpoint(path, stage)
        # None for all that the presets fill, then the checkpoint's values or else the preset's; the command line wins.
        self.set_defaults(**dict.fromkeys(presets["shapes"]) | (saved["args"] if saved else presets[preset]))
        self.set_defaults(resume=False, encode=False)
        args = self.parse_args()
        args.run_dir, args.preset = run_dir, args.preset or preset
        for name in {"preset", "predict", "schedule", *saved["config"]} & vars(args).keys() if saved else ():
            if getattr(args, name) != saved["args"][name]:
                raise InputError(f"{path} was trained with --{name.replace('_', '-')} {saved['args'][name]}, not "
                                 f"{getattr(args, name)}: drop that flag, or choose another --run-dir")
        if args.batch_size % (WORLD * args.accumulate):
            raise InputError(f"--batch-size {args.batch_size} is over all ranks: make it a multiple of {WORLD} rank(s) "
                             f"times --accumulate {args.accumulate}")
        return args, saved
