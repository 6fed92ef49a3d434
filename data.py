"""What all stages share: video in and out of files, the stored encodings, the stream of batches and the run folder.

Clips are (3, L, H, W) in [-1, 1]. In the order of a run: the embedded shapes; videos from folders, CSVs and tars;
writing them; the encodings that stage 1 leaves and stages 2 and 3 read; checkpoints, logs, ranks, signals and flags.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import ctypes
import datetime
import difflib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import warnings
import zlib
from fractions import Fraction

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont


class InputError(ValueError):
    """The user's input is wrong: the message is one line that says what, and how to mend it."""


def pair(size):
    """An int, (N,) or (H, W) -> (H, W)."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size


@contextlib.contextmanager
def aside(path):
    """Yields a name to write to. At the end that file takes the place of `path`, or vanishes if writing failed."""
    try:
        yield f"{path}.tmp"
        os.replace(f"{path}.tmp", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.tmp")


def say(text, once=False):
    """A line for the user on stderr, at once: out of workers too, and among progress bars. once: what every rank finds
    alike, said by the first alone."""
    if not once or os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Moving shapes: the embedded data set


SHAPES = ("circle", "square", "triangle")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y); y grows downwards
COLOURS = {  # RGB, 0..1
    "red": (0.88, 0.35, 0.30),
    "orange": (0.90, 0.58, 0.28),
    "yellow": (0.88, 0.84, 0.35),
    "green": (0.40, 0.78, 0.40),
    "cyan": (0.38, 0.78, 0.82),
    "blue": (0.40, 0.55, 0.90),
    "purple": (0.72, 0.48, 0.90),
    "white": (0.88, 0.88, 0.88),
}


class MovingShapes(torch.utils.data.Dataset):
    """One shape moves in one direction over a soft, dark two-colour background: 12 classes, drawn on the fly, no files.

    Clip i is a function of (seed, split, i) alone, so every process draws the same one. `train` is endless (any index
    is valid, its length is nominal); `test` is a fixed set of other clips.

    frames: L >= 1. size: pixels, an int or (H, W). Items: video (3, L, H, W) in [-1, 1], label 0..11 (index % 12, so
    batches are balanced), caption 'a red circle moving left'.
    """

    classes = [f"{shape} moving {move}" for shape in SHAPES for move in MOVES]

    def __init__(self, frames=16, size=32, seed=0, split="train"):
        self.frames, self.size, self.seed, self.split = frames, pair(size), seed, split
        self.length = {"train": 1_000_000, "test": 2_400}[split]
        self.endless = split == "train"

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        index, draw = key if isinstance(key, tuple) else (key, 0)
        if not self.endless and index >= self.length:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, self.split == "test", index, draw])
        label = index % len(self.classes)
        shape, move = SHAPES[label // len(MOVES)], list(MOVES)[label % len(MOVES)]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        video = self.draw(rng, shape, np.array(MOVES[move]), np.array(COLOURS[colour]))
        article = "an" if colour == "orange" else "a"
        return dict(video=video, label=label, caption=f"{article} {colour} {shape} moving {move}")

    def read(self, index, draw=0):
        return self[index, draw]

    def draw(self, rng, shape, move, colour):
        height, width = self.size
        y, x = np.ogrid[0.5:height, 0.5:width]  # pixel centres
        # The background: two dark colours blended along a random direction. Every shape is brighter: were some darker,
        # a content model of minutes would take the mean of both and draw neither.
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle) + 0.5
        first, second = rng.uniform(0.15, 0.4, (2, 1)) + rng.uniform(-0.08, 0.08, (2, 3))
        background = first + np.clip(ramp, 0, 1)[..., None] * (second - first)  # (H, W, 3)
        # The path: a straight line that stays inside the frame, 0.6 to all of the free way long.
        reach = rng.uniform(0.29, 0.35) * min(height, width)
        free = np.array([width, height]) - 2 * reach
        travel = free * move * rng.uniform(0.6, 1)
        start = reach + np.maximum(0, -travel) + rng.uniform(0, 1, 2) * (free - np.abs(travel))
        centre = start + np.linspace(0, 1, self.frames)[:, None] * travel  # (L, 2)
        px = x - centre[:, 0, None, None]  # (L, 1, W)
        py = y - centre[:, 1, None, None]  # (L, H, 1)
        # Signed distance to the edge in pixels, negative inside: the last half pixel is the anti-aliasing. All shapes
        # have the area 2 reach^2: guidance exaggerates differences between classes, and would make a small shape faint.
        if shape == "circle":
            distance = np.hypot(px, py) - (2 / np.pi) ** 0.5 * reach
        elif shape == "square":
            distance = np.maximum(np.abs(px), np.abs(py)) - 0.5**0.5 * reach
        else:  # a triangle, point up, as wide as high
            distance = np.maximum((2 * np.abs(px) - (py + reach)) / 5**0.5, py - reach)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]  # (L, H, W, 1)
        colour = np.clip(colour + rng.uniform(-0.08, 0.08, 3), 0, 1)
        clip = background + cover * (colour - background)  # (L, H, W, 3)
        return torch.from_numpy(clip.astype(np.float32) * 2 - 1).permute(3, 0, 1, 2)  # (3, L, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# Reading videos


VIDEO_ENDINGS = tuple(".avi .mp4 .mkv .mov .webm .gif .m4v .mpg .mpeg .wmv .flv .ogv .ts .mts .m2ts .3gp .vob".split())
# Bicubic, which FFmpeg widens when it shrinks, so that nothing aliases. Rounded properly, since its short cut darkens
# by 1.5 levels; in one thread, since by default it starts one a core for every frame.
SCALING = dict(threads=1, interpolation=(
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT))


class BadVideo(Exception):
    """One file cannot be used; str() is the reason, without the file's name."""


