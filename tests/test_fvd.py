"""Proves that fvd.py gives the numbers of its references: the Frechet distance is scipy's, I3D is the published
network, each detector is fed as its authors feed it, CLIPSIM agrees with a computation of its own; and that the number
is the same on any ranks. No detector's weights are needed: random ones do."""

import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import fvd


class Tiny(nn.Module):
    """A detector called like i3d_torchscript.pt: random convolutions, each channel's mean and spread (40 numbers)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv3d(3, 8, (3, 5, 5), padding=(1, 2, 2))
        self.second = nn.Conv3d(8, 12, 3, stride=(1, 2, 2), padding=1)

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features
        x = torch.relu(self.first(x / 127.5 - 1))
        y = torch.relu(self.second(x))
        return 100 * torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4)), y.mean((2, 3, 4)), y.std((2, 3, 4))], 1)


def save_script(module, path):
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_script(Tiny(), tmp_path_factory.mktemp("detector") / "tiny.pt")


def shapes(num, frames=16, size=32, seed=0):
    clips = data.MovingShapes(frames, size, seed, "test")
    return np.stack([data.to_uint8(clips[i]["video"]) for i in range(num)])  # (N, L, H, W, 3)


def write_frames(folder, video, **how):
    os.makedirs(folder)
    for index, frame in enumerate(np.ascontiguousarray(video)):
        Image.fromarray(frame).save(os.path.join(folder, f"{index}.png"), **how)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """REAL, 6 folders of frames at two depths, one too short; FAKE, 5; and the folder that holds them and the video
    files in real, of several sizes and one damaged; in fake, every second frame of them, and .gif; in lossy, .mp4."""
    root = tmp_path_factory.mktemp("sets")
    for index, video in enumerate(shapes(6, 20, 24)):
        write_frames(root / "REAL" / f"class{index % 3}" / f"v{index}", video[: 5 if index == 4 else 20])
    os.symlink("..", root / "REAL/class0/circle")
    for index, video in enumerate(shapes(5, 16, 24, seed=1)):
        write_frames(root / "FAKE" / f"v{index}", video)
    for folder in ("real/Class0", "real/Class1", "fake", "lossy"):
        os.makedirs(root / folder)
    for index, video in enumerate(shapes(4, 25, 34)):
        data.write_video(f"{root}/real/Class{index % 2}/v_{index}.mkv", video[:, : 34 - 2 * index], 8)
        data.write_video(f"{root}/fake/{index}.mkv", video[::2, : 34 - 2 * index], 8)
        for name in (f"{root}/fake/{index}.gif", f"{root}/fake/samples.gif", f"{root}/lossy/{index % 3}.mp4"):
            data.write_video(name, 255 - video, 8)
    os.rename(root / "real/Class0/v_0.mkv", root / "real/Class0/v_0.avi")
    (root / "real/Class1/broken.mp4").write_bytes(b"no video")
    (root / "lossy/0.mp4").write_bytes((root / "lossy/0.mp4").read_bytes().replace(b"Lavf", b"\xe9avf"))  # not UTF-8
    return str(root / "REAL"), str(root / "FAKE"), root


def line(script, *arguments):
    """What `python fvd.py arguments` prints, one line."""
    done = script("fvd.py", *arguments, "--workers", 0)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    return done.stdout


def features(num, dim, seed, rank=None):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rank or dim, dim)) * np.geomspace(1, 0.03, rank or dim)[:, None]
    return rng.normal(size=(num, rank or dim)) @ mix + rng.normal(size=dim)


def scipy_distance(x, y):
    """The textbook formula with scipy's root of the product."""
    s1, s2 = (np.atleast_2d(np.cov(z, rowvar=False, bias=True)) for z in (x, y))
    cross = np.trace(pytest.importorskip("scipy.linalg").sqrtm(s1 @ s2)).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s1) + np.trace(s2) - 2 * cross


def scipy_distance_of_few(x, y):
    """The same for N < D, where S1 S2 is singular and sqrtm loses its digits: with the row spaces a and b of the
    centred data, S1 = a^T a and S2 = b^T b, tr (S1 S2)^(1/2) is that of (K K^T)^(1/2), K = a b^T."""
    def squeeze(x):  # without the null directions: (rank, D)
        _, s, vt = np.linalg.svd((x - x.mean(0)) / math.sqrt(len(x)), full_matrices=False)
        return s[s > 1e-10 * s[0], None] * vt[s > 1e-10 * s[0]]
    a, b = sorted((squeeze(x), squeeze(y)), key=len)
    cross = np.trace(pytest.importorskip("scipy.linalg").sqrtm(a @ b.T @ b @ a.T)).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + (a**2).sum() + (b**2).sum() - 2 * cross


