"""fvd.py gives the numbers its references give: the Frechet distance is scipy's, I3D is the published network, the
detectors get the inputs that their authors give them, CLIPSIM agrees with an independent computation; and the number
does not depend on batches or ranks. No detector's weights are needed: random ones do.

    pytest tests/test_fvd.py -s               the sensitivity table is printed
    pytest tests/test_fvd.py -m slow -s       2,000 videos, with the memory and the speed
"""

import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import fvd
from data import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(autouse=True)
def restore_tf32():
    yield
    torch.backends.cudnn.allow_tf32 = True


class Tiny(nn.Module):
    """A detector called like i3d_torchscript.pt: random convolutions, each channel's mean and spread (40 numbers)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv3d(3, 8, (3, 5, 5), padding=(1, 2, 2))
        self.second = nn.Conv3d(8, 12, 3, stride=(1, 2, 2), padding=1)
        nn.init.normal_(self.first.weight, std=0.2)
        nn.init.normal_(self.second.weight, std=0.1)

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features
        x = torch.relu(self.first(x / 127.5 - 1))
        y = torch.relu(self.second(x))
        parts = [x.mean((2, 3, 4)), x.std((2, 3, 4)), y.mean((2, 3, 4)), y.std((2, 3, 4))]
        return torch.cat(parts, 1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_script(Tiny(), tmp_path_factory.mktemp("detector") / "tiny.pt")


def save_script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module.eval()), str(path))
    return str(path)


def write_frames(folder, video):
    """video: uint8 (L, H, W, 3). PNG: nothing is lost."""
    os.makedirs(folder)
    for index, frame in enumerate(video):
        Image.fromarray(frame).save(os.path.join(folder, f"{index}.png"))


def shapes(num, frames=16, size=32, seed=0, split="test"):
    clips = data.MovingShapes(frames, size, seed, split=split)
    videos = torch.stack([clips[i]["video"] for i in range(num)])  # (N, 3, L, H, W)
    return ((videos + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)  # (N, L, H, W, 3)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """REAL: 30 videos at two depths, one too short, longer than a clip; FAKE: 26 of another seed with some noise."""
    root = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0)
    for index, video in enumerate(shapes(30, 20, 24).numpy()):
        write_frames(root / "real" / f"class{index % 3}" / f"v{index}", video[: 5 if index == 4 else 20])
    for index, video in enumerate(shapes(26, 16, 24, seed=1).numpy()):
        noisy = np.clip(video + noise.normal(0, 12, video.shape), 0, 255).astype(np.uint8)
        write_frames(root / "fake" / f"v{index}", noisy)
    return str(root / "real"), str(root / "fake")


def fid(capsys, *argv):
    """Runs main() here and returns (stdout, stderr)."""
    fvd.main([str(word) for word in argv])
    return capsys.readouterr()


def process(*argv, ranks=0, **env):
    """Runs fvd.py as its user does."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    command = [*start, os.path.join(ROOT, "fvd.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


# ---------------------------------------------------------------------------------------------------------------------
# The Frechet distance


def features(num, dim, seed, rank=None):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rank or dim, dim)) * np.geomspace(1, 0.03, rank or dim)[:, None]
    return rng.normal(size=(num, rank or dim)) @ mix + rng.normal(size=dim)


def scipy_distance(x, y):
    """The textbook formula with scipy's root of the product."""
    s1, s2 = np.cov(x, rowvar=False, bias=True), np.cov(y, rowvar=False, bias=True)
    cross = np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s1) + np.trace(s2) - 2 * cross


def scipy_distance_of_few(x, y):
    """The same for N < D, where S1 S2 is singular and sqrtm loses its digits: with x = Q1 a, y = Q2 b centred,
    orthonormal Q and square, regular a and b, tr (S1 S2)^(1/2) is that of (K K^T)^(1/2), K = a^T-side Gram matrix."""
    x0, y0 = x - x.mean(0), y - y.mean(0)

    def squeeze(centred):  # the row space of centred data, without the null direction: (rank, D)
        u, s, vt = scipy.linalg.svd(centred / math.sqrt(len(centred)), full_matrices=False)
        keep = s > 1e-10 * s[0]
        return s[keep, None] * vt[keep]

    a, b = squeeze(x0), squeeze(y0)
    gram = a @ b.T
    gram = gram @ gram.T if len(a) <= len(b) else gram.T @ gram
    cross = np.trace(scipy.linalg.sqrtm(gram)).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + (a**2).sum() + (b**2).sum() - 2 * cross