def find_videos(root):
    """Sorted paths, relative to `root`, of the files at any depth whose names end like a video's. Follows links."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder) + os.sep  # a link to a folder above would be followed for ever
        folders[:] = [d for d in folders if not here.startswith(os.path.realpath(os.path.join(folder, d)) + os.sep)]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names
                  if name.lower().endswith(VIDEO_ENDINGS) and not name.startswith(".")]
    return sorted(found)


@contextlib.contextmanager
def open_video(file):
    """Yields (container, its first moving-picture stream); whatever goes wrong meanwhile is raised as BadVideo."""
    try:
        if not str(file).startswith("subfile,"):  # absolute, so that no name looks like a protocol ("12:30.mp4")
            file = os.path.abspath(file)
            if os.path.getsize(file) == 0:
                raise BadVideo("empty file")
        with av.open(file, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # a cover
            if not streams:
                raise BadVideo("no video stream")
            if streams[0].codec_context is None:
                raise BadVideo("no decoder for its codec")
            streams[0].codec_context.thread_count = 1  # the loader's workers are the parallelism
            yield container, streams[0]
    except (av.error.FFmpegError, OSError, ValueError, OverflowError) as e:
        raise BadVideo(getattr(e, "strerror", None) or str(e)) from None


def header_frames(container, stream):
    """The number of frames that the header tells; where it has none (.mkv, .webm), an estimate; 0 without a clue."""
    if stream.frames > 0:
        return stream.frames
    if stream.duration:
        seconds = stream.duration * stream.time_base
    else:  # the file's own, which in .mkv counts from time 0
        seconds = ((container.duration or 0) - max(0, container.start_time or 0)) / 1e6
    return round(seconds * (stream.average_rate or 0))


def count_packets(container, stream):
    """Number of coded frames: reads the file through without decoding it."""
    count = 0
    with contextlib.suppress(av.error.FFmpegError):  # cut off here
        for packet in container.demux(stream):
            count += packet.size > 0
    return count


def too_short(has, span):
    """The reason, in words, for a file of `has` frames where `span` are needed."""
    return f"too short: has {has} frame{'s' * (has != 1)}, {span} needed"


def fault(file, span):
    """Why `span` frames cannot be had from a file, as far as that is seen without decoding; "" where they can."""
    try:
        with open_video(file) as (container, stream):
            if not (stream.codec_context.width and stream.codec_context.height):
                return "its header gives no picture size"
            count = header_frames(container, stream)
            if count < 2 * span:  # it matters, and so short a file is quickly counted
                count = count_packets(container, stream)
    except BadVideo as e:
        return str(e)
    return too_short(count, span) if count < span else ""


def read_clip(file, frames, size=None, stride=1, rng=None):
    """Every `stride`-th frame of a video from a random start, `frames` in all, RGB: np.uint8 (L, H, W, 3).

    file: a path, or FFmpeg's name for a part of one ("subfile,,start,..."). size: int or (H, W); the picture is resized
    until it just covers H x W, and its centre is cut out; None keeps the file's size. rng: a numpy Generator that draws
    the start, uniformly over all that leave room for the clip; None starts at the first frame. Decodes only from the
    key frame before the clip to the clip's end. Rotations and flips noted in the file are applied, oblong pixels made
    square. Raises BadVideo: unreadable, no video stream, damaged, or fewer than (frames - 1) * stride + 1 frames.
    """
    span, count = (frames - 1) * stride + 1, None
    # Where damage is in the way, or the header promised more frames than there are, another start is tried. The last
    # is the first frame, and there either is an error.
    for place in [*(rng.random() for _ in range(4 if rng else 0)), 0.0]:
        with open_video(file) as (container, stream):
            count = header_frames(container, stream) if count is None else count
            start = int(place * max(1, count - span + 1))
            try:
                clip, seen = decode(container, stream, start, frames, size, stride)
            except BadVideo:
                if start == 0:
                    raise
                continue
        if len(clip) == frames:
            return np.stack(clip)
        if start == 0:
            raise BadVideo(too_short(seen, span))
        with open_video(file) as opened:
            count = min(start + seen, count_packets(*opened))


def decode(container, stream, start, frames, size, stride):
    """-> (pictures, how many frames there were from frame `start` on); too few of both if the file ends before."""
    packets = container.demux(stream)
    first, rate = next(packets), stream.average_rate
    begin = first.pts if first.pts is not None else first.dts  # stream.start_time is too early in .avi with B-frames
    decoded, target, skip = decoded_frames(stream, itertools.chain([first], packets)), None, start
    if start > 32 and rate and begin is not None:  # else near, or no clock to seek by: count from the first frame
        second, period = 1 / stream.time_base, 1 / (rate * stream.time_base)
        target, skip = float(begin + (start - 0.5) * period), 0  # half a frame early: time stamps are rounded
        # A file may land us behind the target: then we seek further ahead, in the end before the first frame.
        for where in (target, max(begin, target - 10 * second), begin - second):
            try:
                container.seek(int(where), stream=stream)
            except av.error.FFmpegError:  # cannot be sought in: on from the first frame
                break
            decoded = decoded_frames(stream, container.demux(stream), target)
            head = next(decoded, None)
            decoded = itertools.chain([head] if head else [], decoded)
            if head is None or head.pts is None or head.pts < target + period:
                break
    clip, seen, turn = [], 0, None
    scaler = VideoReformatter()  # one for the clip: its set-up costs more than a frame
    for frame in decoded:
        if frame is None:
            if seen:
                raise BadVideo("damaged: frames cannot be decoded")
        elif skip:
            skip -= 1
        elif seen or target is None or (frame.pts is not None and frame.pts >= target):
            if seen % stride == 0:
                if frame.is_corrupt:
                    raise BadVideo("damaged: frames are corrupt")
                turn = turn or orientation(frame)  # once a clip: each look leaks some bytes in PyAV 18
                clip.append(to_rgb(frame, turn, stream, size, scaler))
                if len(clip) == frames:
                    break
            seen += 1
    if len({picture.shape for picture in clip}) > 1:
        raise BadVideo("the picture's size changes")
    return clip, seen


def decoded_frames(stream, packets, target=None):
    """Yields frames, and None for what cannot be decoded. Skips frames before `target` that no other frame needs."""
    codec = stream.codec_context
    with contextlib.suppress(av.error.FFmpegError):  # reading fails: the file ends here
        for packet in packets:
            early = target is not None and packet.pts is not None and packet.pts < target
            codec.skip_frame = "NONREF" if early else "DEFAULT"
            try:
                frames = packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                frames = [None]
            yield from frames


def orientation(frame):
    """(a, b, c, d) of the display matrix: x is shown at a x + c y, and y at b x + d y, times 65536."""
    matrix = frame.side_data.get("DISPLAYMATRIX")  # (a, b, u, c, d, v, x, y, w)
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist() if matrix else (1, 0, 0, 0, 1)
    return a, b, c, d


def to_rgb(frame, turn, stream, size, scaler):
    """A decoded frame -> RGB (H, W, 3): resized by the same call that converts the colours, cropped, turned upright."""
    a, b, c, d = turn
    lying = abs(a) + abs(d) < abs(b) + abs(c)
    aspect = min(max(float(stream.sample_aspect_ratio or 1), 0.1), 10)  # a pixel's; a broken file may tell anything
    wide = frame.width * aspect
    H, W = frame.height, round(wide)
    if size is not None:
        H, W = pair(size)[::-1] if lying else pair(size)
    scale = max(H / frame.height, W / wide)
    height, width = max(H, round(frame.height * scale)), max(W, round(wide * scale))
    picture = scaler.reformat(frame, width, height, "rgb24", **SCALING).to_ndarray()
    top, left = (height - H) // 2, (width - W) // 2
    picture = picture[top:top + H, left:left + W]
    if lying:
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of video files


CHECK_AT_MOST = 20_000  # files whose headers VideoFolder reads at once; in larger folders bad ones show later


def to_model(clip):
    """np.uint8 (L, H, W, 3) -> float32 (3, L, H, W) in [-1, 1]."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


