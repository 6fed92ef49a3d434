"""Proves that the autoencoder, DiT and the motion model equal their equations, written here token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from autoencoder import Autoencoder
from content_diffusion import DiT
from motion_diffusion import MotionDiT


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomised(model):
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval(), model.state_dict()


def close(ours, expected):
    assert ours.shape == expected.shape and (ours - expected).abs().max() < 1e-6 * expected.abs().max()


def linear(s, name, x):
    return x @ s[f"{name}.weight"].flatten(1).T + s.get(f"{name}.bias", 0)


def norm(s, name, x, eps=1e-5):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x * s.get(f"{name}.weight", 1) + s.get(f"{name}.bias", 0)


def attention(*qkv):  # (N, width) each, of two heads
    heads = zip(*(part.chunk(2, 1) for part in qkv))
    return torch.cat([(q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v for q, k, v in heads], 1)


def patches(frame, p):  # (C, H, W) -> (H/p, W/p, C p p)
    _, H, W = frame.shape
    return torch.stack([torch.stack([frame[:, i : i + p, j : j + p].flatten() for j in range(0, W, p)])
                        for i in range(0, H, p)])


def timesformer(s, name, x):  # (L, H, W, width)
    def attend(name, x):
        q, k, v = (linear(s, f"{name}.{part}", x) for part in ("query", "key", "value"))
        return linear(s, f"{name}.out", attention(q, k, v))
    L, H, W, C = x.shape
    x = x + s[f"{name}.time_position"] + s[f"{name}.row_position"] + s[f"{name}.column_position"]
    for b in (f"{name}.blocks.0", f"{name}.blocks.1"):
        y = norm(s, f"{b}.time_norm", x).view(L, H * W, C)
        x = x + torch.stack([attend(f"{b}.time", y[:, place]) for place in range(H * W)], 1).view(L, H, W, C)
        y = norm(s, f"{b}.space_norm", x).view(L, H * W, C)
        x = x + torch.stack([attend(f"{b}.space", y[frame]) for frame in range(L)]).view(L, H, W, C)
        y = norm(s, f"{b}.ff_norm", x)
        x = x + linear(s, f"{b}.ff.reduce", linear(s, f"{b}.ff.value", y) * F.gelu(linear(s, f"{b}.ff.gate", y)))
    return norm(s, f"{name}.norm", x)


@pytest.mark.parametrize("L, size, p, content, smooth, squash", [
    (5, (8, 12), 2, "weights", False, True), (16, (16, 8), 4, "weights", True, False),
    (1, (3, 2), 1, "mean", False, True), (2, (8, 8), 2, "frame", False, False)])
def test_the_autoencoder_is_equations_3_to_6(L, size, p, content, smooth, squash):
    model, s = randomised(Autoencoder(3, L, size, p, 16, 3, 2, 2, content, smooth, squash))
    (H, W), videos = (size[0] // p, size[1] // p), torch.rand(2, 3, L, *size) * 2 - 1

    def join(tokens):  # (L, H/p, W/p, C p p) -> (C, L, H, W)
        return tokens.view(L, H, W, 3, p, p).permute(3, 0, 1, 4, 2, 5).reshape(3, L, *size)
    contents, motions = model.encode(videos)
    for video, frame, motion, output in zip(videos, contents, motions, model.decode(contents, motions)):
        u = timesformer(s, "encoder", linear(s, "embed", torch.stack([patches(video[:, i], p) for i in range(L)])))
        weights = dict(mean=torch.ones(L), frame=torch.eye(L)[0]).get(content, torch.zeros(L)).view(L, 1, 1)
        if content == "weights":
            logits = linear(s, "to_logits", u)
            large = F.interpolate(logits.permute(0, 3, 1, 2), size, mode="bilinear").transpose(0, 1) if smooth else None
            weights = (large if smooth else join(logits)).exp()
        close(frame, (video * weights).sum(1) / weights.expand_as(video).sum(1))
        z_x, z_y = linear(s, "to_rows", u.mean(2)).tanh(), linear(s, "to_columns", u.mean(1)).tanh()
        close(motion, torch.cat([z_x, z_y], 1).permute(2, 0, 1))
        v = (linear(s, "embed_content", patches(frame, p))[None] + linear(s, "embed_rows", z_x)[:, :, None]
             + linear(s, "embed_columns", z_y)[:, None])
        frames = join(linear(s, "to_frames", timesformer(s, "decoder", v)))
        close(output, 2 / (1 + (-frames).exp()) - 1 if squash else frames)


def position(rows, columns, width):
    f = 10000 ** -(torch.arange(width // 4) / (width // 4))
    return torch.stack([torch.cat([(c * f).sin(), (c * f).cos(), (r * f).sin(), (r * f).cos()])
                        for r in range(rows) for c in range(columns)])


def dit(s, names, tokens, t, c, grid):  # tokens (N, 32) -> (3, H, W), read from the first tokens
    t1, t2, mod, qkv, proj, fc1, fc2, last_mod, last = names.split()
    f = 10000 ** -(torch.arange(128) / 128)
    time = torch.cat([(t * f).cos(), (t * f).sin()])
    c = F.silu(linear(s, t2, F.silu(linear(s, t1, time))) + c)
    for b in ("blocks.0.", "blocks.1."):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(s, b + mod, c).chunk(6)
        q, k, v = linear(s, b + qkv, norm({}, "", tokens, 1e-6) * (1 + scale1) + shift1).chunk(3, 1)
        tokens = tokens + gate1 * linear(s, b + proj, attention(q, k, v))
        h = linear(s, b + fc1, norm({}, "", tokens, 1e-6) * (1 + scale2) + shift2)
        tokens = tokens + gate2 * linear(s, b + fc2, F.gelu(h, approximate="tanh"))
    (shift, scale), (rows, columns) = linear(s, last_mod, c).chunk(2), grid
    tokens = linear(s, last, norm({}, "", tokens, 1e-6) * (1 + scale) + shift)[: rows * columns]
    return tokens.view(rows, columns, 2, 2, 3).permute(4, 0, 2, 1, 3).reshape(3, rows * 2, columns * 2)


def test_dit_is_dit():
    model, s = randomised(DiT(channels=3, size=(8, 12), patch=2, width=32, depth=2, heads=2, classes=5))
    names = ("t_embedder.mlp.0 t_embedder.mlp.2 adaLN_modulation.1 attn.qkv attn.proj mlp.fc1 mlp.fc2 "
             "final_layer.adaLN_modulation.1 final_layer.linear")
    x, t, labels = torch.randn(2, 3, 8, 12), torch.tensor([700, 3]), torch.tensor([4, 5])
    for i, ours in enumerate(model(x, t, labels)):
        tokens = linear(s, "x_embedder.proj", patches(x[i], 2).flatten(0, 1)) + position(4, 6, 32)
        close(ours, dit(s, names, tokens, t[i], s["y_embedder.embedding_table.weight"][labels[i]], (4, 6)))


@pytest.mark.parametrize("text", [None, 7])
def test_the_motion_model_is_dit_on_motion_then_content_tokens(text):
    model, s = randomised(MotionDiT(3, 5, 9, 3, (8, 12), 2, 4, 32, 2, 2, 5, text))
    names = "t_embedder.0 t_embedder.2 modulation.1 qkv proj mlp.0 mlp.2 modulation.1 out"
    motion, content, t = torch.randn(2, 3, 5, 9), torch.randn(2, 3, 8, 12), torch.tensor([700, 3])
    condition = torch.randn(2, 7) if text else torch.tensor([4, 5])
    for i, ours in enumerate(model(motion, t, content, condition)):
        z = F.pad(motion[i], (0, 1, 0, 1))  # to whole patches
        tokens = torch.cat([
            linear(s, "motion_embedder", patches(z, 2).flatten(0, 1)) + position(3, 5, 32),
            linear(s, "content_embedder", patches(content[i], 4).flatten(0, 1)) + position(2, 3, 32)])
        c = linear(s, "c_embedder", condition[i]) if text else s["c_embedder.weight"][condition[i]]
        close(ours, dit(s, names, tokens, t[i], c, (3, 5))[:, :5, :9])
