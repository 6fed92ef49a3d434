"""Proves that video gets in and out of files: the frames asked for, upright and not squashed, from random starts that
can be repeated; that no hostile file stops a data set or leaks; that ten million captions cost little memory; and that
what write_video wrote reads back. Videos are made here, frame i painted with a brightness that says i.

    pytest tests/test_data.py              and, twenty thousand clips:  pytest -m slow tests/test_data.py
"""

import contextlib
import csv
import gc
import io
import json
import os
import pickle
import struct
import tarfile
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data

STEP = 4        # brightness from one frame to the next, modulo 200


def brightness(i):
    return 20 + i * STEP % 200


def numbers(clip):
    """Frame numbers modulo 50, read back from the brightness."""
    return [round((float(picture.mean()) - 20) / STEP) % 50 for picture in clip]


def write(path, frames=60, height=48, width=64, codec=None, pix_fmt="yuv420p", fps=25, gop=12, bframes=None,
          options=None, pictures=None, times=None, audio=False):
    """A test video by PyAV. pictures: i -> (H, W, 3) uint8, else flat grey of brightness(i). times: i -> pts."""
    path = str(path)
    codec = codec or {".avi": "mpeg4", ".webm": "libvpx", ".gif": "gif", ".mpg": "mpeg2video"}.get(path[-4:], None) \
        or ("libvpx" if path.endswith("webm") else "libx264")
    with av.open(path, "w") as f:
        stream = f.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, pix_fmt, options or {}
        stream.codec_context.gop_size = gop
        if codec in ("mpeg4", "mpeg2video", "libvpx", "libvpx-vp9"):
            stream.bit_rate = 4_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        if audio:
            sound = f.add_stream("aac", rate=8000)
        for i in range(frames):
            picture = pictures(i) if pictures else np.full((height, width, 3), brightness(i), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = times(i) if times else i
            if times:
                frame.time_base = Fraction(1, 1000)
            f.mux(stream.encode(frame))
        f.mux(stream.encode())
        if audio:
            write_sound(f, sound, frames / fps + 3)
    return path


def write_sound(f, stream, seconds):
    for i in range(int(seconds * 8000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, i * 1024, Fraction(1, 8000)
        f.mux(stream.encode(frame))
    f.mux(stream.encode())


def write_long(path, hours=4, fps=10):
    """A file of many hours, quickly: one coded group of pictures, over and over."""
    piece = write(f"{path}.piece.mp4", frames=50, gop=50, fps=fps, bframes=0, options={"preset": "ultrafast"})
    with av.open(piece) as source, av.open(str(path), "w") as f:
        stream = f.add_stream_from_template(source.streams.video[0])
        packets = [(bytes(p), p.is_keyframe, p.duration) for p in source.demux(video=0) if p.size]
        tick = packets[0][2]
        for i in range(hours * 3600 * fps):
            packet = av.Packet(packets[i % 50][0])
            packet.stream, packet.is_keyframe = stream, packets[i % 50][1]
            packet.time_base = source.streams.video[0].time_base
            packet.pts = packet.dts = i * tick
            packet.duration = tick
            f.mux(packet)
    os.remove(piece)
    return str(path)


def turn(path, matrix):
    """Writes an orientation into a finished .mp4: the 3x3 matrix of its track header."""
    content = bytearray(open(path, "rb").read())
    at = content.index(b"tkhd") + 44
    content[at:at + 36] = struct.pack(">9i", *matrix)
    open(path, "wb").write(content)


def consecutive(found, stride=1):
    return all((b - a) % 50 == stride for a, b in zip(found, found[1:]))


def rng(seed=0):
    return np.random.default_rng(seed)


KINDS = {
    "h264.mp4": dict(),
    "one_key_frame.mp4": dict(gop=1000, bframes=3),
    "bframes.avi": dict(bframes=2),
    "plain.avi": dict(bframes=0),
    "h264.mkv": dict(),
    "vp8.webm": dict(options={"deadline": "realtime", "cpu-used": "8"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "palette.gif": dict(pix_fmt="rgb8"),
    "quick.mov": dict(codec="mpeg4"),
    "mpeg2.mpg": dict(codec="mpeg2video", bframes=2),
    "transport.ts": dict(bframes=2),
    "ten_bit.mp4": dict(pix_fmt="yuv420p10le"),
    "grey.mkv": dict(codec="ffv1", pix_fmt="gray"),
    "odd.mkv": dict(codec="ffv1", pix_fmt="yuv444p", height=47, width=63),
    "alpha.mkv": dict(codec="ffv1", pix_fmt="bgra"),
    "full_range.mp4": dict(codec="mjpeg", pix_fmt="yuvj420p"),
    "sound.mp4": dict(audio=True),
    "sound.mkv": dict(audio=True),
    "late_start.mp4": dict(times=lambda i: 70000 + 40 * i),
    "late_start.mkv": dict(times=lambda i: 70000 + 40 * i),
    "Ünïcode 12:30 ü.mp4": dict(),
}


@pytest.mark.parametrize("name", KINDS)
def test_seeking_gives_the_very_pixels_of_decoding_from_the_start(tmp_path, name):
    path = write(tmp_path / name, frames=150, **KINDS[name])
    whole = data.read_clip(path, 150)
    assert consecutive(numbers(whole)) and numbers(whole)[0] == 0
    for seed in range(40):
        clip = data.read_clip(path, 8, stride=2, rng=rng(seed))
        assert consecutive(numbers(clip), 2)
        assert any(np.array_equal(whole[i:i + 15:2], clip) for i in range(136)), "other pixels than without seeking"


class Place:
    """In a Generator's place: always gives the same number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("mpeg2.mpg", "sound.mkv")])
def test_a_start_is_the_frame_it_was_meant_to_be(tmp_path, name):
    path = write(tmp_path / name, frames=120, **KINDS[name])
    for place in (0.0, 0.1, 0.3, 0.4, 0.5, 0.77, 0.999):        # among 106 starts
        assert numbers(data.read_clip(path, 15, rng=Place(place)))[0] == int(place * 106) % 50


def test_a_header_that_promises_too_much_is_corrected(tmp_path):
    path = write(tmp_path / "sound.mkv", frames=120, audio=True)     # the file's duration is its sound's, 3 s longer
    for place in (0.6, 0.9):
        assert numbers(data.read_clip(path, 15, rng=Place(place)))[0] == int(place * 106) % 50


def test_a_name_may_look_like_a_protocol(tmp_path, monkeypatch):
    write(tmp_path / "12:30.mp4", frames=8)
    monkeypatch.chdir(tmp_path)
    assert len(data.read_clip("12:30.mp4", 8)) == 8


def test_starts_are_spread_evenly_and_repeat_with_the_seed(tmp_path):
    path = write(tmp_path / "a.mp4", frames=24)
    first = [numbers(data.read_clip(path, 5, rng=rng(seed)))[0] for seed in range(400)]
    counts = np.bincount(first, minlength=20)
    assert len(counts) == 20 and counts.min() >= 6 and counts.max() <= 40       # 20 each expected
    assert first[:30] == [numbers(data.read_clip(path, 5, rng=rng(seed)))[0] for seed in range(30)]
    assert numbers(data.read_clip(path, 24, rng=rng(1))) == list(range(24))      # just enough
    assert numbers(data.read_clip(path, 2, stride=23, rng=rng(1))) == [0, 23]
    with pytest.raises(data.BadVideo, match="too short: has 24 frames, 25 needed"):
        data.read_clip(path, 25, rng=rng(1))


def test_uneven_frame_rate_still_gives_consecutive_frames(tmp_path):
    for name, times in {"slow_end.mp4": lambda i: i * 10 if i < 40 else 400 + (i - 40) * 400,
                        "slow_end.mkv": lambda i: i * 10 if i < 40 else 400 + (i - 40) * 400,
                        "slow_start.mkv": lambda i: i * 300 if i < 20 else 6000 + (i - 20) * 10}.items():
        path = write(tmp_path / name, times=times)
        for seed in range(20):
            assert consecutive(numbers(data.read_clip(path, 16, rng=rng(seed))))


def test_a_circle_stays_a_circle_and_comes_from_the_centre(tmp_path):
    y, x = np.mgrid[:120, :200]
    disc = (((y - 59.5) ** 2 + (x - 99.5) ** 2 < 40 ** 2) * 255).astype(np.uint8)[..., None].repeat(3, 2)
    path = write(tmp_path / "disc.mp4", frames=3, height=120, width=200, pictures=lambda i: disc)
    for size in (60, (48, 64), (64, 48), (33, 71), 240):
        H, W = data.pair(size)
        inside = data.read_clip(path, 1, size=size)[0, ..., 0] > 127
        assert inside.shape == (H, W)
        across, down = inside[H // 2].sum(), inside[:, W // 2].sum()
        assert abs(int(across) - int(down)) <= 2 and across == pytest.approx(80 * max(H / 120, W / 200), abs=2)
        rows, columns = np.nonzero(inside)
        assert abs(rows.mean() - (H - 1) / 2) < 1 and abs(columns.mean() - (W - 1) / 2) < 1


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv444p", "bgra"])
def test_colours_come_out_as_they_went_in(tmp_path, pix_fmt):
    blocks = rng().integers(0, 256, (4, 4, 3)).repeat(32, 0).repeat(32, 1).astype(np.uint8)
    path = write(tmp_path / "c.mkv", frames=1, height=128, width=128, codec="ffv1", pix_fmt=pix_fmt,
                 pictures=lambda i: blocks)
    for size in (None, 64):
        clip = data.read_clip(path, 1, size=size)[0].astype(int)
        middle = 16 if size is None else 8
        assert np.abs(clip[middle::2 * middle, middle::2 * middle] - blocks[16::32, 16::32]).max() <= 2


def test_shrinking_does_not_alias(tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    path = write(tmp_path / "s.mkv", frames=1, height=256, width=256, codec="ffv1", pix_fmt="yuv444p",
                 pictures=lambda i: stripes)
    assert data.read_clip(path, 1, size=60).std() < 10


def test_oblong_pixels_are_made_square(tmp_path):
    path = str(tmp_path / "dv.mp4")
    with av.open(path, "w") as f:
        stream = f.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)       # shown 128 x 64
        y, x = np.mgrid[:64, :64]
        disc = ((y - 32) ** 2 + (2 * (x - 32)) ** 2 < 24 ** 2)[..., None] * np.full(3, 255)
        f.mux(stream.encode(av.VideoFrame.from_ndarray(disc.astype(np.uint8), format="rgb24")))
        f.mux(stream.encode())
    inside = data.read_clip(path, 1, size=64)[0, ..., 0] > 127
    assert abs(int(inside[32].sum()) - int(inside[:, 32].sum())) <= 3


ONE = 1 << 16
TURNS = {       # (a, b, c, d) of the file's matrix, and what must come out of a picture whose corner (0, 0) is bright
    "90 clockwise": ((0, ONE, -ONE, 0), lambda p: np.rot90(p, -1)),
    "180": ((-ONE, 0, 0, -ONE), lambda p: np.rot90(p, 2)),
    "90 counterclockwise": ((0, -ONE, ONE, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda p: p[:, ::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda p: p.swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_rotated_file_comes_out_upright(tmp_path, name):
    (a, b, c, d), expected = TURNS[name]
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:16, :24], picture[:16, 56:] = 250, 120         # one corner bright, its neighbour on the long side grey
    path = write(tmp_path / "r.mp4", frames=20, height=48, width=80, pictures=lambda i: picture)
    turn(path, (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    clip = data.read_clip(path, 2, rng=rng())
    assert clip.shape[1:3] == expected(picture).shape[:2]
    assert np.abs(clip[0].astype(int) - expected(picture)).mean() < 4
    H, W = clip.shape[1] // 2, clip.shape[2] // 2
    small = data.read_clip(path, 1, size=(H, W))[0].astype(int)
    assert small.shape == (H, W, 3) and np.abs(small - expected(picture)[::2, ::2]).mean() < 6


def test_a_clip_of_a_film_of_four_hours_takes_less_than_half_a_second(tmp_path):
    path = write_long(tmp_path / "long.mp4")
    data.read_clip(path, 16, rng=rng())
    start = time.process_time()         # not perf_counter(): other tests may keep the cores busy
    found = [numbers(data.read_clip(path, 16, rng=rng(seed))) for seed in range(10)]
    assert (time.process_time() - start) / 10 < 0.5
    assert all(map(consecutive, found)) and len({f[0] for f in found}) > 4


def hostile(folder):
    """Files no clip can be had from: name -> expected reason."""
    good = write(folder / "good.mp4", frames=60)
    content = open(good, "rb").read()
    os.remove(good)
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("<html>404</html>" * 50)
    (folder / "noise.avi").write_bytes(rng().bytes(5000))
    (folder / "no_moov.mp4").write_bytes(content[:len(content) // 2])       # the index is at the end
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "directory.mp4").mkdir()
    write(folder / "one.mp4", frames=1)
    write(folder / "one.webm", frames=1)
    write(folder / "short.gif", frames=7, pix_fmt="rgb8")
    with av.open(str(folder / "sound.mp4"), "w") as f:
        write_sound(f, f.add_stream("aac", rate=8000), 2)
    with av.open(str(folder / "cover.mp4"), "w", format="mp4") as f:        # a song with its cover picture
        sound, cover = f.add_stream("aac", rate=8000), f.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = 0x400
        f.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        f.mux(cover.encode())
        write_sound(f, sound, 2)
    reasons = {"zero.mp4": "Invalid data", "one.mp4": "has 1 frame, 8", "one.webm": "has 1 frame, 8",
               "short.gif": "has 7 frames, 8", "sound.mp4": "no video stream", "cover.mp4": "no video stream",
               "gone.mp4": "No such file", "text.mp4": "Invalid data", "noise.avi": "", "no_moov.mp4": "Invalid data"}
    if os.geteuid() != 0:
        (folder / "locked.mp4").write_bytes(content)
        (folder / "locked.mp4").chmod(0)
        reasons["locked.mp4"] = "Permission denied"
    return reasons


def test_hostile_files_say_what_is_wrong_with_them(tmp_path):
    reasons = hostile(tmp_path)
    assert set(reasons) == set(data.find_videos(tmp_path))      # and no directory
    for name, reason in reasons.items():
        for how in ({"size": 32, "rng": rng()}, {}):
            with pytest.raises(data.BadVideo) as e:
                data.read_clip(tmp_path / name, 8, **how)
            assert reason in str(e.value) and "\n" not in str(e.value) and name not in str(e.value)


def test_what_is_left_of_a_cut_off_file_is_used(tmp_path):
    for name in ("a.mkv", "a.avi", "a.ts"):
        path = write(tmp_path / name, frames=300, pictures=lambda i: np.clip(
            rng(i).integers(-8, 8, (48, 64, 1)) + brightness(i), 0, 255).astype(np.uint8).repeat(3, 2))
        content = open(path, "rb").read()
        open(path, "wb").write(content[:len(content) // 2])
        first = []
        for seed in range(20):
            clip = data.read_clip(path, 8, rng=rng(seed))
            assert consecutive(numbers(clip))
            first.append(numbers(clip)[0])
        assert len(set(first)) > 8


def test_damage_in_the_middle_costs_only_that_part(tmp_path):
    path = write(tmp_path / "a.mp4", frames=200, gop=10, bframes=0, options={"preset": "ultrafast"},
                 pictures=lambda i: np.clip(rng(i).integers(-8, 8, (48, 64, 1)) + brightness(i), 0, 255
                                            ).astype(np.uint8).repeat(3, 2))
    content = bytearray(open(path, "rb").read())
    middle = len(content) // 2
    content[middle:middle + len(content) // 10] = bytes(len(content) // 10)
    open(path, "wb").write(content)
    found = []
    for seed in range(30):
        with contextlib.suppress(data.BadVideo):
            found.append(numbers(data.read_clip(path, 8, rng=rng(seed))))
    assert len(found) >= 27


def test_a_size_of_none_keeps_the_files_size_and_a_part_of_a_file_will_do(tmp_path):
    path = write(tmp_path / "a.mkv", codec="ffv1", pix_fmt="yuv444p", height=47, width=63)
    assert data.read_clip(path, 2).shape == (2, 47, 63, 3)
    part = io.BytesIO(open(path, "rb").read())
    assert np.array_equal(data.read_clip(part, 5, 32, rng=rng(3)), data.read_clip(path, 5, 32, rng=rng(3)))



# ---------------------------------------------------------------------------------------------------------------------
# VideoFolder


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    """A folder laid out as UCF-101 is."""
    root = tmp_path_factory.mktemp("data") / "UCF-101"
    for c, name in enumerate(["YoYo", "ApplyEyeMakeup", "HandstandPushups"]):
        (root / name).mkdir(parents=True)
        for g in range(1, 5):
            write(root / name / f"v_{name}_g{g:02}_c01.avi", frames=40)
    lists = root.parent / "ucfTrainTestlist"
    lists.mkdir()
    order = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    for name, groups, number in (("trainlist01.txt", (2, 3, 4), True), ("testlist01.txt", (1,), False)):
        (lists / name).write_text("".join(f"{c}/v_{c}_g{g:02}_c01.avi{f' {i}' if number else ''}\r\n"
                                          for i, c in enumerate(order, 1) for g in groups))
    return root


def test_a_folder_of_class_folders_gives_videos_labels_and_captions(ucf):
    videos = data.VideoFolder(ucf, frames=8, size=(24, 32))
    assert videos.classes == ["ApplyEyeMakeup", "HandstandPushups", "YoYo"] and len(videos) == 12
    item = videos[11]
    assert item["label"] == 2 and item["caption"] == "yo yo" and videos[0]["caption"] == "apply eye makeup"
    assert item["video"].shape == (3, 8, 24, 32) and item["video"].dtype == torch.float32
    clip = ((item["video"] + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert consecutive(numbers(clip)) and -1 <= item["video"].min() and item["video"].max() <= 1
    with pytest.raises(IndexError):
        videos[12]


@pytest.mark.parametrize("split, number", [("trainlist01.txt", 9), ("testlist01.txt", 3)])
def test_a_split_uses_the_files_it_lists(ucf, capsys, split, number):
    path = ucf.parent / "ucfTrainTestlist" / split
    videos = data.VideoFolder(ucf, 8, 32, split=path)
    assert len(videos) == number and videos.classes == ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    assert sorted(set(videos.labels)) == [0, 1, 2]
    assert {file[:-4].split("_g")[1][:2] for file in videos.files} == ({"01"} if number == 3 else {"02", "03", "04"})
    assert f"{number} of its {number} videos are in" in capsys.readouterr().err


def test_the_files_of_a_split_may_have_become_mp4(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.mp4", frames=10)
    write(tmp_path / "b" / "y.mp4", frames=10)
    (tmp_path / "list.txt").write_text("b/x.avi 1\na/x.avi 2\n")
    videos = data.VideoFolder(tmp_path, 8, 16, split=tmp_path / "list.txt")
    assert videos.classes == ["a", "b"] and videos.files == ["a/x.mp4", "b/x.mp4"] and videos.labels == [0, 1]


def test_a_split_that_is_not_there_or_lists_other_files_is_one_clear_line(ucf, tmp_path):
    with pytest.raises(FileNotFoundError, match="trainlist09.txt"):      # data.launch makes one line of it
        data.VideoFolder(ucf, 8, 32, split="trainlist09.txt")
    (tmp_path / "other.txt").write_text("Biking/v_Biking_g01_c01.avi 11\n")
    with pytest.raises(data.InputError, match="no videos in it that .*other.txt lists"):
        data.VideoFolder(ucf, 8, 32, split=tmp_path / "other.txt")


def test_clips_repeat_with_seed_index_and_number_and_differ_otherwise(ucf):
    videos, again = data.VideoFolder(ucf, 4, 16), data.VideoFolder(ucf, 4, 16)
    assert torch.equal(videos[3, 7]["video"], again[3, 7]["video"])
    assert torch.equal(videos[3]["video"], again[3, 0]["video"])
    assert len({float(videos[3, number]["video"].mean()) for number in range(20)}) > 8
    other = data.VideoFolder(ucf, 4, 16, seed=1)
    assert any(not torch.equal(videos[3, n]["video"], other[3, n]["video"]) for n in range(3))


def test_flat_and_nested_folders(tmp_path):
    write(tmp_path / "a.mp4", frames=10)
    flat = data.VideoFolder(tmp_path, 8, 16)
    assert flat.classes == [] and flat[0]["label"] == 0 and flat[0]["caption"] == ""
    (tmp_path / "big_dogs" / "day 1").mkdir(parents=True)
    write(tmp_path / "big_dogs" / "day 1" / "b.MP4", frames=10)
    (tmp_path / "big_dogs" / "loop").symlink_to(tmp_path)
    nested = data.VideoFolder(tmp_path, 8, 16)
    assert nested.files == ["big_dogs/day 1/b.MP4"] and nested[0]["caption"] == "big dogs"


def test_hostile_files_are_replaced_and_each_is_named_once(tmp_path, capfd):
    reasons = hostile(tmp_path)
    for i in range(len(reasons)):
        write(tmp_path / f"good{i}.mp4", frames=10)
    videos = data.VideoFolder(tmp_path, 8, 16)
    assert all(item["video"].shape == (3, 8, 16, 16) for item in map(videos.__getitem__, range(len(videos))))
    named = capfd.readouterr().err
    assert all(named.count(f"left out: {tmp_path}/{name}: ") == 1 for name in reasons)
    assert named.count("\n") == len(reasons) and all(reason in named for reason in reasons.values())
    videos.replace = False
    for name, item in zip(videos.files, torch.utils.data.DataLoader(videos, batch_size=None, num_workers=2)):
        assert (item is None) == (name in reasons)
    assert capfd.readouterr().err == ""


def test_the_loader_carries_bytes_that_become_the_floats_of_the_items_bit_for_bit(tmp_path):
    for i in range(3):
        write(tmp_path / f"good{i}.mp4", frames=10)
    videos = data.VideoFolder(tmp_path, 8, (16, 24))
    keys = [[(0, 0), (2, 1)], [(1, 0)]]
    for workers in (0, 1):
        batches = list(data.load(videos, keys, workers))
        for batch, wanted in zip(batches, keys, strict=True):
            assert batch["video"].dtype == torch.uint8
            items = [videos[key]["video"] for key in wanted]
            assert items[0].dtype == torch.float32 and items[0].shape == (3, 8, 16, 24)
            assert torch.equal(data.to_floats(batch["video"]), torch.stack(items))
    shapes = data.MovingShapes(4, 16)  # are drawn in floats
    batch = next(data.load(shapes, [[(5, 0)]], 0))["video"]
    assert torch.equal(data.to_floats(batch)[0], shapes[5]["video"])


def test_no_usable_file_is_an_error_that_says_what_was_looked_for(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(data.InputError, match=f"{folder}: no such folder, or no videos in it.*\\.avi .*\\.gif"):
            data.VideoFolder(folder, 8, 16)
    write(tmp_path / "short.mp4", frames=5)
    with pytest.raises(data.InputError, match="20 videos in a row .*short.mp4: too short: has 5 frames, 8 needed"):
        data.VideoFolder(tmp_path, 8, 16)[0]
    assert pickle.loads(pickle.dumps(data.InputError("x"))).args == ("x",)
    batches = iter(torch.utils.data.DataLoader(data.VideoFolder(tmp_path, 8, 16), num_workers=1))
    with pytest.raises(data.InputError, match="20 videos in a row .*short.mp4: too short"):
        list(batches)
    batches._shutdown_workers()         # now: pytest keeps the exception, and with it the workers, for some time


def test_a_file_that_vanishes_is_replaced_by_the_same_other_everywhere_and_named_once(tmp_path, capfd):
    for i in range(6):
        write(tmp_path / f"{i}.mp4", frames=10)
    videos, again = data.VideoFolder(tmp_path, 8, 16), data.VideoFolder(tmp_path, 8, 16)
    os.remove(tmp_path / "2.mp4")
    (tmp_path / "4.mp4").write_bytes(b"junk")
    item = videos[2, 5]
    for other in (videos[2, 5], again[2, 5]):
        assert torch.equal(item["video"], other["video"])
    for _ in range(2):
        loader = torch.utils.data.DataLoader(again, batch_size=3, num_workers=2)
        assert sum(len(batch["video"]) for batch in loader) == 6
    named = capfd.readouterr().err
    assert named.count("2.mp4: No such file") == 2 and named.count("4.mp4: Invalid data") == 1       # two data sets


def leaks(folder, clips):
    """-> (open files more, MiB more) after that many clips, of good and of bad files."""
    hostile(folder)
    for name, kind in (("a.mp4", {}), ("b.avi", {}), ("c.webm", KINDS["vp8.webm"]), ("d.gif", {"pix_fmt": "rgb8"})):
        write(folder / name, frames=30, **kind)
    names = data.find_videos(folder)

    def run(number):
        for i in range(number):
            with contextlib.suppress(data.BadVideo):
                data.read_clip(folder / names[i % len(names)], 8, 32, rng=rng(i))
        gc.collect()
        with open("/proc/self/statm") as f:
            return len(os.listdir("/proc/self/fd")), int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2 ** 20

    before, after = run(300 + clips // 2), run(clips)         # the heap grows at first, then no more
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("clips", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_clips_leak_neither_file_handles_nor_memory(tmp_path, clips):
    handles, mebibytes = leaks(tmp_path, clips)
    print(f"{clips} clips: {handles} open files more, {mebibytes:.1f} MiB more")
    assert handles == 0 and mebibytes < 8


# ---------------------------------------------------------------------------------------------------------------------
# CaptionedVideos


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Four short videos, webvid.csv, plain.csv and a folder of .tar shards that all name them."""
    root = tmp_path_factory.mktemp("webvid")
    captions = ["a dog", 'he said "go", and\nwent', "ein Bär, schön", ""]
    for i in range(4):
        (root / "videos" / f"00{i % 2}").mkdir(parents=True, exist_ok=True)
        write(root / "videos" / f"00{i % 2}" / f"{i}.mp4", frames=20)
    with open(root / "webvid.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        out.writerows([i, "https://x/?a=1,2", "PT00H00M10S", f"00{i % 2}", captions[i]] for i in range(4))
    with open(root / "plain.csv", "w", newline="", encoding="utf-8-sig") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["caption", "path"])
        out.writerows([captions[i], f"videos/00{i % 2}/{i}.mp4"] for i in range(4))
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / "shards" / f"0000{shard}.tar", "w") as f:
            for i in (2 * shard, 2 * shard + 1):
                def add(ending, content):
                    member = tarfile.TarInfo(f"{'long' * 40 if i == 3 else ''}{i:09}.{ending}")
                    member.size = len(content)
                    f.addfile(member, io.BytesIO(content))
                add("json", json.dumps({"caption": captions[i], "key": i}).encode())
                add("txt", captions[i].encode())
                add("mp4", (root / "videos" / f"00{i % 2}" / f"{i}.mp4").read_bytes())
            i = 99
            add("mp4", b"")         # cut off: not a sample
    (root / "shards" / "00000_stats.json").write_text("{}")
    return root, captions


@pytest.mark.parametrize("source, folder", [("webvid.csv", "videos"), ("plain.csv", ""), ("shards", None)])
def test_captioned_videos_of_every_layout(captioned, source, folder):
    root, captions = captioned
    videos = data.CaptionedVideos(root / source, folder if folder is None else root / folder, frames=8, size=16)
    assert len(videos) == 4 and videos.classes == []
    assert [videos[i]["caption"] for i in range(4)] == captions
    assert videos[0]["label"] == 0 and videos[0]["video"].shape == (3, 8, 16, 16)
    assert torch.equal(videos[3, 2]["video"], data.VideoFolder(root / "videos", 8, 16)[3, 2]["video"])
    batches = list(torch.utils.data.DataLoader(videos, batch_size=2, num_workers=2))
    assert [c for batch in batches for c in batch["caption"]] == captions
    videos = pickle.loads(pickle.dumps(videos))
    assert videos[1]["caption"] == captions[1]


def test_rows_of_a_csv_are_found_whatever_its_quotes_and_line_ends(tmp_path):
    rows = [["path", "caption"], ["a", 'x "y"\n"z", w'], ["b", ""], ["", '"'], ["c\nd", ",\n,\n\n"],
            ["é", '""\n""'], ["e", "f"]]
    for end in ("\n", "\r\n"):
        for tail in ("", end):
            with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as f:
                csv.writer(f, lineterminator=end).writerows(rows)
            text = (tmp_path / "a.csv").read_bytes()
            (tmp_path / "a.csv").write_bytes(text.removesuffix(end.encode()) + tail.encode())
            videos = data.CaptionedVideos(tmp_path / "a.csv", "", 8, 16)
            parsed = [[videos.locate(i)[0], videos.locate(i)[2]] for i in range(len(videos))]
            assert parsed == rows[1:], end


def test_a_stray_quote_does_not_swallow_the_rows_after_it(tmp_path):
    (tmp_path / "a.csv").write_text('path,caption\na.mp4,a 5" nail\nb.mp4,two\nc.mp4,"quoted, 5"" nail"\n\n'
                                    'd.mp4,four\n')
    videos = data.CaptionedVideos(tmp_path / "a.csv", tmp_path, 8, 16)
    assert [videos.locate(i)[2] for i in range(len(videos))] == ['a 5" nail', "two", 'quoted, 5" nail', "four"]


def test_a_stray_line_end_is_dropped_and_a_quote_that_is_never_closed_is_one_clear_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'path,caption\r\na.mp4,a\r dog\r\n\r\nb.mp4,"two\r\nlines"\r\n')
    videos = data.CaptionedVideos(tmp_path / "a.csv", tmp_path, 8, 16)
    assert [videos.locate(i)[2] for i in range(len(videos))] == ["a dog", "two\nlines"]
    (tmp_path / "a.csv").write_text('path,caption\na.mp4,"a dog\n' + "b.mp4,a cat\n" * 20_000)
    with pytest.raises(data.InputError, match="a.csv, line .*: field larger .*; is a quote not closed"):
        data.CaptionedVideos(tmp_path / "a.csv", tmp_path, 8, 16)


def test_missing_videos_are_replaced_and_bad_rows_left_out_and_both_named(captioned, tmp_path, capsys):
    root, captions = captioned
    lines = (root / "plain.csv").read_text(encoding="utf-8-sig") + "lost,videos/none.mp4\nonly one column\n"
    (tmp_path / "a.csv").write_text(lines, encoding="utf-8")
    videos = data.CaptionedVideos(tmp_path / "a.csv", root, 8, 16)
    items = [videos[i] for i in range(5)]
    assert len(videos) == 5 and all(item["caption"] in captions for item in items)
    named = capsys.readouterr().err
    assert named.count("none.mp4: No such file") == 1
    assert "a.csv: 5 rows used, 1 left out" in named and "lines: 8\n" in named
    lost = data.CaptionedVideos(tmp_path / "a.csv", tmp_path, 8, 16)
    with pytest.raises(data.InputError, match="20 videos in a row .*No such file"):
        lost[0]


def test_a_csv_without_the_columns_is_one_clear_line(tmp_path):
    (tmp_path / "a.csv").write_text("file,text\na,b\n")
    with pytest.raises(data.InputError, match="columns are 'file, text'; needed are videoid, page_dir and name .* or"):
        data.CaptionedVideos(tmp_path / "a.csv", tmp_path, 8, 16)
    for content in ("", "path,caption\n"):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(data.InputError):
            data.CaptionedVideos(tmp_path / "a.csv", tmp_path, 8, 16)
    with pytest.raises(FileNotFoundError, match="b.csv"):
        data.CaptionedVideos(tmp_path / "b.csv", tmp_path, 8, 16)
    (tmp_path / "00000.tar").write_bytes(b"<html>not a tar</html>" * 100)
    with pytest.raises(data.InputError, match="no videos in it"):
        data.CaptionedVideos(tmp_path, tmp_path, 8, 16)


def test_a_million_rows_cost_eight_bytes_each_and_seconds(tmp_path):
    with open(tmp_path / "a.csv", "w") as f:
        f.write("videoid,page_dir,name\n")
        f.writelines(f'{i},00{i % 10},"clip, number {i}"\n' for i in range(1_000_000))
    start = time.perf_counter()
    videos = data.CaptionedVideos(tmp_path / "a.csv", tmp_path, 8, 16)
    assert time.perf_counter() - start < 10
    assert len(videos) == 1_000_000 and videos.locate(777_777)[2] == "clip, number 777777"
    assert len(pickle.dumps(videos.rows)) < 8.1e6


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def moving_square(L=16, H=32, W=48):
    video = torch.zeros(3, L, H, W)
    video[0], video[2] = torch.linspace(-0.8, 0.6, W), torch.linspace(0.5, -0.5, H)[:, None]
    for i in range(L):
        video[:, i, 8:20, 2 * i:2 * i + 10] = torch.tensor([0.9, -0.7, 0.1])[:, None, None]
    return video


@pytest.mark.parametrize("name, size", [("a.mp4", (32, 48)), ("a.mp4", (33, 47)), ("a.gif", (33, 47)),
                                        ("a.mp4", (1, 1)), ("a.mkv", (33, 47)), ("a.mkv", (1, 1))])
def test_what_is_written_reads_back(tmp_path, name, size):
    video = moving_square(16, *size) if size != (1, 1) else torch.zeros(3, 16, 1, 1)
    expected = data.to_uint8(video)
    data.write_video(tmp_path / name, video, fps=8)
    clip = data.read_clip(tmp_path / name, 16)
    H, W = size
    if name.endswith(".mp4"):
        H, W = H + H % 2, W + W % 2
    assert clip.shape == (16, H, W, 3)
    error = clip[:, :size[0], :size[1]].astype(float) - expected
    assert name != "a.mkv" or not error.any()  # every bit
    assert (error ** 2).mean() ** 0.5 < 10 and np.abs(error).mean() < 3      # H.264 keeps colours at a lower resolution
    with pytest.raises(data.BadVideo):
        data.read_clip(tmp_path / name, 17)
    assert os.listdir(tmp_path) == [name]
    with av.open(str(tmp_path / name)) as f:
        times = [float(frame.pts * frame.time_base) for frame in f.decode(video=0)]
    assert times == pytest.approx([i / 8 for i in range(16)], abs=0.006)


def test_what_stands_still_in_a_gif_does_not_flicker_and_repeated_frames_keep_their_time(tmp_path):
    data.write_video(tmp_path / "a.gif", moving_square(), 8)
    still = data.read_clip(tmp_path / "a.gif", 16)[:, 20:]      # below the square
    assert (still == still[:1]).all()
    video = moving_square()[:, [0, 1, 1, 1, 1, 2, 3]]
    data.write_video(tmp_path / "a.gif", video, 8)
    with Image.open(tmp_path / "a.gif") as picture:
        times = [picture.seek(i) or picture.info["duration"] for i in range(picture.n_frames)]
        assert sum(times) == 880 and picture.info["loop"] == 0          # 7 / 8 s in hundredths


def test_the_same_video_gives_the_same_bytes(tmp_path):
    """Without its option mbtree=0, x264 read uninitialised memory: of a hundred files of this clip, thirty differed."""
    video = data.MovingShapes(16, 64, split="test")[1]["video"]
    for i in range(20):
        data.write_video(tmp_path / f"{i}.mp4", video, 8)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    data.write_video(tmp_path / "a.mp4", moving_square(), 8)
    before = (tmp_path / "a.mp4").read_bytes()
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", None)
    monkeypatch.setattr(Image, "fromarray", None)
    for name in ("a.mp4", "b.gif"):
        with pytest.raises(TypeError):
            data.write_video(tmp_path / name, moving_square(), 8)
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before
    with pytest.raises(data.InputError, match="as .mp4, .mkv or .gif"):
        data.write_video(tmp_path / "a.webm", moving_square(), 8)


def test_bytes_and_floats_mean_the_same_colours():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert np.array_equal(data.to_uint8(torch.from_numpy(levels).permute(3, 0, 1, 2) / 127.5 - 1), levels)
    assert data.to_uint8(levels) is not None
    assert data.to_uint8(torch.full((1, 2, 3, 4), 7.0)).tolist() == np.full((2, 3, 4, 3), 255).tolist()


def test_tiles_and_sheets_show_every_video(tmp_path):
    videos = [torch.full((3, 4, 8, 10), v) for v in (-0.5, 0.0, 0.5)]
    tiled = data.tile(videos, columns=2)
    assert tiled.shape == (4, 18, 22, 3)
    assert [tiled[0, y, x, 0] for y, x in ((0, 0), (0, 12), (10, 0), (10, 12))] == [64, 128, 191, 0]
    data.write_sheet(tmp_path / "s.png", videos, columns=2, captions=["one", "two", "a very long caption " * 50])
    with Image.open(tmp_path / "s.png") as sheet:
        picture = np.array(sheet)
    assert all((picture == data.to_uint8(video)[0, 0, 0]).all(-1).sum() >= 4 * 96 * 120 for video in videos)
    assert os.listdir(tmp_path) == ["s.png"]