class VideoFiles(torch.utils.data.Dataset):
    """What the data sets of video files share: clips by (index, draw), and what becomes of files that cannot be read.

    A subclass defines _locate(index) -> (file for read_clip, its name for messages, label, caption), or BadVideo.
    Raises InputError for frames, size or stride below 1.
    """

    classes = []

    def __init__(self, where, count, frames, size, stride, seed):
        if frames < 1 or stride < 1 or (size is not None and min(pair(size)) < 1):
            raise InputError(f"frames ({frames}), size ({size}) and stride ({stride}) must be at least 1")
        self.where, self.frames, self.size, self.stride, self.seed = where, frames, size, stride, seed
        self.state = torch.zeros(count, dtype=torch.uint8).share_memory_()  # by all workers: 0 not tried, 1 good, 2 bad

    def __len__(self):
        return len(self.state)

    def read(self, index, draw=0):
        """Clip number `draw` of file `index` (see __getitem__). A file that cannot be used: it is counted, named in
        the log the first time, and BadVideo is raised; InputError once more than half of the files tried are so."""
        name = f"number {index}"
        try:
            file, name, label, caption = self._locate(index)
            rng = np.random.default_rng([self.seed, index, draw])
            clip = read_clip(file, self.frames, self.size, self.stride, rng)
        except BadVideo as e:
            known = self.state[index] == 2
            self.state[index] = 2
            tried, bad = int((self.state > 0).sum()), int((self.state == 2).sum())
            if not known:
                say(f"left out: {name}: {e} ({bad} of {tried} files tried)")
            if 2 * bad > max(tried, min(len(self), 32)):
                raise InputError(f"{bad} of the {tried} files tried in {self.where} cannot be used, more than half: "
                                 f"{e} ({name})") from None
            raise
        self.state[index] = 1
        return dict(video=to_model(clip), label=label, caption=caption)

    def __getitem__(self, key):
        """key: an index, or (index, draw), where draw (0, 1, ...) says which of the video's random clips. The same
        (seed, index, draw) gives the same clip in any process. In place of a bad file comes another, chosen by the same
        three numbers."""
        index, draw = key if isinstance(key, tuple) else (key, 0)
        index = chosen = range(len(self))[index]
        others = np.random.default_rng([self.seed, index, draw, 1])
        while True:
            try:
                return self.read(chosen, draw)
            except BadVideo:
                chosen = int(others.integers(len(self)))


class VideoFolder(VideoFiles):
    """Videos in class folders, as UCF-101 has them: root/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi.

    A class is a first-level folder of `root` (its files may lie deeper), numbered in alphabetical order; a caption is
    its name in words ("apply eye makeup"). Files directly in root have no class: label 0, caption "". `split`: a list
    of UCF-101's kind (trainlist01.txt), by path or by name beside the data; only the files it lists are used, and a
    classInd.txt beside it gives the order of the classes. Files whose header shows them broken or too short are left
    out, counted and named on stderr. Item: dict(video float32 (3, L, H, W) in [-1, 1], label int, caption str).
    Raises InputError: no such folder, no usable file, more than half unreadable, a split that cannot be found.
    """

    def __init__(self, root, frames, size, split=None, stride=1, seed=0):
        self.root = str(root)
        if not os.path.isdir(root):
            raise InputError(f"{root}: no such folder; it should hold videos, in one folder a class")
        files = find_videos(root)
        if not files:
            raise InputError(f"{root}: no videos in it or below it; looked for {' '.join(VIDEO_ENDINGS)}")
        of = {file: os.path.dirname(file).split(os.sep)[0] for file in files}  # the class, "" in root itself
        self.classes = sorted(set(of.values()) - {""})
        if split is not None:
            files = self._select(files, split)
        files = self._check(files, of, (frames - 1) * stride + 1)
        self.files, self.labels = files, [self.classes.index(of[file]) if self.classes else 0 for file in files]
        # In words: a space where a small letter or digit meets a capital, and for what is neither letter nor digit.
        self.captions = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+", " ", name).strip().lower()
                         for name in self.classes] or [""]
        super().__init__(self.root, len(files), frames, size, stride, seed)

    def _select(self, files, split):
        """The files that a list of UCF-101's kind names. Sets the classes from the classInd.txt beside it."""
        places = [pathlib.Path(base, folder) for base in (self.root, pathlib.Path(self.root).absolute().parent)
                  for folder in ("", "ucfTrainTestlist")]
        path = next(filter(pathlib.Path.is_file, [pathlib.Path(split), *(place / split for place in places)]), None)
        if not path:
            raise InputError(f"split {split}: no such file, neither by that path nor in {', '.join(map(str, places))}")
        lines = path.read_text("utf-8-sig", "surrogateescape").splitlines()
        names = [re.sub(r"\s+\d+$", "", line.strip()) for line in lines if line.strip()]  # "Class/file.avi 1"
        listed = {os.path.splitext(name.replace("/", os.sep))[0] for name in names}  # .avi may have become .mp4
        found = [file for file in files if os.path.splitext(file)[0] in listed]
        if not found:
            raise InputError(f"{path} lists none of the videos in {self.root}: it has names like "
                             f"{names[0] if names else '(nothing)'}, the folder has {files[0]}")
        if len(found) < len(listed):
            say(f"{path}: {len(listed) - len(found)} of its {len(listed)} videos are not in {self.root}")
        if path.with_name("classInd.txt").is_file():
            words = path.with_name("classInd.txt").read_text("utf-8-sig").split()  # "1 ApplyEyeMakeup", a line each
            self.classes = [name for _, name in sorted(zip(map(int, words[::2]), words[1::2]))]
        return found

    def _check(self, files, of, span):
        """The files that have a class and `span` frames; says which are left out, and why."""
        bad = {file: "in no class's folder" for file in files if self.classes and of[file] not in self.classes}
        if len(files) <= CHECK_AT_MOST:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                faults = pool.map(lambda file: fault(os.path.join(self.root, file), span), files)
                bad |= {file: reason for file, reason in zip(files, faults) if reason}
        if bad:
            say(f"{self.root}: left out {len(bad)} of {len(files)} files:\n"
                + "\n".join(f"  {file}: {reason}" for file, reason in bad.items()), once=True)
        broken = [file for file, reason in bad.items() if not reason.startswith(("too short", "in no class"))]
        if len(bad) == len(files) or 2 * len(broken) > len(files):
            first = (broken or files)[0]
            raise InputError(f"{self.root}: {len(bad)} of {len(files)} videos cannot be used ({span} frames are needed "
                             f"of each), such as: {bad[first]} ({first})")
        return [file for file in files if file not in bad]

    def _locate(self, index):
        label = self.labels[index]
        return os.path.join(self.root, self.files[index]), self.files[index], label, self.captions[label]