def test_the_distance_is_scipys_where_there_are_more_videos_than_features():
    for dim in (1, 2, 30, 100):
        x, y = features(300, dim, 1), features(400, dim, 2) * 1.3
        if dim == 1:
            want = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
        else:
            want = scipy_distance(x, y)
        assert fvd.frechet_distance(x, y) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize(
    "num, other, rank", [(30, 25, None), (30, 200, None), (300, 300, 20), (300, 15, 20), (2, 3, None)]
)
def test_the_distance_is_scipys_where_covariances_are_rank_deficient(num, other, rank):
    x, y = features(num, 80, 3, rank), features(other, 80, 4, rank)
    assert fvd.frechet_distance(x, y) == pytest.approx(scipy_distance_of_few(x, y), rel=1e-8)


def test_rounding_errors_in_the_empty_directions_do_not_add_up():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 200)), rng.normal(size=(300, 200))
    x[:, 0], y[:, 0] = 1000 * x[:, 0], 1000 * y[:, 0]
    x, y = x - x.mean(0), y - y.mean(0)
    assert fvd.frechet_distance(x, y) == pytest.approx(scipy_distance_of_few(x, y), rel=1e-11)


@pytest.mark.parametrize("num, dim", [(500, 100), (60, 100), (2, 100), (1, 5)])
def test_identical_sets_have_distance_zero(num, dim):
    x = features(num, dim, 5)
    assert 0 <= fvd.frechet_distance(x, x.copy()) <= 1e-6 * max(np.var(x, axis=0).sum(), 1e-9)


@pytest.mark.parametrize("num, dim", [(500, 60), (40, 60)])
def test_a_shift_by_v_costs_the_square_of_v(num, dim):
    x, v = features(num, dim, 6), np.random.default_rng(7).normal(size=dim) * 5
    assert fvd.frechet_distance(x, x + v) == pytest.approx(v @ v, rel=1e-9)


def test_statistics_in_batches_are_numpys_in_float64_even_with_a_large_common_offset(tmp_path):
    x = features(203, 40, 8).astype(np.float32)
    for offset in (0, 1e6):
        shifted = x.astype(np.float64) + offset
        stats = fvd.Statistics()
        for i in range(0, 203, 8):
            stats.add(shifted[i : i + 8])
        assert stats.num == 203
        np.testing.assert_allclose(stats.mean, shifted.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.cov, np.cov(x.astype(np.float64), rowvar=False, bias=True), atol=1e-9)
    stats.meta = dict.fromkeys(fvd.Statistics.FIELDS, [4, 5]) | dict(frames=16, kind="random")
    stats.save(str(tmp_path / "s.npz"))
    again = fvd.Statistics.load(str(tmp_path / "s.npz"))
    np.testing.assert_array_equal(again.cov, stats.cov)
    assert (again.num, again.meta) == (203, stats.meta)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError):
        fvd.frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))


# ---------------------------------------------------------------------------------------------------------------------
# I3D against an independent writing of it: the table of Inception-v1, convolutions with pads worked out one by one


def tf_pads(size, kernel, stride):
    """TensorFlow's documentation of 'SAME', its two cases as they stand there."""
    total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
    return total // 2, total - total // 2


def reference_pad(x, kernel, stride, value=0.0):
    for axis, (k, s) in enumerate(zip(kernel, stride)):
        before, after = tf_pads(x.shape[axis + 2], k, s)
        ends = [list(x.shape), list(x.shape)]
        ends[0][axis + 2], ends[1][axis + 2] = before, after
        x = torch.cat([torch.full(ends[0], value), x, torch.full(ends[1], value)], axis + 2)
    return x