@pytest.mark.parametrize("dim", [1, 2, 30, 100])
def test_the_distance_is_scipys_where_there_are_more_videos_than_features(dim):
    x, y = features(300, dim, 1), features(400, dim, 2) * 1.3
    assert fvd.frechet_distance(x, y) == pytest.approx(scipy_distance(x, y), rel=1e-8)
    assert fvd.frechet_distance(x + 1e6, y + 1e6) == pytest.approx(scipy_distance(x, y), rel=1e-6)
    assert 0 <= fvd.frechet_distance(x, x.copy()) < 1e-9


@pytest.mark.parametrize("num, other, rank", [(30, 25, 80), (30, 200, 80), (300, 300, 20), (300, 15, 20), (2, 3, 80)])
def test_the_distance_is_scipys_where_covariances_are_rank_deficient(num, other, rank):
    x, y = features(num, 80, 3, rank), features(other, 80, 4, rank)
    assert fvd.frechet_distance(x, y) == pytest.approx(scipy_distance_of_few(x, y), rel=1e-8)


def reference_pad(x, kernel, stride, value=0.0):
    """TensorFlow's documentation of 'SAME', its two cases as they stand there."""
    for axis, (k, s) in enumerate(zip(kernel, stride), start=2):
        size = x.shape[axis]
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        ends = [torch.full([*x.shape[:axis], n, *x.shape[axis + 1:]], value) for n in (total // 2, total - total // 2)]
        x = torch.cat([ends[0], x, ends[1]], axis)
    return x


def reference_i3d(state, x, eps):
    def unit(name, x, stride=1):
        weight = state[f"{name}.conv3d.weight"]
        x = torch.conv3d(reference_pad(x, weight.shape[2:], (stride,) * 3), weight, stride=stride)
        scale = state[f"{name}.bn.weight"] / torch.sqrt(state[f"{name}.bn.running_var"] + eps)
        offset = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
        return (x * scale.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1)).clamp(min=0)

    def pool(x, kernel, stride):
        return torch.max_pool3d(reference_pad(x, kernel, stride, -math.inf), kernel, stride)

    def mixed(name, x):
        fourth = unit(f"{name}.b3b", pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([unit(f"{name}.b0", x), unit(f"{name}.b1b", unit(f"{name}.b1a", x)),
                          unit(f"{name}.b2b", unit(f"{name}.b2a", x)), fourth], 1)

    x = pool(unit("Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x)), (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c", "pool 3", "4b", "4c", "4d", "4e", "4f", "pool 2", "5b", "5c"):
        x = pool(x, (int(name[-1]),) * 3, (2, 2, 2)) if "pool" in name else mixed(f"Mixed_{name}", x)
    x = x.unfold(2, 2, 1).unfold(3, 7, 1).unfold(4, 7, 1).mean((-1, -2, -3))
    weight, bias = state["logits.conv3d.weight"][:, :, 0, 0, 0], state["logits.conv3d.bias"]
    return torch.einsum("kc,bcthw->bkthw", weight, x).mean((2, 3, 4)) + bias


def names_of_the_raw_files():
    """Every tensor of pytorch-i3d's files and of i3d_pretrained_400.pt, and its shape."""
    table = {  # Inception-v1: in, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection
        "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
        "4b": (480, 192, 96, 208, 16, 48, 64), "4c": (512, 160, 112, 224, 24, 64, 64),
        "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
        "4f": (528, 256, 160, 320, 32, 128, 128), "5b": (832, 256, 160, 320, 32, 128, 128),
        "5c": (832, 384, 192, 384, 48, 128, 128)}
    units = {"Conv3d_1a_7x7": (64, 3, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (192, 64, 3)}
    for name, (width, one, r3, three, r5, five, pool) in table.items():
        units |= {f"Mixed_{name}.b0": (one, width, 1), f"Mixed_{name}.b1a": (r3, width, 1),
                  f"Mixed_{name}.b1b": (three, r3, 3), f"Mixed_{name}.b2a": (r5, width, 1),
                  f"Mixed_{name}.b2b": (five, r5, 3), f"Mixed_{name}.b3b": (pool, width, 1)}
    found = {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}
    for name, (out, width, kernel) in units.items():
        found |= {f"{name}.bn.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
        found[f"{name}.conv3d.weight"] = (out, width, kernel, kernel, kernel)
    return found


@pytest.fixture(scope="session")
def raw():
    """A random file of full size, with names and shapes as in the real ones."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in names_of_the_raw_files().items():
        size = math.sqrt(2 / math.prod(shape[1:])) if len(shape) == 5 else 0.1
        state[name] = torch.randn(shape, generator=generator) * size + 1.1 * name.endswith(("bn.weight", "running_var"))
    return state


@pytest.mark.parametrize("shape, eps", [((16, 224, 224), 1e-3), ((11, 225, 199), 1e-5)])  # the second pads unevenly
def test_i3d_is_the_reference_at_full_size_and_has_the_names_and_shapes_of_the_raw_files(raw, shape, eps):
    x, network = torch.rand((1, 3, *shape), generator=torch.manual_seed(1)) * 2 - 1, fvd.I3D(eps=eps).eval()
    own = {name: tuple(value.shape) for name, value in network.state_dict().items() if "num_batches" not in name}
    assert own == names_of_the_raw_files()
    network.load_state_dict(raw, strict=False)
    with torch.inference_mode():
        got, want = network(x), reference_i3d(raw, x, eps)
    assert want.std() > 0.1 and (got - want).abs().max() < 1e-4  # the signal is alive


def ramp(height, width, frames=9):
    """uint8 (1, L, H, W, 3): red grows to the right, green downwards, blue with time."""
    video = np.zeros((1, frames, height, width, 3), np.uint8)
    video[..., 0] = np.arange(width) % 256
    video[..., 1] = (np.arange(height) % 256)[:, None]
    video[..., 2] = (10 * np.arange(frames))[:, None, None]
    return video


@pytest.mark.parametrize("kind, height, width, resized, rows, columns", [
    # resized: height and width before the crop; rows, columns: where the middle 224 begins
    ("videogpt", 64, 64, (224, 224), 0, 0),
    ("videogpt", 90, 121, (224, 302), 0, 39),  # 121 * 224 / 90 = 301.2, rounded up
    ("videogpt", 240, 224, (240, 224), 8, 0),
    ("pytorch-i3d", 113, 150, (226, 300), 1, 38),
    ("pytorch-i3d", 240, 250, (240, 250), 8, 13),  # 226 to 256 stays as it is
    ("pytorch-i3d", 512, 512, (256, 256), 16, 16)])
def test_a_ramp_reaches_i3d_as_computed_by_hand(kind, height, width, resized, rows, columns):
    seen, detector = [], fvd.Detector("random")
    detector.kind, detector.network = kind, lambda x: seen.append(x.numpy()) or torch.zeros(len(x), 4)
    detector(ramp(height, width))
    (x,) = seen
    across = ((np.arange(224) + columns + 0.5) * width / resized[1] - 0.5).clip(0, width - 1) % 256  # edges repeat
    down = ((np.arange(224) + rows + 0.5) * height / resized[0] - 0.5).clip(0, height - 1)[:, None] % 256
    want = np.stack(np.broadcast_arrays(across, down, 10 * np.arange(9)[:, None, None]))  # (3, 9, 224, 224)
    assert x.shape == (1, *want.shape) and x.dtype == np.float32
    np.testing.assert_allclose(x[0], want / 127.5 - 1, atol=2e-5)


def test_the_torchscript_file_is_given_0_to_255_and_the_three_flags(tiny):
    seen, detector = [], fvd.Detector(tiny)
    detector.network = lambda x, **how: seen.append((x.numpy(), how)) or torch.zeros(len(x), 4)
    detector(ramp(8, 10))
    ((x, how),) = seen
    np.testing.assert_array_equal(x.transpose(0, 2, 3, 4, 1), ramp(8, 10))
    assert detector.kind == "torchscript" and how == dict(rescale=True, resize=True, return_features=True)


def test_each_file_is_recognised_and_what_is_not_i3d_is_refused(raw, refused, tmp_path):
    def save(name, state, **how):
        torch.save(state, tmp_path / name, **how)
        return str(tmp_path / name)

    for name, kind, eps in (("i3d_pretrained_400.pt", "videogpt", 1e-5), ("rgb_imagenet.pt", "pytorch-i3d", 1e-3),
                            ("old.pt", "pytorch-i3d", 1e-3)):
        detector = fvd.Detector(save(name, raw, _use_new_zipfile_serialization=name != "old.pt"))
        assert detector.kind == kind and detector.network.Mixed_4c.b1b.bn.eps == eps and not detector.network.training
        torch.testing.assert_close(detector.network.Mixed_4c.b1b.conv3d.weight, raw["Mixed_4c.b1b.conv3d.weight"])
    bias, broken = "logits.conv3d.bias", Tiny()
    for path in (save("half.pt", {name: raw[name] for name in raw if name != bias}),
                 save("600.pt", raw | {bias: torch.zeros(600)}), save("nan.pt", raw | {bias: raw[bias] * torch.nan})):
        refused(f"fvd.py shapes shapes --i3d {path}", path, bias)
    other = save_script(nn.Conv3d(3, 4, 1), tmp_path / "other.pt")
    refused(f"fvd.py shapes shapes --i3d {other}", other, "StyleGAN-V")
    nn.init.constant_(broken.second.bias, torch.nan)
    detector = fvd.Detector(save_script(broken, tmp_path / "broken.pt"))
    for detector.network in (detector.network, lambda x, **_: x):  # NaN; not (n, D)
        with pytest.raises(SystemExit, match="broken.pt"):
            detector(shapes(1))


def test_random_weights_are_the_same_in_every_run_leave_the_signal_alive_and_are_named(script, folders):
    first, second = fvd.Detector("random"), fvd.Detector("random")
    found = first(shapes(2, 9))
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters()))
    assert found.shape == (2, 400) and np.abs(found[0] - found[1]).max() > 1e-3 and found.std() > 1e-2
    out = line(script, "shapes", folders[1], "--i3d", "random", "-n", 1, "--frames", 9)
    assert re.match(r"FVD [\d.]*[1-9].* 24x24, .* THIS NUMBER MEANS NOTHING OUTSIDE THIS RUN, ", out)


def test_the_number_is_that_of_the_features_computed_one_by_one(script, folders, tiny):
    done, detector, sets = script("fvd.py", *folders[:2], "--i3d", tiny), fvd.Detector(tiny), ([], [])
    for root, rows in zip(folders, sets):
        for folder, _, names in sorted(os.walk(root)):
            if len(names) >= 16:
                rng = np.random.default_rng([0, fvd.zlib.crc32(os.path.relpath(folder, root).encode())])
                start = rng.integers(len(names) - 15)
                clip = [np.asarray(Image.open(f"{folder}/{i}.png")) for i in range(start, start + 16)]
                rows += [*detector([np.stack(clip)])]
    value, about = re.fullmatch(r"FVD ([\d.]+) \| (.*)\n", done.stdout).groups()
    assert float(value) == pytest.approx(fvd.frechet_distance(*sets), rel=1e-4) and float(value) > 5
    assert about == ("5 real, 5 fake clips | 16 frames, 24x24, seeds: real 0, fake 0; strides: real 1, fake 1; codecs: "
                     "real none, fake none | StyleGAN-V's TorchScript I3D, tiny.pt: 40 numbers before the softmax; "
                     "random clips, real ones of 6 videos; covariance over N")
    assert re.search(r"left out: .*v4: .*has 5 frames, 16 needed\n(.*\n)*warning: 5 real, .* 40 feat", done.stderr)


def test_one_and_two_ranks_print_the_same_line_and_save_the_same(processes, folders, tiny, tmp_path):
    command = ["fvd.py", *folders[:2], "--i3d", tiny, "-n", 5, "--batch-size", 2, "--save"]
    one, *two = processes.finish(processes.start(*command, tmp_path / "one.npz"),
                                 *processes.ranks(*[[*command, tmp_path / "two.npz"]] * 2))
    assert one.stdout.startswith("FVD ") and [rank.stdout for rank in two] == [one.stdout, ""], two[0].stderr
    first, second = (np.load(tmp_path / f"{name}.npz")["features"] for name in ("one", "two"))
    assert first.shape == (5, 40) and np.array_equal(first, second)


def test_saved_features_take_the_place_of_real_if_made_in_the_same_way(script, refused, folders, tiny, tmp_path):
    (real, fake, _), saved = folders, tmp_path / "real.npz"
    first = line(script, real, fake, "--i3d", tiny, "--save", saved)
    again = script("fvd.py", saved, fake, "--i3d", tiny)
    assert again.stdout == first and "REAL" not in again.stderr  # nothing is read a second time
    assert line(script, saved, saved, "--i3d", tiny).startswith("FVD 0.00 ")
    assert ", seeds: real 0, fake 1; " in line(script, saved, fake, "--i3d", tiny, "--seed", 1)
    other = torch.jit.load(tiny)
    other.first.bias.data += 1
    torch.jit.save(other, tmp_path / "other.pt")
    np.savez(tmp_path / "foreign.npz", features=np.load(saved)["features"])
    for sets, words in ((f"{saved} {fake} --frames 9", "frames 16, not 9"), (f"{fake} {saved} --frames 9", "frames"),
                        (f"{saved} {fake} --size 20", "size"), (f"{saved} {fake} --stride 2", "stride"),
                        (f"{saved} {fake} --split x.txt", "x.txt"), (f"{saved} {fake} --i3d random", "kind"),
                        (f"{saved} {saved} --i3d {tmp_path}/other.pt", "detector"),
                        (f"{tmp_path}/foreign.npz {fake}", "foreign.npz")):
        refused(f"fvd.py --i3d {tiny} {sets}", ".npz", words)  # it prints no bar: nothing was computed


def test_video_files_at_any_depth_a_stride_of_real_alone_splits_and_gifs_beside_videos(script, folders, tiny, tmp_path):
    flags = [folders[2] / "real", folders[2] / "fake", "--i3d", tiny, "--frames", 13]
    done = script("fvd.py", *flags, "--stride", 2)  # FAKE's frames are every second one of REAL's
    assert done.stdout.startswith("FVD 0.00 | 4 real, 4 fake clips | 13 frames, 34x34, "), done.stderr
    assert "strides: real 2, fake 1; codecs: real ffv1, fake ffv1 |" in done.stdout and "broken.mp4" in done.stderr
    assert "2 real, 2 fake" in line(script, "shapes", *flags[1:], "-n", 2)  # whose way takes as many frames
    (tmp_path / "trainlist01.txt").write_text("Class0/v_0.avi 1\nClass1/v_1.avi 2\n")
    out = line(script, *flags, "--split", tmp_path / "trainlist01.txt")
    assert "2 real, 4 fake" in out and "real ones of 2 videos in trainlist01.txt;" in out and "FVD 0.00" not in out


def test_a_real_set_of_few_videos_gives_several_clips_of_each(script, folders, tiny, tmp_path):
    lossy, fake = folders[2] / "lossy", folders[2] / "fake"
    out = line(script, lossy, fake, "--i3d", tiny, "--frames", 9, "-n", 4, "--save", tmp_path / "real.npz")
    assert "4 real, 4 fake" in out and "real ones of 3 videos;" in out and "codecs: real h264, fake ffv1" in out
    detector, order, rows = fvd.Detector(tiny), np.random.default_rng(0).permutation(3), []
    for number, index in [*((0, i) for i in order), (1, order[0])]:
        rng = np.random.default_rng([0, fvd.zlib.crc32(str(index).encode()) + number])
        rows.append(detector([data.read_clip(str(lossy / f"{index}.mp4"), 9, 34, rng=rng)])[0])
    assert not np.array_equal(rows[0], rows[3])
    np.testing.assert_allclose(np.load(tmp_path / "real.npz")["features"], rows, atol=1e-5)
    assert "4 real, 3 fake" in line(script, fake, lossy, "--i3d", tiny, "--frames", 9, "-n", 4)  # FAKE's count once


def test_the_embedded_shapes_are_those_of_the_test_set():
    videos = fvd.VideoSet("shapes", SimpleNamespace(frames=9, size=24, seed=3, clipsim=False), stride=2)
    assert len(videos.paths) == 2400 and np.array_equal(videos["7", 0][0], shapes(8, 17, 24, seed=3)[7, ::2])


def test_pictures_of_any_kind_are_read_as_they_look(script, tiny, tmp_path):
    """Frames with 16 bits of grey, on their side by EXIF, and transparent ones, against plain ones."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees, clockwise
    for index, video in enumerate(shapes(3, 9, (24, 30))):
        alpha = np.where(video[..., :1] > 90, 0, 255).astype(np.uint8)
        plain = [video[..., [0, 0, 0]], video, np.where(alpha, video, 255).astype(np.uint8)][index]
        kinds = [np.uint16(video[..., 0]) * 257, np.rot90(video, axes=(1, 2)), np.concatenate([video, alpha], -1)]
        write_frames(tmp_path / "plain" / str(index), plain)
        write_frames(tmp_path / "kinds" / str(index), kinds[index], **(dict(exif=turned) if index == 1 else {}))
    assert "FVD 0.00 | 3 " in line(script, tmp_path / "plain", tmp_path / "kinds", "--i3d", tiny, "--frames", 9)


def test_mistakes_cost_one_line(refused, folders, tiny, tmp_path):
    names = dict(real=folders[0], fake=folders[1], files=folders[2], tmp=tmp_path, tiny=tiny)
    for command, *words in (
        ("{real} {fake}", "--i3d"), ("{real} --i3d {tiny}", "FAKE"), ("{real} {fake} --i3d none.pt", "--i3d none.pt"),
        ("nowhere {fake} --i3d {tiny}", "nowhere", "not there"), ("nowhere {fake} --i3d {tiny} --split x", "x"),
        ("{tiny} {fake} --i3d {tiny}", "{tiny}", "file"), ("{fake}/v0 {fake} --i3d {tiny}", "v0", "of one video"),
        ("{real} {tmp} --i3d {tiny}", "{tmp}", "no videos"), ("{real} {fake} --clipsim", "--clipsim"),
        ("{real} {fake} --i3d {tiny} --frames 50", "{real}", "50"), ("{real} {fake} --i3d random --frames 8", "9"),
        ("{real} {fake} --i3d {tiny} --save {tmp}/no/x", "--save"), ("{real} {fake} --i3d {tiny} --fram 9", "--fram"),
        ("shapes {fake} --i3d {tiny} --split {tmp}/x", "{tmp}/x"), ("{fake} --clipsim --clip x.pt", "--clip x.pt"),
        ("{fake} --clipsim --split x", "--split"), ("{real} none.npz --i3d {tiny}", "none.npz"),
        ("shapes {files}/fake --i3d {tiny} --frames 12", "longer")):
        refused(f"fvd.py {command}".format(**names), *(word.format(**names) for word in words))


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    """A CLIP of random weights, small, as OpenAI stores it (half precision)."""
    code = pytest.importorskip("clip.model")
    torch.manual_seed(0)
    model = code.CLIP(16, 32, 2, 64, 8, 77, 49408, 64, 1, 2).eval()
    code.convert_weights(model)
    path = str(tmp_path_factory.mktemp("clip") / "small.pt")
    torch.save(model.state_dict(), path)
    return path, model.float()


def test_clipsim_is_the_mean_cosine_similarity_over_frames_and_videos(script, refused, small_clip, tmp_path):
    clip, (path, model) = pytest.importorskip("clip"), small_clip
    prompts, scores = ["a red circle", "a square moving left", "a red circle"] + [f"thing {i}" for i in range(8)], []
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for index, video in enumerate(shapes(11, 6)):
        write_frames(tmp_path / "fake" / f"{index}", video)  # 10 comes after 9
        x = torch.from_numpy(((video[:4] / 255 - mean) / std).transpose(0, 3, 1, 2)).float()  # 32x32: no resizing
        with torch.inference_mode():
            image, text = model.encode_image(x).numpy(), model.encode_text(clip.tokenize(prompts[index]))[0].numpy()
        scores.append(np.mean(image @ text / np.linalg.norm(image, axis=1) / np.linalg.norm(text)))
    (tmp_path / "fake/captions.txt").write_text("\n".join(prompts) + "\n")  # as sample.py leaves them
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    flags = [tmp_path / "fake", "--clipsim", "--clip", path, "--frames", 4]
    got = re.match(r"CLIPSIM (-?[\d.]+) \| 11 videos, 10 prompts \| first 4 frames, stride 1,", line(script, *flags))
    assert float(got[1]) == pytest.approx(np.mean(scores), abs=6e-5)
    refused(f"fvd.py {' '.join(map(str, flags))} --prompts {tmp_path}/two.txt", "two.txt", "2 prompts")