def csv_rows(path):
    """Yields the byte at which each row of a CSV file starts, that with the columns too. Skips blank lines.

    Raises InputError where a quote that is not closed swallows more than a field can hold.
    """
    with open(path, "rb") as file:
        # csv takes as many lines as a row needs; in any encoding, since only commas and quotes matter here.
        reader = csv.reader(line.decode("latin-1").replace("\r", "") for line in file)
        start = 0
        try:
            for row in reader:
                if row:
                    yield start
                start = file.tell()
        except csv.Error as e:
            raise InputError(f"{path}, line {reader.line_num}: {e}; is a quote not closed?") from None


def tar_rows(path):
    """Where the samples of a .tar lie: int64 (N, 3), the first byte of the video, its .txt and its .json; 0: none."""
    samples = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, ending = member.name.lower().rpartition(".")
                column = 0 if "." + ending in VIDEO_ENDINGS else {"txt": 1, "json": 2}.get(ending)
                if member.isfile() and member.size and column is not None:
                    samples.setdefault(key, [0, 0, 0])[column] = member.offset_data
    except (OSError, tarfile.TarError) as e:
        say(f"{path}: {e}; {len(samples)} samples before that")
    return np.array([sample for sample in samples.values() if sample[0]], np.int64).reshape(-1, 3)


class CaptionedVideos(VideoFiles):
    """Videos with captions, for text-to-video. `csv` is one of
    - a CSV file with the columns videoid, page_dir, name (WebVid's; the file is root/page_dir/videoid.mp4),
    - a CSV file with the columns path, caption (path relative to `root`, or absolute),
    - a .tar or a folder of them as video2dataset writes them: N.mp4 with N.txt or N.json ("caption"); root is not used.

    root: None is the CSV's own folder. Rows stay on disk; a process holds 8 bytes a row (.tar: 24). Missing and broken
    files are replaced when they are met, counted, and named on stderr. No classes: label 0. Items as VideoFolder's.
    Raises InputError: no such file, other columns, no rows; later, more than half of the files tried unreadable.
    """

    def __init__(self, csv, root, frames, size, stride=1, seed=0):
        self.csv = str(csv)
        self.root = os.path.dirname(os.path.abspath(csv)) if root is None else str(root)
        if os.path.isdir(csv):
            self.tars = sorted(os.path.join(csv, name) for name in os.listdir(csv) if name.endswith(".tar"))
            if not self.tars:
                raise InputError(f"{csv}: a folder without .tar files; give a .csv file or a folder of .tar files")
        elif os.path.isfile(csv):
            self.tars = [self.csv] if self.csv.endswith(".tar") else []
        else:
            raise InputError(f"{csv}: no such file; give a .csv file, a .tar, or a folder of .tar files")
        if self.tars:
            with concurrent.futures.ProcessPoolExecutor(8) as pool:  # millions of headers, read by Python
                parts = list(pool.map(tar_rows, self.tars))
            self.rows, self.ends = np.concatenate(parts), np.cumsum([len(part) for part in parts])
        else:
            rows = np.fromiter(csv_rows(csv), np.int64)
            self.columns, self.rows = self._row(rows[0]) if len(rows) else [], rows[1:]
            self.webvid = {"videoid", "page_dir", "name"} <= set(self.columns)
            if not self.webvid and not {"path", "caption"} <= set(self.columns):
                raise InputError(f"{csv}: its columns are {', '.join(self.columns)[:200] or '(none)'}; needed are "
                                 "videoid, page_dir and name (WebVid's) or path and caption")
        if not len(self.rows):
            raise InputError(f"{csv}: no videos in its .tar files" if self.tars else f"{csv}: no rows")
        super().__init__(self.csv, len(self.rows), frames, size, stride, seed)

    def _row(self, start):
        with open(self.csv, "rb") as file:
            file.seek(start)
            return next(csv.reader(line.decode("utf-8-sig", "replace").replace("\r", "") for line in file))

    def _locate(self, index):
        if self.tars:
            return self._locate_in_tar(index)
        row = dict(zip(self.columns, self._row(self.rows[index])))
        try:
            path = os.path.join(row["page_dir"], row["videoid"] + ".mp4") if self.webvid else row["path"]
            return os.path.join(self.root, path), path, 0, row["name" if self.webvid else "caption"]
        except KeyError:
            raise BadVideo(f"a row of {len(row)} columns, the first row has {len(self.columns)}") from None

    def _locate_in_tar(self, index):
        path = os.path.abspath(self.tars[np.searchsorted(self.ends, index, "right")])
        video, txt, info = self.rows[index].tolist()
        try:
            with open(path, "rb") as file:

                def header(first):  # of the member whose content starts there
                    file.seek(first - tarfile.BLOCKSIZE)
                    return tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")

                name, end = header(video).name, video + header(video).size
                text = file.read(header(txt or info).size).decode("utf-8", "replace").strip() if txt or info else ""
            if info and not txt:
                text = str(json.loads(text).get("caption") or "")
        except (OSError, tarfile.TarError, ValueError, AttributeError) as e:
            raise BadVideo(str(e)) from None
        return f"subfile,,start,{video},end,{end},,:{path}", f"{os.path.basename(path)}/{name}", 0, text


