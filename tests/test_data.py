"""Proves that a clip is the very frames that it should be, in files of many kinds and from every start, upright and not
squashed; that lists, folders and captions become the right items, and no test video is trained on; that batches go on
where they stopped; and that what is written reads back. The videos are made here: each picture shows its number."""

import contextlib
import io
import itertools
import os
import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data

FRAMES = 30


def picture(i, height=48, width=64):
    """uint8 (H, W, 3): the bits of number i are dark and light blocks, under noise that makes every picture unique."""
    bits = np.array([[i >> (4 * row + column) & 1 for column in range(4)] for row in range(2)])
    noise = np.random.default_rng(i).integers(31, 50, (height, width))
    return np.uint8(170 * bits.repeat(height // 2, 0).repeat(width // 4, 1) + noise)[..., None].repeat(3, 2)


def numbers(clip):
    """What picture() was given, from frames (L, H, W, 3) of any size."""
    L, H, W, _ = clip.shape
    lit = np.asarray(clip)[..., 1].reshape(L, 2, H // 2, 4, W // 4).mean((2, 4)) > 125
    return (lit.reshape(L, 8) * 2 ** np.arange(8)).sum(1).tolist()


def write(path, codec="libx264", pix_fmt="yuv420p", bframes=0, gop=10, frames=FRAMES, shape=picture, times=None,
          oblong=1, options={}, container={}):
    """A video at 25 frames a second. shape: i -> picture; times: in ms; oblong: how wide its pixels are."""
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=25)
        (stream.height, stream.width, _), stream.pix_fmt, stream.options = shape(0).shape, pix_fmt, options
        of = stream.codec_context
        of.gop_size, of.max_b_frames, of.sample_aspect_ratio = gop, bframes, Fraction(oblong)
        of.time_base, of.bit_rate = Fraction(1, 1000 if times else 25), 0 if codec == "libx264" else 2_000_000
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(shape(i), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, of.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def rewrite(source, path, change, repeat=1, **container):
    """A video's packets again, with other (bytes, pts, dts), which change(i, packet, ticks of a frame) gives."""
    with av.open(source) as old, av.open(str(path), "w", options=container) as new:
        video = old.streams.video[0]
        stream, ticks = new.add_stream_from_template(video), round(1 / 25 / video.time_base)
        for i, packet in enumerate([packet for packet in old.demux(video) if packet.size] * repeat):
            content, pts, dts = change(i, packet, ticks)
            copy = av.Packet(content)
            copy.stream, copy.time_base, copy.is_keyframe = stream, video.time_base, packet.is_keyframe
            copy.pts, copy.dts, copy.duration = pts, dts, ticks
            new.mux(copy)
    return str(path)


def packed(path):
    """As DivX and XviD store B-frames: beside the frame that they need, and an empty frame in their own place."""
    with av.open(write(f"{path}.avi", "mpeg4", bframes=1)) as file:
        frames = [bytes(packet) for packet in file.demux(video=0) if packet.size] + [b""]
    is_b = [frame.partition(b"\0\0\1\xb6")[2][:1] >= b"\x80" for frame in frames]
    kept = [b"\0\0\1\xb6\x51\x7f\xff" if is_b[i] else frames[i] + frames[i + 1] * is_b[i + 1] for i in range(FRAMES)]
    return rewrite(f"{path}.avi", path, lambda i, *_: (b"\0\0\1\xb2DivX503b1393p" * (i == 0) + kept[i], i, i))


def cut(path, **how):
    """Of its 30 frames, an edit list hides the first 7."""
    return rewrite(write(f"{path}.mov", bframes=2, **how), path, lambda _, packet, ticks: (
        bytes(packet), packet.pts - 7 * ticks, packet.dts - 7 * ticks), avoid_negative_ts="disabled")


def no_rate(path):
    """A live WebM whose header does not say how many frames a second it has, as browsers record them."""
    head, tail = open(write(path, "libvpx", times=UNEVEN, options=QUICK, container=dict(live="1")), "rb").read().split(
        b"\x23\xe3\x83\x84")
    open(path, "wb").write(head + b"\xec\x86" + bytes(6) + tail[4:])
    return str(path)


def no_times(path):
    """All frames are shown at the same time."""
    content = bytearray(open(write(path), "rb").read())
    struct.pack_into(">I", content, content.index(b"stts") + 16, 0)
    open(path, "wb").write(content)


UNEVEN = [40 * i if i < 12 else 400 * i - 4320 for i in range(FRAMES)]
B, MPEG4, QUICK = dict(bframes=3), dict(codec="mpeg4", bframes=2), {"deadline": "realtime", "cpu-used": "8"}
OPEN = dict(options={"x264-params": "open-gop=1:keyint=9:min-keyint=9:scenecut=0:bframes=3:b-adapt=0"})
VPX = dict(codec="libvpx-vp9", options=QUICK)
KINDS = {  # name: arguments of write(), or a function
    "mpeg4.avi": MPEG4, "h264.avi": B, "divx.avi": packed, "h264.mpg": B, "mpeg2.mpg": dict(MPEG4, codec="mpeg2video"),
    "plain.mp4": {}, "b.mp4": B, "one_key_frame.mp4": dict(B, gop=1000), "open.mp4": OPEN, "open.mkv": OPEN,
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "log-level=none:keyint=10:open-gop=1:bframes=4"}),
    "cut.mp4": cut, "cut_mpeg4.mp4": lambda path: cut(path, codec="mpeg4"), "h264.mkv": B, "mpeg4.mov": MPEG4,
    "late.mp4": dict(B, times=range(70_000, 80_000, 40)), "early.mkv": dict(B, times=range(-500, 5000, 40)),
    "uneven.mp4": dict(B, times=UNEVEN), "uneven.mkv": dict(B, times=UNEVEN), "live.webm": no_rate, "vp9.webm": VPX,
    "pieces.mp4": dict(B, container={"movflags": "frag_keyframe+empty_moov"}), "wmv.wmv": dict(codec="wmv2"),
    "then_pieces.mp4": dict(B, container={"movflags": "frag_keyframe"}), "h264.ts": B, "h264.flv": B,
    "vp8.ogv": dict(VPX, codec="libvpx"), "palette.gif": dict(codec="gif", pix_fmt="rgb8"), "no_times.mp4": no_times}


def place(number):  # in a Generator's place: always gives this number
    return SimpleNamespace(random=lambda: number)


@pytest.mark.parametrize("name", KINDS)
def test_every_start_is_possible_and_gives_consecutive_frames(tmp_path, name):
    how, path, n = KINDS[name], str(tmp_path / f"Ü 12:30 {name}"), FRAMES - 7 * name.startswith("cut")
    how(path) if callable(how) else write(path, **how)
    whole = data.read_clip(path, n)
    assert numbers(whole) == list(range(FRAMES))[-n:]
    for k in range(n - 3):
        clip = data.read_clip(path, 4, rng=place((k + 0.5) / (n - 3)))
        assert np.array_equal(clip, whole[k : k + 4]), f"{numbers(clip)} for start {k}"
    assert np.array_equal(data.read_clip(path, 4, stride=5, rng=place(0.999)), whole[-16::5])
    with pytest.raises(data.BadVideo, match=f"too short: has {n} frames, {n + 1} needed"):
        data.read_clip(path, n + 1, rng=place(0.5))


@pytest.mark.parametrize("name", ["a.mkv", "a.ts"])
def test_where_bytes_are_damaged_smeared_frames_hardly_ever_come_out(tmp_path, name):
    content, smeared = open(write(tmp_path / name, bframes=2), "rb").read(), 0
    whole = data.read_clip(tmp_path / name, FRAMES).astype(int)
    for seed in range(30):
        rng, broken = np.random.default_rng(seed), np.frombuffer(content, np.uint8).copy()
        broken[rng.integers(len(content) // 4, len(content), 25)] ^= 255
        (tmp_path / name).write_bytes(broken)
        with contextlib.suppress(data.BadVideo):
            clip = data.read_clip(tmp_path / name, 3, rng=place(0.6))
            smeared += min(np.abs(clip - whole[k : k + 3]).max() for k in range(FRAMES - 2)) > 60
    assert smeared <= 1  # a decoder does not notice all; left alone, five or six of these


def test_starts_are_spread_evenly_and_repeat_with_the_seed(tmp_path):
    path, generators = write(tmp_path / "a.mp4", frames=24), map(np.random.default_rng, [*range(400), *range(9)])
    first = [numbers(data.read_clip(path, 5, rng=generator))[0] for generator in generators]
    counts = np.bincount(first[:400], minlength=20)
    assert len(counts) == 20 and counts.min() >= 6 and counts.max() <= 40 and first[400:] == first[:9]  # 20 expected


def test_a_long_mp4_is_not_read_through(tmp_path, monkeypatch):
    path, read, plain = tmp_path / "a.mp4", [], av.open
    rewrite(write(tmp_path / "piece.mp4", frames=50, gop=50, bframes=2), path, lambda i, packet, ticks: (
        bytes(packet), packet.pts + i // 50 * 50 * ticks, packet.dts + i // 50 * 50 * ticks), repeat=200)

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(super().read(size))
            return read[-1]

    monkeypatch.setattr(data.av, "open", lambda path, **how: plain(Counted(path), **how))
    for k in (0, 1234, 5678, 9995):  # of ten thousand frames
        read.clear()
        assert numbers(data.read_clip(path, 5, rng=place((k + 0.5) / 9996)))[0] == k % 50
        assert 0 < sum(map(len, read)) < path.stat().st_size / 3  # a tenth is its index, which is read twice


@pytest.mark.parametrize("height, width", [(120, 120), (120, 60), (60, 120)])
def test_a_circle_stays_a_circle_and_comes_from_the_centre(tmp_path, height, width):
    y, x = np.ogrid[0.5:height, 0.5:width]
    disc = np.uint8(255 * ((y / height - 0.5) ** 2 + (x / width - 0.5) ** 2 < 1 / 9))[..., None].repeat(3, 2)
    path = write(tmp_path / "a.mp4", frames=1, shape=lambda i: disc, oblong=Fraction(height, width))
    assert data.read_clip(path, 1).shape == (1, height, height, 3)
    Image.fromarray(disc).resize((150, 150)).save(tmp_path / "a.png")
    for H, W in ((60, 60), (48, 64), (64, 48), (33, 71), (240, 240)):
        for image in (data.read_clip(path, 1, (H, W))[0], data.read_picture(tmp_path / "a.png", (H, W))):
            inside, wide = image[..., 0] > 127, max(H, W) * 2 / 3
            assert inside.shape == (H, W) and np.abs(np.argwhere(inside).mean(0) - [H / 2 - 0.5, W / 2 - 0.5]).max() < 1
            assert abs(inside[H // 2].sum() - min(wide, W)) <= 2 and abs(inside[:, W // 2].sum() - min(wide, H)) <= 2


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv444p", "bgra"])
def test_colours_come_out_as_they_went_in_and_nothing_aliases(tmp_path, pix_fmt):
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).repeat(32, 0).repeat(32, 1).astype(np.uint8)
    path = write(tmp_path / "a.mkv", "ffv1", pix_fmt, frames=1, shape=lambda i: blocks)
    for size, step in ((None, 32), (64, 16)):
        clip = data.read_clip(path, 1, size)[0].astype(int)
        assert np.abs(clip[step // 2 :: step, step // 2 :: step] - blocks[16::32, 16::32]).max() <= 2
    stripes = np.tile(np.uint8([[[0] * 3, [255] * 3]]), (256, 128, 1))
    assert data.read_clip(write(tmp_path / "b.mkv", "ffv1", pix_fmt, 0, 10, 1, lambda _: stripes), 1, 60).std() < 9


@pytest.mark.parametrize("matrix, turns", [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), (
    (0, 0, 0, 0), 0), ((-1, 0, 0, 1), 0), ((1, 0, 0, -1), 0)])
def test_a_rotated_file_comes_out_upright_and_mirrored_ones_and_those_with_zeros_as_stored(tmp_path, matrix, turns):
    image, (a, b, c, d) = np.zeros((48, 80, 3), np.uint8), np.array(matrix) << 16
    image[:16, :24], image[:16, 56:] = 250, 120  # one corner bright, its neighbour on the long side grey
    content = bytearray(open(write(tmp_path / "a.mp4", shape=lambda i: image), "rb").read())
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    upright = np.rot90(image, turns).astype(int)
    for size, wanted in ((None, upright), (tuple(n // 2 for n in upright.shape[:2]), upright[::2, ::2])):
        clip = data.read_clip(tmp_path / "a.mp4", 2, size, rng=place(0.5))
        assert clip.shape[1:] == wanted.shape and np.abs(clip - wanted).mean() < 6


def test_pictures_are_read_as_they_look(tmp_path):
    ramp, turned = np.arange(0, 65536, 23).astype(np.uint16).reshape(50, 57), Image.Exif()
    corner = np.eye(9, 5, 4) * 255
    turned[274] = 6  # to be turned clockwise
    for image, expected, how in (
            (Image.fromarray(ramp), (ramp / 257).round(), {}), (Image.new("RGBA", (5, 9), (0, 0, 0, 0)), 255, {}),
            (Image.new("LA", (5, 9), (0, 128)), 127, {}), (Image.new("P", (5, 9), 0), 255, dict(transparency=0)),
            (Image.fromarray(np.uint8(corner)), np.rot90(corner, -1), dict(exif=turned))):
        image.save(tmp_path / "a.png", **how)
        seen = data.read_picture(tmp_path / "a.png")
        assert seen.dtype == np.uint8 and (np.moveaxis(seen, 2, 0) == expected).all(), image.mode


def test_frame_rates_are_the_headers_or_of_the_times(tmp_path):
    def rate(*paths, stride=1):
        return data.Videos("", [(str(path), 0, "") for path in paths], [], 4, 16, stride, 0).frame_rate()

    plain, ogv = write(tmp_path / "a.mp4"), write(tmp_path / "a.ogv", "libvpx", options=QUICK)
    assert [rate(plain), rate(plain, stride=2), rate("junk", plain, "junk"), rate("junk"), rate(ogv)] == [
        25, 12.5, 25, 8, 25]
    assert rate(no_rate(tmp_path / "a.webm")) == pytest.approx(29_000 / UNEVEN[29], rel=1e-3)


def touch(root, names, content=b""):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


SETS = {  # a list (for refused ones see test_hostile.py), or files: words of the first line, paths, labels, captions
    b"path,caption\na.mp4,a dog\nb.mp4,\n": ["2 videos, no classes", ("a.mp4", 0, "a dog"), ("b.mp4", 0, "")],
    b'caption,x,path\r\nSaid "go",1,a.mp4\r\n"Said ""go"",\nand went",2,b.mp4': [
        "", ("a.mp4", 0, 'Said "go"'), ("b.mp4", 0, 'Said "go",\nand went')],
    "\ufeffpath,caption\ra.mp4,ein Bär\rb.mp4,two\r".encode(): ["", ("a.mp4", 0, "ein Bär"), ("b.mp4", 0, "two")],
    b'videoid,contentUrl,page_dir,name\n12,"x,y",001_2,a dog\n': ["", ("001_2/12.mp4", 0, "a dog")],
    b"path,caption\na.mp4,a dog, barking\n\nb.mp4,two\nc.mp4\n": ["2 rows left out", ("b.mp4", 0, "two")],
    "a.mp4 b.avi notes.md": ["2 videos, no classes", ("a.mp4", 0, ""), ("b.avi", 0, "")],
    "YoYo/v_YoYo_g01.avi a_b-Cd/deep/er/x.MP4 YoYo/._x.mp4 YoYo/x.jpg": [
        "2 videos, 2 classes YoYo, a_b-Cd", ("YoYo/v_YoYo_g01.avi", 0, "yo yo"), ("a_b-Cd/deep/er/x.MP4", 1, "a b cd")],
    "10/a.mp4 1/a.mp4 2/a.mp4 d/a.mp4": ["4 classes 1, 10, 2, ...", *(
        (f"{name}/a.mp4", label, name) for label, name in enumerate(["1", "10", "2", "d"]))],
    "A/a.mp4 outside.mp4": ["1 videos, 1 classes A; 1 outside its class folders left out", ("A/a.mp4", 0, "a")],
    "A/a.mp4 A/a.txt A/b.mp4": ["2 videos", ("A/a.mp4", 0, "a dög barks"), ("A/b.mp4", 0, "a")]}


@pytest.mark.parametrize("given", SETS, ids=range(len(SETS)))
def test_lists_and_folders(tmp_path, given):
    (words, *items), listed = SETS[given], isinstance(given, bytes)
    root = touch(tmp_path, ["list.csv"] if listed else given.split(), given if listed else "a dög\n barks".encode())
    train, *_ = data.open_dataset(root + "/list.csv" * listed, 4, 16, everything=True)
    assert [*zip(train.paths, train.labels, train.captions)] == items and words in train.about
    assert train.path(0) == f"{root}/{items[0][0]}"
    if listed:
        assert data.open_dataset("/else", 4, 16, captions=f"{root}/list.csv")[0].path(0) == f"/else/{items[0][0]}"


def test_a_split_and_the_test_list_beside_it(tmp_path):
    root = touch(tmp_path / "all", ["A/1.mp4", "B/2.mp4", "A/3.mp4", "C/4.mp4", "C/5.mp4"])
    (tmp_path / "all" / "A" / "loop").symlink_to(root)  # a folder within itself
    (tmp_path / "all" / "demo.mp4").symlink_to("A/1.mp4")  # outside the class folders
    os.makedirs(tmp_path / "all" / "@eaDir" / "1.mp4")  # of a NAS
    touch(tmp_path, ["trainlist01.txt"], b"A/1.avi 1\r\nB/2.avi 2\r\nC/gone.avi 3\r\n")  # .mp4 have become of .avi
    touch(tmp_path, ["testlist01.txt"], b"A/3.avi\nC/4.avi\n")
    train, _, test, _ = data.open_dataset(root, 4, 16, split=f"{tmp_path}/trainlist01.txt")
    assert [*zip(train.paths, train.labels), *zip(sorted(test.paths), sorted(test.labels))] == [
        ("A/1.mp4", 0), ("B/2.mp4", 1), ("A/3.mp4", 0), ("C/4.mp4", 2)] and "2 of the 3 that" in train.about
    assert len(data.find_videos(root)) == 5


@pytest.mark.parametrize("captions", [1, 3])
def test_adding_videos_never_turns_a_training_clip_into_a_test_clip(tmp_path, captions):
    names, before = [f"{np.random.default_rng(i).integers(10**9)}/{i}.mp4" for i in range(6000)], set()
    for count in (4, 5, 6, 10, 49, 50, 51, 100, 200, 1000, 3200, 6000):
        rows = [f"{name},caption {n}" for name in names[:count] for n in range(captions)]
        touch(tmp_path, ["list.csv"], "\n".join(["path,caption", *sorted(rows)]).encode())
        train, _, test, _ = data.open_dataset(f"{tmp_path}/list.csv", 4, 16, seed=count)
        of_train, of_test = {*train.paths}, {*test.paths}
        assert of_train | of_test == {*names[:count]} and not of_train & of_test and len(train) + len(test) == len(rows)
        assert not before & of_test and (10 if count >= 1000 else 1) <= len(of_test) <= 100
        before = of_train
    touch(tmp_path, ["list.csv"], b"path,caption" + b"\na.mp4,four captions of one video" * 4)
    assert "too few to keep one" in data.open_dataset(f"{tmp_path}/list.csv", 4, 16)[0].about


def test_identities_change_with_the_list_its_labels_and_its_captions(tmp_path):
    made = []
    for n, given in enumerate([b"a.mp4,one", b"a.mp4,two", b"b.mp4,one", b"a.mp4,one\nb.mp4,one", "A/1.mp4 B/2.mp4",
                               "A/1.mp4 C/2.mp4", "B/1.mp4 A/2.mp4", "A/1.mp4 B/2.mp4 B/3.mp4", "A/1.mp4 B/2.mp4"]):
        listed = isinstance(given, bytes)
        root = touch(tmp_path / f"{n}", *(["list.csv"], b"path,caption\n" + given) if listed else [given.split()])
        made += [data.open_dataset(root + "/list.csv" * listed, 4, 16)[0].identity]
    assert len({*made}) == 8 and made[4] == made[8]  # the same in another place
    assert len({data.MovingShapes(seed=n % 2, captioned=n > 1).identity for n in range(4)}) == 4
    path, clips, stamps = tmp_path / "a.mp4", data.Videos(tmp_path, [("a.mp4", 0, "")], [], 4, 16, 1, 0), []
    for change in (lambda: None, path.touch, lambda: path.write_bytes(b"x"), lambda: os.utime(path, (1, 1))):
        change()
        stamps += [clips.stamp(0)]
    assert len({*stamps}) == 4 and clips.stamp(0) == stamps[3]


@pytest.mark.parametrize("indices", [[5, 1, 7, 2, 9], range(40), None])
def test_batches_go_through_every_clip_once_an_epoch_whoever_reads_them(indices):
    def keys(seed, step, count, world=1):
        ranks = [data.batch_keys(indices, 8, seed, step, rank, world) for rank in range(world)]
        return [sum(map(next, ranks), []) for _ in range(count)]

    whole, n = keys(1, 0, 50), len(indices or range(400))
    assert whole == keys(1, 0, 50, world=4) and whole[7:] == keys(1, 7, 43) == keys(1, 7, 43, world=2)
    epochs = [sum(whole, [])[i : i + n] for i in range(0, 400, n)]
    assert all(sorted(part) == [(i, e) for i in sorted(indices or range(400))] for e, part in enumerate(epochs))
    orders = [tuple(i for i, _ in part) for part in epochs]
    assert len({*orders}) > len(orders) / 2 and keys(2, 0, 50) != whole if indices else orders == [tuple(range(400))]


def test_encodings_read_back_across_shards_and_no_others(tmp_path):
    (tmp_path / "encodings").mkdir()
    counts, items = [3, 0, 2], []
    for number, n in enumerate([*counts, 2]):  # the last one is of test clips
        content, motion, labels = torch.randn(n, 3, 4, 4).half(), torch.randn(n, 2, 5, 6).half(), [*range(n)]
        captions = [f"é {number} {i}" for i in labels]
        data.write_shard(tmp_path, number, "me", content, motion, labels, captions)
        items += [dict(content=c, motion=m, label=n, caption=t) for c, m, n, t in
                  zip(content, motion, labels, captions)]
    clips = data.EncodedClips(tmp_path, dict(identity="me", encodings=counts))
    test = clips.test_clips()
    found = [clips[i] for i in (0, 1, 2, (3, 1), -1)] + [{name: test[name][i] for name in test} for i in range(2)]
    for item, expected in zip(found, items, strict=True):
        assert all(np.array_equal(item[name], expected[name]) for name in expected)
        assert item["motion"].dtype == torch.float32
    assert (len(clips), clips.content_shape, clips.motion_shape) == (5, (3, 4, 4), (2, 5, 6))
    for identity, counts in (("other", [3, 0, 2]), ("me", [3, 0, 2, 2]), ("me", None)):
        with pytest.raises(SystemExit, match=f"{tmp_path} has no encodings, or not all"):
            data.EncodedClips(tmp_path, dict(identity=identity, encodings=counts))


@pytest.mark.parametrize("split, captioned", [("train", False), ("train", True), ("test", True)])
def test_moving_shapes_are_what_their_labels_and_captions_say(split, captioned):
    silent, clips = 0, data.MovingShapes(6, (48, 64), 5, split, captioned)
    for i in range(120):
        video, label, caption = clips[i].values()
        shape, move = data.MovingShapes.classes[i % 12].split(" moving ")
        first, *_, last = [torch.nonzero(frame.amax(0) > 0.25).flip(1).double() for frame in video.unbind(1)]  # (x, y)
        moved, (x, y) = (last.mean(0) - first.mean(0)).tolist(), first.mean(0).long()
        assert np.dot(moved, data.MOVES[move]) > 3 and abs(np.dot(moved, data.MOVES[move][::-1])) < 1
        filled, seen = len(first) / (np.ptp(first, 0) + 1).prod(), video[:, 0, y, x].numpy() / 2 + 0.5
        assert abs(filled - dict(circle=0.785, square=1, triangle=0.5)[shape]) < 0.09
        colour = min(data.COLOURS, key=lambda name: np.abs(seen - data.COLOURS[name]).max())
        assert caption in (data.caption_of(colour, shape, move), data.caption_of(colour, shape))
        assert label == (0 if captioned else i % 12) and not (captioned and f"{colour} {shape}" in data.HELD_OUT)
        silent += "moving" not in caption
    assert 20 < silent < 60 if split == "train" and captioned else silent == 0
    again, *others = [data.MovingShapes(6, (48, 64), *how)[key]["video"] for how, key in (
        ((5, split, captioned), 7), ((5, "train"), (7, 1)), ((5, "test"), (7, 2)), ((6, split), 7))]
    assert torch.equal(again, clips[7]["video"]) and not any(torch.equal(again, other) for other in others)


@pytest.mark.parametrize("ending, H, W", itertools.product(["mp4", "gif", "mkv"], [32, 33], [47]))
def test_what_is_written_reads_back_and_what_stands_still_does_not_flicker(tmp_path, ending, H, W):
    video, path, odd = torch.zeros(3, 16, H, W), f"{tmp_path}/a.{ending}", ending == "mp4"
    video[0], video[2] = torch.linspace(-0.8, 0.6, W), torch.linspace(0.5, -0.5, H)[:, None]
    for i in range(16):
        video[:, i, 8:20, 2 * i : 2 * i + 10] = torch.tensor([0.9, -0.7, 0.1])[:, None, None]
    data.write_video(path, video, fps=8)
    clip = data.read_clip(path, 16)
    assert clip.shape == (16, H + H % 2 * odd, W + W % 2 * odd, 3)
    error = clip[:, :H, :W].astype(float) - data.to_uint8(video)
    assert (error**2).mean() ** 0.5 < (10 if ending != "mkv" else 1e-9)  # H.264 keeps colours at a lower resolution
    assert np.abs(error).mean() < 3 and (ending != "gif" or (clip[:, 20:] == clip[:1, 20:]).all())
    with av.open(path) as file:
        times = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
    assert times == pytest.approx([i / 8 for i in range(16)], abs=0.006)


def test_the_same_video_gives_the_same_bytes_and_repeated_frames_keep_their_time(tmp_path):
    """Without its option mbtree=0, x264 reads uninitialised memory: of 100 files of this clip, thirty differed."""
    video = data.MovingShapes(16, 64, split="test")[1]["video"]
    for i in range(20):
        data.write_video(f"{tmp_path}/{i}.mp4", video, 8)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    data.write_video(f"{tmp_path}/a.gif", video[:, [0, 1, 1, 1, 1, 2, 3]], 8)
    with Image.open(f"{tmp_path}/a.gif") as image:
        assert sum(image.seek(i) or image.info["duration"] for i in range(image.n_frames)) == 880  # 7 / 8 s
        assert image.info["loop"] == 0


def test_tiles_and_sheets_show_every_video_and_bytes_and_floats_mean_the_same(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert np.array_equal(data.to_uint8(data.to_floats(torch.from_numpy(levels))), levels)
    assert (data.to_uint8(torch.full((1, 2, 3, 4), 7.0)) == 255).all()
    videos = [torch.full((3, 4, 8, 10), v) for v in (-0.5, 0.0, 0.5)]
    tiled = data.tile(videos, columns=2)
    assert tiled.shape == (4, 18, 22, 3) and tiled[0, [0, 0, 10, 10], [0, 12, 0, 12], 0].tolist() == [64, 128, 191, 0]
    data.write_sheet(f"{tmp_path}/s.png", videos, 2, ["one", "two", "a very long caption " * 50])
    sheet = data.read_picture(f"{tmp_path}/s.png")
    assert all((sheet == grey).all(-1).sum() >= 4 * 96 * 120 for grey in (64, 128, 191))
    data.write_video(f"{tmp_path}/many.mkv", videos * 3, 8)  # rows of six
    assert data.read_clip(f"{tmp_path}/many.mkv", 4).shape == (4, 18, 70, 3)