def reference_i3d(state, x, eps):
    def unit(name, x, stride=1):
        weight = state[f"{name}.conv3d.weight"]
        x = F.conv3d(reference_pad(x, weight.shape[2:], (stride,) * 3), weight, stride=stride)
        scale = state[f"{name}.bn.weight"] / torch.sqrt(state[f"{name}.bn.running_var"] + eps)
        offset = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
        return (x * scale.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1)).clamp(min=0)

    def pool(x, kernel, stride):
        return F.max_pool3d(reference_pad(x, kernel, stride, -math.inf), kernel, stride)

    def mixed(name, x):
        second, third = unit(f"{name}.b1b", unit(f"{name}.b1a", x)), unit(f"{name}.b2b", unit(f"{name}.b2a", x))
        fourth = unit(f"{name}.b3b", pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([unit(f"{name}.b0", x), second, third, fourth], 1)

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
        "5c": (832, 384, 192, 384, 48, 128, 128),
    }
    units = {"Conv3d_1a_7x7": (64, 3, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (192, 64, 3)}
    for name, (width, one, r3, three, r5, five, pool) in table.items():
        branches = dict(b0=(one, width, 1), b1a=(r3, width, 1), b1b=(three, r3, 3), b2a=(r5, width, 1),
                        b2b=(five, r5, 3), b3b=(pool, width, 1))
        units |= {f"Mixed_{name}.{branch}": shape for branch, shape in branches.items()}
    shapes = {}
    for name, (out, width, kernel) in units.items():
        shapes[f"{name}.conv3d.weight"] = (out, width, kernel, kernel, kernel)
        shapes |= {f"{name}.bn.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}


@pytest.fixture(scope="session")
def raw():
    """A random file of full size, with names and shapes as in the real ones."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in names_of_the_raw_files().items():
        state[name] = torch.randn(shape, generator=generator)
        if len(shape) == 5:
            state[name] *= math.sqrt(2 / math.prod(shape[1:]))
        elif "running_var" in name or "bn.weight" in name:
            state[name] = 1 + 0.2 * torch.rand(shape, generator=generator)
        else:
            state[name] *= 0.1
    return state


def test_i3d_has_the_names_and_shapes_of_the_raw_files():
    own = {name: tuple(value.shape) for name, value in fvd.I3D().state_dict().items() if "num_batches" not in name}
    assert own == names_of_the_raw_files()


@pytest.mark.parametrize("shape, eps", [((16, 224, 224), 1e-3), ((11, 225, 199), 1e-5)])  # the second pads unevenly
def test_i3d_is_the_reference_at_full_size(raw, shape, eps):
    x = torch.rand((1, 3, *shape), generator=torch.Generator().manual_seed(1)) * 2 - 1
    network = fvd.I3D(eps=eps).eval()
    network.load_state_dict(raw, strict=False)
    with torch.inference_mode():
        got, want = network(x), reference_i3d(raw, x, eps)
    assert got.shape == (1, 400) and want.std() > 0.1  # the signal is alive
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9), (3, 10, 5), (1, 2, 2)])
def test_same_padding_is_tensorflows_by_direct_sums(size):
    rng = np.random.default_rng(0)
    x, kernel, stride = rng.normal(size=size), (3, 3, 2), (2, 2, 2)
    weight = rng.normal(size=kernel)
    out = [math.ceil(n / s) for n, s in zip(size, stride)]
    starts = [-(max((o - 1) * s + k - n, 0) // 2) for n, k, s, o in zip(size, kernel, stride, out)]
    conv, pool = np.zeros(out), np.full(out, -np.inf)
    for place in np.ndindex(*out):
        for tap in np.ndindex(*kernel):
            at = [p * s + first + t for p, s, first, t in zip(place, stride, starts, tap)]
            if all(0 <= a < n for a, n in zip(at, size)):
                conv[place] += weight[tap] * x[tuple(at)]
                pool[place] = max(pool[place], abs(x[tuple(at)]))
    tensor = torch.from_numpy(x)[None, None]
    got = F.conv3d(fvd.same_pad(tensor, kernel, stride), torch.from_numpy(weight)[None, None], stride=stride)
    np.testing.assert_allclose(got[0, 0].numpy(), conv, atol=1e-12)
    np.testing.assert_allclose(fvd.max_pool(tensor.abs(), kernel, stride)[0, 0].numpy(), pool)


# ---------------------------------------------------------------------------------------------------------------------
# What reaches the network


def ramp(height, width, frames=9):
    """uint8 (1, L, H, W, 3): red grows to the right, green downwards, blue with time."""
    video = np.zeros((1, frames, height, width, 3), np.uint8)
    video[..., 0] = np.arange(width) % 256
    video[..., 1] = (np.arange(height) % 256)[:, None]
    video[..., 2] = (10 * np.arange(frames))[:, None, None]
    return video


def at(position, size):
    """What bilinear interpolation reads at the half-pixel place `position` of 0, 1, ..., size - 1 (edges repeat)."""
    return np.clip(position, 0, size - 1)


def fed(kind, video):
    """What the network of a kind of detector is given."""
    seen = []

    def network(x):
        seen.append(x)
        return torch.zeros(len(x), 4)

    detector = fvd.Detector(nn.Identity(), kind, "", "cpu")
    detector.network = network
    detector(video)
    return seen[0].numpy()


@pytest.mark.parametrize(
    "kind, height, width, resized, rows, columns",
    # resized: height and width before the crop; rows, columns: where the middle 224 begins
    [
        ("videogpt", 64, 64, (224, 224), 0, 0),
        ("videogpt", 90, 121, (224, 302), 0, 39),  # 121 * 224 / 90 = 301.2, rounded up
        ("videogpt", 240, 224, (240, 224), 8, 0),
        ("pytorch-i3d", 113, 150, (226, 300), 1, 38),
        ("pytorch-i3d", 240, 250, (240, 250), 8, 13),  # 226 to 256 stays as it is
        ("random", 64, 64, (224, 224), 0, 0),
    ],
)
def test_a_ramp_reaches_i3d_as_computed_by_hand(kind, height, width, resized, rows, columns):
    x = fed(kind, ramp(height, width))
    assert x.shape == (1, 3, 9, 224, 224) and x.dtype == np.float32
    across = at((np.arange(224) + columns + 0.5) * width / resized[1] - 0.5, width)
    down = at((np.arange(224) + rows + 0.5) * height / resized[0] - 0.5, height)
    want = np.zeros((3, 9, 224, 224))
    want[0], want[1], want[2] = across, down[:, None], 10 * np.arange(9)[:, None, None]
    np.testing.assert_allclose(x[0], want / 127.5 - 1, atol=2e-5)


def test_a_large_video_is_brought_down_to_256_for_pytorch_i3d():
    x = fed("pytorch-i3d", ramp(512, 512)[:, :, :, :, [2]].repeat(3, -1))
    np.testing.assert_allclose(x[0, 0, :, 0, 0], 10 * np.arange(9) / 127.5 - 1, atol=1e-5)
    assert x.shape[-2:] == (224, 224)


class Echo(nn.Module):
    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        flags = torch.tensor([rescale, resize, return_features]).to(x.dtype)
        return torch.cat([x[:, :, :, 1, 2].flatten(1), flags.expand(len(x), 3)], 1)


def test_the_torchscript_file_is_given_0_to_255_and_the_three_flags(tmp_path):
    detector = fvd.load_detector(save_script(Echo(), tmp_path / "echo.pt"))
    video = np.concatenate([ramp(8, 10), ramp(8, 10) + 100])
    out = detector(video)
    assert detector.kind == "torchscript" and out.dtype == np.float32
    want = np.stack([np.full(9, 2), np.full(9, 1), 10 * np.arange(9)]).ravel()
    np.testing.assert_array_equal(out, [[*want, 1, 1, 1], [*(want + 100), 1, 1, 1]])


class Trap:
    """Loading its pickle makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_each_file_is_recognised_and_fed_as_its_users_feed_it(raw, tmp_path):
    def save(name, state, **how):
        torch.save(state, tmp_path / name, **how)
        return str(tmp_path / name)

    new = save("i3d_pretrained_400.pt", raw)
    old = save("old.pt", raw, _use_new_zipfile_serialization=False)
    named = save("rgb_imagenet.pt", raw)
    for path, kind, eps in ((new, "videogpt", 1e-5), (old, "pytorch-i3d", 1e-3), (named, "pytorch-i3d", 1e-3)):
        detector = fvd.load_detector(path)
        assert detector.kind == kind and detector.network.Mixed_4c.b1b.bn.eps == eps
        torch.testing.assert_close(detector.network.Mixed_4c.b1b.conv3d.weight, raw["Mixed_4c.b1b.conv3d.weight"])
        assert not detector.network.training

    half = {name: tensor for name, tensor in raw.items() if name != "Mixed_5b.b0.conv3d.weight"}
    with pytest.raises(InputError, match="half.pt is not an I3D file: .*Missing key.*Mixed_5b.b0.conv3d.weight"):
        fvd.load_detector(save("half.pt", half))
    wrong = raw | {"logits.conv3d.bias": torch.zeros(600)}
    with pytest.raises(InputError, match="is not an I3D file: .*size mismatch for logits.conv3d.bias"):
        fvd.load_detector(save("kinetics600.pt", wrong))
    with pytest.raises(InputError, match="code.pt"):
        fvd.load_detector(save("code.pt", {"x": Trap(str(tmp_path / "sprung"))}))
    assert not (tmp_path / "sprung").exists()  # no code of the file has run
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match="text.pt"):
        fvd.load_detector(str(tmp_path / "text.pt"))


def test_random_weights_are_the_same_in_every_run_and_leave_the_signal_alive():
    video = shapes(2, 9, 32)
    first, second = fvd.load_detector("random")(video), fvd.load_detector("random")(video)
    assert np.array_equal(first, second) and first.shape == (2, 400)
    assert np.abs(first[0] - first[1]).max() > 1e-3 and first.std() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_the_number_is_that_of_the_features_computed_one_by_one(folders, tiny, capsys):
    out, err = fid(capsys, *folders, "--i3d", tiny)
    detector = fvd.load_detector(tiny)
    sets = []
    for root in folders:
        rows = []
        for folder, _, names in sorted(os.walk(root)):
            if len(names) < 16:
                continue
            name = os.path.relpath(folder, root)
            rng = np.random.default_rng([0, fvd.zlib.crc32(name.encode())])
            start = rng.integers(len(names) - 16 + 1)
            clip = [np.asarray(Image.open(f"{folder}/{i}.png")) for i in range(start, start + 16)]
            rows.append(detector([np.stack(clip)])[0])
        sets.append(np.array(rows))
    assert [len(rows) for rows in sets] == [29, 26]
    value = float(re.match(r"FVD ([\d.]+) \| 29 real, 26 fake clips \| 16 frames, 24x24", out)[1])
    assert value == pytest.approx(fvd.frechet_distance(*sets), abs=0.006)
    assert "1 left out, too short or unreadable" in err and "has 5 frames, 16 needed" in err
    assert "29 real videos, 26 fake" in err and "rank-deficient" in err
    assert out.count("\n") == 1 and "random clips, real ones of" in out and "TorchScript" in out


def test_one_and_two_ranks_print_the_same_line(folders, tiny, tmp_path):
    flags = [*folders, "--i3d", tiny, "-n", "21", "--batch-size", "4", "--save"]  # torchrun does not accept --num
    one = process(*flags, tmp_path / "one.npz")
    two = process(*flags, tmp_path / "two.npz", ranks=2)
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout.startswith("FVD ") and one.stdout == two.stdout
    loaded = [fvd.Statistics.load(tmp_path / name).cov for name in ("one.npz", "two.npz")]
    np.testing.assert_array_equal(*loaded)  # to the last bit


def test_saved_statistics_take_the_place_of_real_if_they_were_made_in_the_same_way(folders, tiny, capsys, tmp_path):
    real, fake = folders
    flags = ["--i3d", tiny, "--num", "20"]
    first, _ = fid(capsys, real, fake, *flags, "--save", tmp_path / "real.npz")
    again, err = fid(capsys, tmp_path / "real.npz", fake, *flags)
    assert again == first and "REAL" not in err  # nothing is read a second time
    assert fid(capsys, fake, tmp_path / "real.npz", *flags)[0].startswith("FVD ")
    assert fid(capsys, tmp_path / "real.npz", tmp_path / "real.npz", *flags)[0].startswith("FVD 0.00 ")
    other = torch.jit.load(tiny)
    other.first.bias.data += 1
    torch.jit.save(other, tmp_path / "other.pt")
    for change, message in (
        ("--frames 9", "frames 16 against 9"),
        ("--size 20", "size .24, 24. against .20, 20."),
        ("--frames 8 --stride 2", "frames 16 against 8"),
        ("--i3d random", "kind torchscript against random"),
        (f"--i3d {tmp_path / 'other.pt'}", "detector [0-9a-f]+ against [0-9a-f]+"),
    ):
        with pytest.raises(InputError, match=f"cannot be compared: {message}"):
            fid(capsys, tmp_path / "real.npz", fake, *flags, *change.split())


def test_with_random_weights_the_bars_and_the_result_say_that_the_number_means_nothing(folders, capsys):
    out, err = fid(capsys, *folders, "--i3d", "random", "--num", "2", "--frames", "9")
    assert out.startswith("FVD ") and out.count("\n") == 1
    for label in ("REAL, ", "FAKE, ", "| "):
        assert f"{label}RANDOM WEIGHTS: THIS NUMBER MEANS NOTHING OUTSIDE THIS RUN" in out + err


def test_the_embedded_shapes_can_be_scored(folders, tiny, capsys):
    out, _ = fid(capsys, "shapes", folders[1], "--i3d", tiny, "--num", "26")
    same, _ = fid(capsys, "shapes", "shapes", "--i3d", tiny, "--num", "26", "--size", "24")
    assert "24x24" in out and float(out.split()[1]) > 0
    assert same.startswith("FVD 0.00 ")


def test_video_files_are_read_at_any_depth_grey_and_odd_sizes_included(tiny, capsys, tmp_path):
    videos = shapes(6, 18, 34)
    for index, video in enumerate(videos.numpy()):
        path = tmp_path / "real" / "deep" / f"{index % 2}" / f"clip{index}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index == 1:
            video = video.mean(-1, keepdims=True).astype(np.uint8).repeat(3, -1)
        if index == 2:
            video = video[:, :31, :29]
        data.write_video(str(path), video, 8)
    (tmp_path / "real" / "broken.mp4").write_bytes(b"no video")
    out, err = fid(capsys, tmp_path / "real", tmp_path / "real", "--i3d", tiny, "--size", "24")
    assert out.startswith("FVD 0.00 | 6 real, 6 fake") and "1 left out" in err and "broken.mp4" in err
    out, err = fid(capsys, tmp_path / "real", tmp_path / "real", "--i3d", tiny, "--frames", "5")
    assert re.search(r"\| 5 frames, \d\dx\d\d, seed 0; strides: real 1, fake 1", out)


def test_a_gif_beside_its_mp4_is_the_same_video(tiny, capsys, tmp_path):
    for index, video in enumerate(shapes(3, 9, 32).numpy()):
        (tmp_path / "real").mkdir(exist_ok=True)
        (tmp_path / "fake").mkdir(exist_ok=True)
        data.write_video(str(tmp_path / "real" / f"a.{index}.mp4"), video, 8)
        shutil.copy(tmp_path / "real" / f"a.{index}.mp4", tmp_path / "fake")
        data.write_video(str(tmp_path / "fake" / f"a.{index}.gif"), video, 8)
    out, _ = fid(capsys, tmp_path / "real", tmp_path / "fake", "--frames", "9", "--i3d", tiny)
    assert out.startswith("FVD 0.00 | 3 real, 3 fake")


def test_a_split_chooses_the_videos_of_real(tiny, capsys, tmp_path):
    for index, video in enumerate(shapes(6, 16, 32).numpy()):
        path = tmp_path / "real" / f"Class{index % 2}" / f"v_{index}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_video(str(path.with_suffix(".mp4")), video, 8)
        os.rename(path.with_suffix(".mp4"), path)
    (tmp_path / "trainlist01.txt").write_text("Class0/v_0.avi 1\nClass1/v_1.avi 2\nClass0/v_4.avi 1\n")
    out, _ = fid(capsys, tmp_path / "real", tmp_path / "real", "--split", tmp_path / "trainlist01.txt", "--i3d", tiny)
    assert "3 real, 6 fake" in out and "real ones of 3 videos in trainlist01.txt;" in out


def test_the_stride_is_of_real_alone_since_generated_clips_have_it_already(tiny, capsys, tmp_path):
    for folder, stride in (("real", 1), ("fake", 2)):  # the same 17 frames, and what stage 1 takes of them
        (tmp_path / folder).mkdir()
        for index in range(3):
            clip = data.MovingShapes(17, 32)[index]["video"][:, ::stride]
            data.write_video(str(tmp_path / folder / f"{index}.mkv"), clip, 8)
    flags = [tmp_path / "real", tmp_path / "fake", "--i3d", tiny, "--frames", "9"]
    out, _ = fid(capsys, *flags, "--stride", "2", "--save", tmp_path / "real.npz")
    assert out.startswith("FVD 0.00 | 3 real, 3 fake clips") and "strides: real 2, fake 1;" in out
    assert fid(capsys, tmp_path / "real.npz", *flags[1:], "--stride", "2")[0] == out
    for change, message in (("--stride 1", "--stride 2, not 1"),
                            ("--stride 2 --split a/b.txt", "--split '', not 'b.txt'")):
        with pytest.raises(InputError, match=f"REAL was made with {message}"):
            fid(capsys, tmp_path / "real.npz", *flags[1:], *change.split())
    assert "FVD 0.00 " not in fid(capsys, *flags)[0]


def test_a_real_set_of_few_videos_gives_several_clips_of_each_and_the_line_names_both_codecs(tiny, capsys, tmp_path):
    for folder, count, frames, ending in (("real", 3, 24, "mp4"), ("fake", 5, 9, "mkv")):
        (tmp_path / folder).mkdir()
        for index in range(count):
            clip = data.MovingShapes(frames, 32, seed=count)[index]["video"]
            data.write_video(str(tmp_path / folder / f"{index}.{ending}"), clip, 8)
    flags = ["--i3d", tiny, "--frames", "9"]
    out, _ = fid(capsys, tmp_path / "real", tmp_path / "fake", *flags, "--num", "5", "--save", tmp_path / "real.npz")
    assert "5 real, 5 fake" in out and "random clips, real ones of 3 videos;" in out
    assert "codecs: real h264, fake ffv1" in out
    detector, order, rows = fvd.load_detector(tiny), np.random.default_rng(0).permutation(3), []
    for number, index in [*((0, i) for i in order), (1, order[0]), (1, order[1])]:
        rng = np.random.default_rng([0, fvd.zlib.crc32(str(index).encode()) + number])
        rows.append(detector([data.read_clip(str(tmp_path / "real" / f"{index}.mp4"), 9, rng=rng)])[0])
    assert not np.array_equal(rows[0], rows[3])
    expected = fvd.Statistics().add(rows).cov
    np.testing.assert_allclose(fvd.Statistics.load(tmp_path / "real.npz").cov, expected, atol=1e-6)
    out, _ = fid(capsys, tmp_path / "fake", tmp_path / "real", *flags, "--num", "5")  # of FAKE each video counts once
    assert "5 real, 3 fake" in out and "real ones of 5 videos;" in out


def test_mistakes_cost_one_line(folders, tiny, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_text("no")
    real, fake = folders
    for argv, message in (
        ([real, fake], "give REAL, FAKE and --i3d FILE"),
        ([real, "--i3d", tiny], "give REAL, FAKE"),
        ([real, tmp_path / "none", "--i3d", tiny], "no video in .*none"),
        ([tmp_path / "empty", fake, "--i3d", tiny], "none of 0 videos in .*empty"),
        ([tmp_path / "bad.npz", fake, "--i3d", tiny], "bad.npz is not a file that fvd.py --save wrote"),
        ([real, fake, "--i3d", tiny, "--frames", "50"], "50 frames"),
        (["shapes", fake, "--i3d", tiny, "--split", "list.txt"], "do not apply to the embedded shapes"),
        (["shapes", fake, "--i3d", tiny, "--stride", "2"], "do not apply to the embedded shapes"),
        ([real, fake, "--i3d", "random", "--frames", "8"], "at least 9 frames"),
        ([real, fake, "--i3d", tiny, "--save", tmp_path / "none" / "real.npz"], "no such folder"),
        ([fake, "--clipsim", "--clip", tmp_path / "none.pt"], "not a CLIP file .*openaipublic"),
        ([fake, "--clipsim", "--clip", tmp_path / "bad.npz"], "not a CLIP file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            fid(capsys, *argv)
        assert "\n" not in str(caught.value)
    for argv, message in (
        ([real, fake, "--i3d", tmp_path / "none.pt"], "No such file.*none.pt|none.pt.*No such file"),
        ([real, fake, "--num", "0"], "argument -n/--num"),
    ):
        done = process(*argv)
        assert done.returncode in (1, 2) and re.match(f"fvd.py: .*({message})", done.stderr), done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_help_lists_flags_in_groups_with_their_defaults():
    text = process("--help").stdout
    for word in ("protocol:", "FVD:", "CLIPSIM:", "speed:", "(default: 16)", "(default: 4)"):
        assert word in text


# ---------------------------------------------------------------------------------------------------------------------
# CLIPSIM


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    """A CLIP of random weights, small, as OpenAI stores it (half precision)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from clip.model import CLIP, convert_weights
    torch.manual_seed(0)
    model = CLIP(16, 32, 2, 64, 8, 77, 49408, 64, 1, 2).eval()
    convert_weights(model)
    path = str(tmp_path_factory.mktemp("clip") / "small.pt")
    torch.save(model.state_dict(), path)
    return path, model.float()


def test_clipsim_is_the_mean_cosine_similarity_over_frames_and_videos(small_clip, capsys, tmp_path):
    import clip

    path, model = small_clip
    prompts = ["a red circle", "a blue square moving left", "a red circle"] + [f"thing {i}" for i in range(8)]
    scores = []
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for index, video in enumerate(shapes(11, 6, 32).numpy()):
        write_frames(tmp_path / "fake" / f"{index}", video)  # 10 comes after 9
        x = torch.from_numpy(((video[:4] / 255 - mean) / std).transpose(0, 3, 1, 2)).float()  # 32x32: no resizing
        with torch.inference_mode():
            image, text = model.encode_image(x).numpy(), model.encode_text(clip.tokenize(prompts[index]))[0].numpy()
        scores.append(np.mean(image @ text / np.linalg.norm(image, axis=1) / np.linalg.norm(text)))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    flags = ["--clipsim", "--clip", path, "--frames", "4"]
    out, _ = fid(capsys, tmp_path / "fake", *flags, "--prompts", tmp_path / "prompts.txt")
    got = re.match(r"CLIPSIM (-?[\d.]+) \| 11 videos, 10 prompts", out)
    assert float(got[1]) == pytest.approx(np.mean(scores), abs=6e-5)

    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match="has 2 prompts for 11 videos"):
        fid(capsys, tmp_path / "fake", *flags, "--prompts", tmp_path / "prompts.txt")
    (tmp_path / "fake" / "captions.txt").write_text("\n".join(prompts) + "\n")  # as sample.py leaves them
    assert fid(capsys, tmp_path / "fake", *flags)[0] == out


def test_a_clip_file_in_openais_torchscript_form_is_read(small_clip, tmp_path):
    path, model = small_clip

    class Archive(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
                self.register_buffer(name, torch.tensor(value))
            self.visual, self.transformer = nn.Module(), nn.Module()
            self.blank = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x

    # The archive's modules are those of the names: build the tree from the state dict.
    archive = Archive()
    del archive.blank
    for name, value in torch.load(path, weights_only=True).items():
        *parents, leaf = name.split(".")
        module = archive
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_parameter(leaf, nn.Parameter(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(archive, torch.zeros(1)), str(tmp_path / "ViT.pt"))
    loaded, *_ = fvd.load_clip(str(tmp_path / "ViT.pt"))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.encode_image(x), model.encode_image(x))


# ---------------------------------------------------------------------------------------------------------------------
# What FVD notices, and what it costs


def damage(videos, how, level, rng):
    videos = videos.float()  # (N, L, H, W, 3)
    num, frames = videos.shape[:2]
    if how == "noise":
        videos = videos + level * 64 * torch.randn(videos.shape, generator=rng)
    elif how == "blur":
        blurred = scipy.ndimage.gaussian_filter(videos.numpy(), (0, 0, 4 * level, 4 * level, 0))
        videos = torch.from_numpy(blurred)
    elif how == "frozen":  # from a frame on, nothing moves
        stop = round(frames * (1 - level))
        videos = videos[:, [min(i, max(stop - 1, 0)) for i in range(frames)]]
    else:  # shuffled: a share of the frames change places
        for i in range(num):
            chosen = torch.randperm(frames, generator=rng)[: round(level * frames)]
            order = torch.arange(frames)
            order[chosen.sort()[0]] = chosen
            videos[i] = videos[i, order]
    return videos.round().clamp(0, 255).to(torch.uint8)


def test_fvd_rises_in_order_with_noise_blur_frozen_and_shuffled_frames(tiny):
    detector, rng = fvd.load_detector(tiny), torch.Generator().manual_seed(0)
    real, levels = shapes(96), (0, 0.25, 0.5, 1)

    def measure(videos):
        return np.concatenate([detector(videos[i : i + 16]) for i in range(0, len(videos), 16)])

    reference = measure(real)
    print("\nFVD of 96 shapes against the same, damaged; a small random detector")
    print(f"{'level':10}" + "".join(f"{level:>10}" for level in levels))
    for how in ("noise", "blur", "frozen", "shuffled"):
        row = [fvd.frechet_distance(reference, measure(damage(real, how, level, rng))) for level in levels]
        print(f"{how:10}" + "".join(f"{value:10.4f}" for value in row))
        assert row[0] < 1e-6 and all(1.2 * a < b for a, b in zip(row, row[1:])), (how, row)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_2000_videos(tmp_path):
    """Peak memory beyond the model stays under 1.5 GB; videos a second are printed. FVD_DETECTOR names another
    detector, FVD_VIDEOS another number."""
    num = int(os.environ.get("FVD_VIDEOS", 2000))
    clips = data.MovingShapes(16, 64, 1, split="test")
    for index in range(num):
        path = tmp_path / "fake" / f"{index % 10}" / f"{index}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_video(str(path), clips[index]["video"], 8)
    code = """if True:
        import sys, fvd
        def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e6  # GB
        detector = fvd.load_detector(sys.argv[3])
        before = peak()
        fvd.main(sys.argv[1:3] + ["--i3d"] + sys.argv[3:])
        print(before, peak())
    """
    detector = os.environ.get("FVD_DETECTOR", "random")
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, "shapes", tmp_path / "fake", detector, "--num", str(num)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": ROOT},
    )
    seconds = time.time() - start
    assert done.returncode == 0, done.stderr
    before, peak = map(float, done.stdout.splitlines()[-1].split())
    print(f"\n{done.stdout.splitlines()[0]}\n{2 * num} videos in {seconds:.0f} s, {2 * num / seconds:.1f} videos/s; "
          f"{peak:.2f} GB at most, {peak - before:.2f} GB beyond the model")
    assert peak - before < 1.5