# ---------------------------------------------------------------------------------------------------------------------
# Writing videos and pictures


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
    """Writes a video, float (C, L, H, W) in [-1, 1] or uint8 (L, H, W, 3), as the name's ending says: .mp4 (H.264 that
    plays everywhere; odd sides grow by one pixel, which repeats the edge) or .gif (256 colours chosen for this video,
    plays for ever). The file appears whole or not at all. Raises InputError for another ending."""
    ending, video = os.path.splitext(path)[1].lower(), to_uint8(video)
    if ending == ".mp4":
        video = np.pad(video, [(0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)], mode="edge")
        scaler = VideoReformatter()  # SCALING's one thread: with several, the same video gives other bytes each time
        frames = (scaler.reformat(av.VideoFrame.from_ndarray(picture, format="rgb24"), format="yuv420p",
                                  dst_colorspace="ITU709", **SCALING) for picture in video)
        codec, pix_fmt, options = "libx264", "yuv420p", {"crf": "18"}
    elif ending == ".gif":  # counts hundredths of a second, and viewers slow down what is quicker than 50 a second
        frames, fps = palette_frames(video), min(fps, 50)
        codec, pix_fmt, options = "gif", "pal8", {}
    else:
        raise InputError(f"{path}: videos are written as .mp4 or .gif")
    with aside(path) as temporary, av.open(temporary, "w", format=ending[1:]) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt, stream.options = pix_fmt, options
        if ending == ".mp4":  # the file says how its colours were converted: by BT.709, to the limited range
            of = stream.codec_context
            of.colorspace = of.color_primaries = of.color_trc = of.color_range = 1
        for i, frame in enumerate(frames):
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def palette_frames(video):
    """np.uint8 (L, H, W, 3) -> frames for a .gif. One palette for the whole video and no dithering: what stands still
    does not flicker. Written by PyAV, since Pillow drops frames that repeat the one before."""
    L, H, W, _ = video.shape
    palette = Image.fromarray(video.reshape(L * H, W, 3)).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    colours = np.full((256, 4), 255, np.uint8)  # (256, ARGB)
    rgb = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    colours[:len(rgb), 1:] = rgb
    for picture in video:
        indices = np.array(Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE))
        yield av.VideoFrame.from_ndarray((indices, colours), format="pal8")


def write_sheet(path, videos, columns, captions=None, frames=9):
    """One .png to look at: each video (float or uint8, as for write_video; all equally large) is a strip of up to
    `frames` frames, evenly spread, under as much of its caption as fits; `columns` strips side by side. Small pictures
    are enlarged, pixel by pixel, to 96 pixels or more."""
    strips, font = [], ImageFont.load_default(14)
    for video, caption in zip(map(to_uint8, videos), captions or itertools.repeat("")):
        video = video[np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)]
        times = math.ceil(96 / min(video.shape[1:3]))
        video = video.repeat(times, 1).repeat(times, 2)
        strip = tile(video[:, None], columns=len(video), colour=255)[0]  # each frame a video of one frame
        strip = Image.fromarray(np.pad(strip, [(20 if captions else 0, 0), (0, 0), (0, 0)], constant_values=255))
        ImageDraw.Draw(strip).text((0, 0), caption, "black", font)
        strips.append(np.array(strip)[None])  # (1, H, W, 3)
    with aside(path) as temporary:
        Image.fromarray(tile(strips, min(columns, len(strips)), 10, 255)[0]).save(temporary, format="PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Encoded clips: what stages 2 and 3 read


# encodings/
#   index.json                what was encoded and by which autoencoder; "complete" once every shard is there
#   shard-00000/content.npy   float16 (N, C, H, W)        content frames
#               motion.npy    float16 (N, D, L, H'+W')    motion latents, as the autoencoder gives them
#               clips.jsonl   one line a clip: {"label": 3, "caption": "..."}
#               lines.npy     int64 (N+1,)                where each line starts
#               shard.json    {"clips": N, "crc32": {file: checksum}, "bytes": {file: size}}


def write_json(path, content):
    """The file appears whole or not at all."""
    with aside(path) as temporary, open(temporary, "w") as file:
        json.dump(content, file, indent=1)


def write_shard(folder, number, content, motion, records, **extra):
    """Writes one shard whole or not at all: into a folder aside, which then takes its name.

    content (N, C, H, W) and motion (N, D, L, H'+W') are arrays, records N dicts. `extra` goes into shard.json.
    Raises InputError where it cannot be written.
    """
    final, temporary = (pathlib.Path(folder, f"{name}-{number:05d}") for name in ("shard", "tmp"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
        np.save(temporary / "content.npy", np.asarray(content, np.float16))
        np.save(temporary / "motion.npy", np.asarray(motion, np.float16))
        np.save(temporary / "lines.npy", np.cumsum([0] + [len(line) for line in lines]).astype(np.int64))
        (temporary / "clips.jsonl").write_bytes(b"".join(lines))
        paths = sorted(temporary.iterdir())
        write_json(temporary / "shard.json", dict(
            clips=len(records), crc32={path.name: zlib.crc32(path.read_bytes()) for path in paths},
            bytes={path.name: path.stat().st_size for path in paths}) | extra)
        temporary.rename(final)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {final}: {e.strerror or e}; mend it and repeat with --encode") from None


def check_shard(folder, checksums=True):
    """The contents of a shard's shard.json. Raises InputError that names the file that is missing or damaged."""
    folder = pathlib.Path(folder)
    mend = f"delete {folder} and run `python autoencoder.py --run {folder.parents[1]} --encode`"
    try:
        info = json.loads((folder / "shard.json").read_text())
        damaged = [path for path in map(folder.joinpath, info["bytes"])
                   if path.stat().st_size != info["bytes"][path.name]
                   or (checksums and zlib.crc32(path.read_bytes()) != info["crc32"][path.name])]
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{folder} is not a whole shard ({e}): {mend}") from None
    if damaged:
        raise InputError(f"{damaged[0]} is damaged: {mend}")
    return info


@functools.lru_cache(maxsize=128)
def open_shard(folder):
    """content, motion, lines and text of a shard, memory-mapped."""
    arrays = [np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r") for name in ("content", "motion", "lines")]
    return *arrays, np.memmap(os.path.join(folder, "clips.jsonl"), mode="r")


class EncodedClips(torch.utils.data.Dataset):
    """The encodings of a run folder: a clip costs one small read, whatever the size of the set.

    Items: content (C, H, W) and motion (D, L, H'+W') float32, label int, caption str. Raises InputError where there are
    none, they are not of `data`, the encoding was interrupted, the run's autoencoder is another one, or a shard is
    damaged (sizes always; checksums up to 1 GiB in all).
    """

    def __init__(self, run, data=None):
        folder, command = os.path.join(run, "encodings"), f"`python autoencoder.py --run {run} --encode`"
        try:
            self.index = json.loads(pathlib.Path(folder, "index.json").read_text())
        except (OSError, ValueError):
            raise InputError(f"no encodings in {run}: train with `python autoencoder.py --run {run}`, or encode with "
                             f"{command}") from None
        if not self.index["complete"]:
            raise InputError(f"the encoding in {run} was interrupted: go on with {command}")
        if data not in (None, self.index["data"]):
            raise InputError(f"the encodings in {run} are of {self.index['data']}, not of {data}: drop --data, or "
                             "train `autoencoder.py` on it in another --run")
        model = os.path.join(run, "autoencoder.pt")
        if os.path.exists(model) and load_checkpoint(model, "autoencoder")["fingerprint"] != self.index["fingerprint"]:
            raise InputError(f"the encodings in {run} were made by another autoencoder than its autoencoder.pt: make "
                             f"them anew with {command}")
        self.classes = self.index["classes"]
        self.content_shape, self.motion_shape = tuple(self.index["content"]), tuple(self.index["motion"])
        self.motion_mean, self.motion_std = (  # (D, 1, 1), over all clips
            torch.tensor(self.index[name])[:, None, None] for name in ("motion_mean", "motion_std"))
        small = self.index["clips"] * (np.prod(self.content_shape) + np.prod(self.motion_shape)) * 2 < 2**30
        self.shards = [os.path.join(folder, f"shard-{number:05d}") for number in range(self.index["shards"])]
        self.starts = np.cumsum([0] + [check_shard(shard, checksums=small)["clips"] for shard in self.shards])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, key):
        index = range(len(self))[key[0] if isinstance(key, tuple) else key]
        number = np.searchsorted(self.starts, index, side="right") - 1
        row = index - self.starts[number]
        content, motion, lines, text = open_shard(self.shards[number])
        record = json.loads(text[lines[row]:lines[row + 1]].tobytes())
        return dict(content=torch.from_numpy(content[row].astype(np.float32)),
                    motion=torch.from_numpy(motion[row].astype(np.float32)),
                    label=record["label"], caption=record["caption"])


# ---------------------------------------------------------------------------------------------------------------------
# The stream of batches


@functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_keys(indices, batch_size, seed, step, rank, world):
    """Which clips a rank reads: yields, for each step from `step` on, a batch of keys (index, epoch), without end.

    Position p of the stream is clip p mod n of epoch p div n's own shuffle; step s reads positions s*B to (s+1)*B - 1
    and each rank takes its share of them. So (seed, step) is the whole data position: nothing else need be saved, and
    a run resumed on more or fewer ranks or workers reads on at the very next clip.
    """
    share = batch_size // world

    def key(position):
        if indices is None:  # an endless data set: every position is a clip of its own
            return position, 0
        epoch, place = divmod(position, len(indices))
        return int(indices[int(shuffled(len(indices), seed, epoch)[place])]), epoch

    while True:
        first = step * batch_size + rank * share
        yield [key(position) for position in range(first, first + share)]
        step += 1


def stream(dataset, batch_size, seed=0, step=0, workers=0, rank=0, world=1, indices=None):
    """An endless iterator over this rank's batches from `step` on. batch_size: over all ranks; indices: a subset."""
    if indices is None and not getattr(dataset, "endless", False):
        indices = range(len(dataset))
    workers = at_most_cores(workers)
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=batch_keys(indices, batch_size, seed, step, rank, world), num_workers=workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=quiet_worker, prefetch_factor=4 if workers else None))


def at_most_cores(workers):
    """As many of the workers as this process has cores: more would only be in each other's way."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(workers, cores)


def quiet_worker(_):
    """A loader's worker begins. Ctrl-C, and the SIGTERM of torchrun or a scheduler, reach the workers too, but the main
    process alone answers them, and needs its workers until it has saved: they end at its own SIGTERM only."""

    def end_when_told():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_told, daemon=True).start()
    torch.set_num_threads(1)  # the workers are many


def open_dataset(data, frames, size, stride=1, split=None, captions=None, seed=0):
    """The data set that --data names, as (data set, training indices or None for endless, test set, test indices).

    data: 'shapes', a folder of videos, a CSV, a .tar or a folder of them; or, with `captions` (a CSV), the folder that
    its paths start from. A folder's test clips are those of testlistNN.txt where --split is trainlistNN.txt and the
    other lies beside it; elsewhere one file in fifty, at most 64, is kept out of training.
    """
    if data == "shapes":
        test = MovingShapes(frames, size, seed, split="test")
        return MovingShapes(frames, size, seed), None, test, range(len(test))
    if not os.path.exists(data):
        raise InputError(f"--data {data} does not exist: name a folder of videos, or 'shapes' for the embedded set")
    tars = os.path.isdir(data) and any(name.endswith(".tar") for name in os.listdir(data))
    if captions or tars or data.endswith((".csv", ".tar")):
        dataset = CaptionedVideos(captions or data, data if captions else None, frames, size, stride, seed)
    else:
        dataset = VideoFolder(data, frames, size, split, stride, seed)
        folder, name = os.path.split(split or "")
        if "train" in name:
            with contextlib.suppress(InputError):
                other = os.path.join(folder, name.replace("train", "test"))
                test = VideoFolder(data, frames, size, other, stride, seed)
                return dataset, range(len(dataset)), test, range(len(test))
    kept = min(64, len(dataset) // 50) or (1 if len(dataset) > 3 else 0)
    if not kept:
        say(f"{data}: too few videos to keep one out of training: test clips are training clips", once=True)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).numpy()
    return dataset, np.sort(order[kept:]), dataset, np.sort(order[:kept] if kept else order)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: checkpoints and logs


def save_checkpoint(path, state):
    """Writes aside, syncs, renames: a kill at any moment leaves the earlier checkpoint or the new one, whole. Raises
    InputError where the disk is full or the like."""
    try:
        with aside(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        while e.__context__ and not isinstance(e, OSError):
            e = e.__context__
        reason = str(getattr(e, "strerror", None) or e).splitlines()[0]
        left = "the earlier checkpoint is whole" if os.path.exists(path) else "nothing was saved"
        free = shutil.disk_usage(os.path.dirname(path) or ".").free / 1e6
        raise InputError(f"cannot save {path} ({reason}; {free:.0f} MB free on its disk): {left}; free some space and "
                         "go on with --resume") from None


def load_checkpoint(path, stage):
    """The dict that a stage saved, memory-mapped on the CPU. Runs no code from the file (weights_only).

    Raises InputError for a missing or damaged file, one that holds more than tensors and plain values, and one that
    another stage wrote. stage: 'autoencoder', 'content' or 'motion'.
    """
    script = {"autoencoder": "autoencoder.py", "content": "content_diffusion.py", "motion": "motion_diffusion.py"}
    if not os.path.isfile(path):
        raise InputError(f"no {path}: train it first with `python {script[stage]} --run {os.path.dirname(path)}`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path} holds more than tensors and is not loaded: {reason}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError):
        raise InputError(f"{path} is damaged or no checkpoint: delete it and train it anew with {script[stage]}"
                         ) from None
    if not isinstance(state, dict) or "stage" not in state:
        raise InputError(f"{path} was not written by {script[stage]}")
    if state["stage"] != stage:
        raise InputError(f"{path} was written by {script.get(state['stage'], state['stage'])}, not by {script[stage]}")
    return state


def weights_hash(tensors):
    """A short name for a set of weights: equal names, equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Log:
    """A CSV file, one line a call. Resuming at `step` drops the lines after it, and those that are not at a multiple of
    one of `every`: the last line of a run that was broken off or lengthened since."""

    def __init__(self, path, columns, step, every):
        self.columns, lines = columns, []
        if step and os.path.exists(path):
            with open(path) as file:
                lines = [line for line in file.readlines()[1:] if line.endswith("\n")]  # a kill may have cut the last
        steps = [int(line.split(",")[0]) for line in lines]
        lines = [line for line, n in zip(lines, steps) if n <= step and any(n % interval == 0 for interval in every)]
        with aside(path) as temporary, open(temporary, "w") as file:
            file.writelines([",".join(columns) + "\n"] + lines)
        self.file = open(path, "a", buffering=1)

    def __call__(self, **values):
        cells = [values.get(name, "") for name in self.columns]
        self.file.write(",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Processes: ranks, signals, errors


def start(seed):
    """(rank, world, device), in a process group where torchrun started this process, alone where it did not.

    Tensors on the CPU are reduced by gloo, those on GPUs by nccl. A rank that waits longer than half an hour for
    the others gives up with an error.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where something stays in float32
    elif sys.platform == "linux":
        # Have glibc keep the large blocks that tensors free: giving each back to the kernel and having it zeroed anew
        # costs a fifth of a training step on the CPU.
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 1 << 30)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=fresh_store(rank, world), rank=rank, world_size=world,
                                             timeout=datetime.timedelta(minutes=30))
    torch.manual_seed(seed)
    return rank, world, device


def fresh_store(rank, world):
    """Where the ranks find each other's addresses. torchrun may keep its store when it restarts them (in PyTorch 2.15):
    a rank that is quicker than another would then take the address of that one's dead predecessor and wait for ever. So
    each makes itself a new name, and they use a part of the store that is called by the names of all, once all agree.
    """
    store = next(torch.distributed.rendezvous("env://"))[0]
    store.set(f"name of {rank}", os.urandom(16).hex())
    while True:
        names = b" ".join(store.get(f"name of {other}") for other in range(world))  # waits for who is not there yet
        store.set(f"names seen by {rank}", names)
        if all(store.get(f"names seen by {other}") == names for other in range(world)):
            return torch.distributed.PrefixStore(hashlib.sha256(names).hexdigest(), store)
        time.sleep(0.05)


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to save and leave after the step at hand; a second Ctrl-C leaves at once."""

    def __init__(self):
        self.asked = torch.zeros(1)
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, _):
        self.asked += 1
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        if torch.distributed.is_initialized():  # ranks must leave after the same step
            torch.distributed.all_reduce(self.asked, torch.distributed.ReduceOp.MAX)
        return bool(self.asked)


def run(main):
    """Runs a script's main(): an InputError is printed as one line, with no traceback; so are a path that cannot be
    used, a full disk, a loader's worker that was killed, and the end of another rank."""
    name = os.path.basename(sys.argv[0])
    warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"  # one line, as errors are
    try:
        main()
    except InputError as e:
        # From a loader's worker the message comes wrapped in the worker's traceback: its last line is the message.
        sys.exit(f"{name}: {str(e).strip().splitlines()[-1].removeprefix('data.InputError: ')}")
    except (OSError, RuntimeError) as e:
        line = " ".join(str(e).split())
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            sys.exit(f"{name}: {line}: free some space and go on with --resume")
        if isinstance(e, OSError) and e.filename:
            sys.exit(f"{name}: {e.filename}: {e.strerror}: name another path, or mend that one")
        if line.startswith("DataLoader worker"):
            sys.exit(f"{name}: {line.rstrip('. ')}. Memory may have run out: take fewer --workers, and go on with "
                     "--resume")
        if isinstance(e, torch.distributed.DistError) or "gloo" in line:
            sys.exit(f"{name}: lost the other ranks; the one that ended first says why ({line[-150:]})")
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # After an error on this rank alone nccl would wait here for the others, and the message with it; gloo does not.
        failed = sys.exc_info()[0] is not None
        if torch.distributed.is_initialized() and not (failed and torch.cuda.is_initialized()):
            torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Flags, and what the three training loops share


class Flags(argparse.ArgumentParser):
    """argparse, but a mistake costs one line, a near miss is named, and --help shows every default."""

    def __init__(self, text):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=text, allow_abbrev=False, formatter_class=formatter)

    def format_help(self):
        return re.sub(r"\s+\(default:\s+(None|False|)\)", "", super().format_help())  # that is, none

    def error(self, message):
        wrong = re.findall(r"(?<=unrecognized arguments: )--[\w-]+", message)
        near = difflib.get_close_matches(wrong[0], self._option_string_actions) if wrong else []
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        self.exit(2, f"{self.prog}: {message} ({hint})\n")


def within(low, high=math.inf, kind=int):
    """argparse's type of a whole number (kind float: any number) from `low` to `high`."""

    def number(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):
                return value
        reach = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' * (kind is int)}number {reach}")

    return number


COUNT = within(1)
SEED = within(0, 2**40)  # times a million it still fits 64 bits


def link_encodings(run_folder, other):
    """Lends a run folder the autoencoder and the encodings of another, as links. Raises InputError where it has its own
    or the other has none."""
    for name in ("autoencoder.pt", "encodings"):
        source, target = os.path.realpath(os.path.join(other, name)), os.path.join(run_folder, name)
        if not os.path.exists(source):
            raise InputError(f"--encodings {other} has no {name}: train and encode with autoencoder.py --run {other}")
        os.makedirs(run_folder, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # by an earlier start, or another rank
            os.symlink(os.path.relpath(source, os.path.realpath(run_folder)), target)
        if os.path.realpath(target) != source:
            raise InputError(f"{target} exists: --encodings {other} is for another --run")


def parse_flags(parser, presets, stage):
    """(flags, checkpoint or None). From weakest to strongest: preset, checkpoint when resuming, command line.

    The preset is the one asked for, or the run folder's own, or 'shapes'. --resume with no checkpoint to be found
    starts afresh, so that one command serves a first start and torchrun's restarts. Raises InputError where a start
    would overwrite a checkpoint, and for another preset than the checkpoint's.
    """
    words = sys.argv[1:]
    given, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    if {"-h", "--help"} & set(words):  # with the defaults of the preset that is named
        parser.set_defaults(**presets[given.preset or "shapes"])
        parser.parse_args(["--help"])
    preset, encode = given.preset, getattr(given, "encode", False)
    if getattr(given, "encodings", None):
        if not given.run:
            raise InputError("--encodings needs --run: the folder of the new run")
        link_encodings(given.run, given.encodings)
    if given.run and not preset:
        with contextlib.suppress(OSError, ValueError, KeyError), open(f"{given.run}/encodings/index.json") as file:
            preset = json.load(file)["preset"]
    run_folder = given.run or f"runs/{preset or 'shapes'}"
    path = os.path.join(run_folder, f"{stage}.pt")
    checkpoint, saved = None, {}
    if os.path.exists(path) and not (given.resume or encode):
        raise InputError(f"{path} exists: --resume goes on with it, another --run starts afresh")
    if os.path.exists(path) or encode:
        checkpoint = load_checkpoint(path, stage)
        saved = {name: value for name, value in checkpoint["args"].items() if name not in ("resume", "encode")}
        if preset not in (None, saved["preset"]):
            raise InputError(f"{path} was trained with --preset {saved['preset']}, not {preset}: drop --preset, or "
                             "name another --run")
        preset = saved["preset"]
    elif given.resume:
        say(f"no {path} to resume: starting afresh", once=True)
    preset = preset or "shapes"
    parser.set_defaults(**presets[preset] | saved)
    args = parser.parse_args()
    args.preset, args.run = preset, run_folder
    return args, checkpoint


def check_config(config, checkpoint, path, fingerprint=None):
    """Resuming continues the model that was saved: InputError for a flag that would build another one, and for
    encodings (by their `fingerprint`) of another autoencoder."""
    for name, value in checkpoint["config"].items():
        if name in config and config[name] != value:
            raise InputError(f"{path} was trained with {name} {value}, not {config[name]}: drop that flag, or name "
                             "another --run")
    if fingerprint and fingerprint != checkpoint["fingerprint"]:
        raise InputError(f"{path} was trained on the encodings of another autoencoder: train it anew in another --run, "
                         "or delete it")


def split_batch(args, world):
    """(clips a rank takes each step, the slices of them that pass through the model one after the other). Raises
    InputError where they would not all be equally large."""
    share, odd = divmod(args.batch_size, world * args.accumulate)
    if odd or share == 0:
        raise InputError(f"--batch-size {args.batch_size} is over all ranks: make it a multiple of {world} rank(s) "
                         f"times --accumulate {args.accumulate}")
    return share * args.accumulate, [slice(i * share, (i + 1) * share) for i in range(args.accumulate)]


def chosen_dtype(args, device):
    """torch.float32 or torch.bfloat16: --dtype, or the default of the device."""
    return getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def autocast(args, device):
    """Arithmetic by --dtype: in bfloat16 wherever that is precise enough, or all in float32."""
    return torch.autocast(device.type, torch.bfloat16, chosen_dtype(args, device) == torch.bfloat16)


def last_only(model, part, parts):
    """Under DistributedDataParallel, gradients travel with the last of the accumulated parts only."""
    waits = isinstance(model, torch.nn.parallel.DistributedDataParallel) and part is not parts[-1]
    return model.no_sync() if waits else contextlib.nullcontext()


def learning_rate(args, step):
    """Constant, or with --decay-steps a rise over the first twentieth and a cosine fall to a hundredth by that step."""
    if not args.decay_steps:
        return args.lr
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1, step / args.decay_steps))
    return args.lr * min(1, (step + 1) / (0.05 * args.decay_steps)) * max(0.01, fall)


def average(value):
    """The mean of a tensor over the ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def check_finite(bad_row, step, path):
    """Raises InputError, which ends the run, where 5 steps or more in a row were skipped for a NaN or infinite
    gradient."""
    if bad_row >= 5:
        left = f"{path} holds the last good weights" if os.path.exists(path) else "nothing was saved yet"
        raise InputError(f"the last {int(bad_row)} steps up to {step} had a NaN or infinite loss and were skipped: "
                         f"lower --lr, or look at the data; {left}")
