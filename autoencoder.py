"""Stage 1, the autoencoder: a clip becomes one content frame and a small motion latent, and comes back.

Section 3.2 of the paper, equations 3 to 6. In: clips (B, C, L, H, W) in [-1, 1], or their Stable Diffusion latents.
Out: content frames (B, C, H, W), a learned weighted mean of the frames, and motion latents (B, D, L, H'+W') with
H' = H / patch. It ends by encoding the data set into the run folder: that is all that stages 2 and 3 read.

    python autoencoder.py                                            # moving shapes, minutes on a CPU
    python autoencoder.py --preset ucf101 --data UCF-101             # your own folder works as well
    torchrun --nproc-per-node 8 -- autoencoder.py --preset ucf101 --data UCF-101
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -- autoencoder.py ...

Where we differ from the paper: depth 8 and heads of 48, the size that its table 8 reports the cost of (table 5 prints
12 and 64). From the authors' release: positions in both trunks (without them a trunk cannot tell frame 1 from frame 9,
nor left from right), any size and length, no discriminator. What the shapes preset changes stands beside it below.
"""

import _compat_pickle
import argparse
import builtins
import contextlib
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections import OrderedDict
from itertools import islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (
    COUNT,
    SEED,
    BadVideo,
    Flags,
    InputError,
    Log,
    StopSignal,
    at_most_cores,
    autocast,
    average,
    check_config,
    check_finite,
    check_shard,
    last_only,
    learning_rate,
    load_checkpoint,
    open_dataset,
    pair,
    parse_flags,
    quiet_worker,
    run,
    save_checkpoint,
    split_batch,
    start,
    stream,
    weights_hash,
    within,
    write_json,
    write_shard,
    write_sheet,
)

# ---------------------------------------------------------------------------------------------------------------------
# The video autoencoder


class FeedForward(nn.Module):
    """GEGLU: half of the hidden units gate the other half."""

    def __init__(self, width):
        super().__init__()
        self.value = nn.Linear(width, 4 * width)
        self.gate = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.reduce(self.value(x) * F.gelu(self.gate(x)))


def attention_in_parts(q, k, v, axis, heads=65_535, scratch=2**31 - 1):
    """Attention of q, k, v (batch, heads, N, d), split along axis 0 or 1 where it is too much for CUDA's kernels: they
    take 65,535 heads, and index their scratch, N and d rounded up to multiples of 128 and 32, with 31 bits."""
    others, N, d = q.shape[1 - axis], -(-q.shape[2] // 128) * 128, -(-q.shape[3] // 32) * 32
    most = max(1, min(heads, scratch // (others * N * d)))
    parts = [F.scaled_dot_product_attention(*part) for part in zip(*(x.split(most, axis) for x in (q, k, v)))]
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


class Attention(nn.Module):
    """Multi-head self-attention over time (at each location) or over space (in each frame)."""

    def __init__(self, width, heads, over):
        super().__init__()
        self.heads, self.over = heads, over
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, L, N, C = x.shape  # N = H' * W' locations
        # The axis attended over comes next to last, the others become batch and heads. All views, no copies.
        shape = (B, L, N * self.heads, C // self.heads) if self.over == "time" else (B * L, N, self.heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        # Of time: (B, N*heads, L, d), of space: (B*L, heads, N, d)
        x = attention_in_parts(q, k, v, axis=1 if self.over == "time" else 0)
        return self.out(x.transpose(1, 2).reshape(B, L, N, C))


class Block(nn.Module):
    """TimeSformer's divided attention: over time, then over space, then a feed-forward; pre-norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.time_norm, self.time = nn.LayerNorm(width), Attention(width, heads, "time")
        self.space_norm, self.space = nn.LayerNorm(width), Attention(width, heads, "space")
        self.ff_norm, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x):
        x = x + self.time(self.time_norm(x))
        x = x + self.space(self.space_norm(x))
        return x + self.ff(self.ff_norm(x))


class TimeSformer(nn.Module):
    """(B, L, H', W', C') -> the same shape. Learned positions, one table each for time, rows and columns."""

    def __init__(self, frames, grid, width, depth, heads):
        super().__init__()
        self.time_position = nn.Parameter(0.02 * torch.randn(frames, 1, 1, width))
        self.row_position = nn.Parameter(0.02 * torch.randn(grid[0], 1, width))
        self.column_position = nn.Parameter(0.02 * torch.randn(grid[1], width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.checkpointing = False

    def forward(self, x):
        x = x + self.time_position + self.row_position + self.column_position
        shape = x.shape
        x = x.flatten(2, 3)  # (B, L, N, C')
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.norm(x).view(shape)


class Autoencoder(nn.Module):
    """A clip <-> one content frame and one small motion latent (section 3.2, equations 3 to 6, figure 4).

    channels    C of a frame: 3 for pixels, 4 for Stable Diffusion's latents
    frames      L, 1 or more
    size        H and W of a frame, an int or a pair, divisible by `patch`
    width       C', the trunks' width; `heads` heads of width / heads. Table 5 says depth 12 and heads of 64; the cost
                that table 8 reports is that of depth 8 and heads of 48, which are the defaults (47.4 M parameters).
    motion_channels  D of the motion latent
    content     what the content frame is (table 4b): 'weights', learned; 'mean' of the frames; 'frame', the first one
    smooth      False: one weight a pixel, as in the paper. True: one a token, upsampled bilinearly (see `shapes` below)
    squash      True in pixel space: outputs pass 2 * sigmoid - 1
    """

    def __init__(self, channels=4, frames=16, size=64, patch=2, width=384, motion_channels=8, depth=8, heads=8,
                 content="weights", smooth=False, squash=False):
        super().__init__()
        height, wide = pair(size)
        if height % patch or wide % patch:
            raise InputError(f"a frame of {height}x{wide} cannot be cut into patches of {patch}x{patch}: choose a size "
                             f"divisible by {patch}")
        if width % heads:
            raise InputError(f"width {width} cannot be split over {heads} heads")
        self.channels, self.frames, self.size, self.patch = channels, frames, (height, wide), patch
        self.content, self.smooth, self.squash = content, smooth, squash
        self.grid = (height // patch, wide // patch)  # (H', W')
        self.content_shape = (channels, height, wide)
        self.motion_shape = (motion_channels, frames, sum(self.grid))
        pixels = channels * patch**2  # of one patch
        # Linear layers on patches: the same sums as convolutions, plain or transposed, of kernel = stride = patch.
        self.embed = nn.Linear(pixels, width)
        self.encoder = TimeSformer(frames, self.grid, width, depth, heads)
        if content == "weights":
            self.to_logits = nn.Linear(width, channels if smooth else pixels)
        self.to_rows = nn.Linear(width, motion_channels)  # 1x1 convolutions
        self.to_columns = nn.Linear(width, motion_channels)
        self.embed_content = nn.Linear(pixels, width)
        self.embed_rows = nn.Linear(motion_channels, width)
        self.embed_columns = nn.Linear(motion_channels, width)
        self.decoder = TimeSformer(frames, self.grid, width, depth, heads)
        self.to_frames = nn.Linear(width, pixels)
        # Per-channel statistics of the encoded data set: the motion model works on (z - mean) / deviation.
        self.register_buffer("motion_mean", torch.zeros(motion_channels, 1, 1))
        self.register_buffer("motion_std", torch.ones(motion_channels, 1, 1))

    def patches(self, frames):
        return rearrange(frames, "... c (h p) (w q) -> ... h w (c p q)", p=self.patch, q=self.patch)

    def unpatches(self, tokens):
        return rearrange(tokens, "b l h w (c p q) -> b c l (h p) (w q)", p=self.patch, q=self.patch)

    def encode(self, video):
        """video (B, C, L, H, W) -> content (B, C, H, W) within the frames' range, motion (B, D, L, H'+W') in [-1, 1]"""
        if video.shape[1:] != (self.channels, self.frames, *self.size):
            raise InputError(f"this autoencoder takes clips of (channels, frames, height, width) "
                             f"{(self.channels, self.frames, *self.size)}, not {tuple(video.shape[1:])}")
        u = self.encoder(self.embed(self.patches(video.transpose(1, 2))))  # (B, L, H', W', C')
        z_x = self.to_rows(u.mean(3))  # equation 4, the mean over columns: (B, L, H', D)
        z_y = self.to_columns(u.mean(2))  # and over rows: (B, L, W', D)
        motion = torch.cat([z_x, z_y], 2).tanh()  # (B, L, H'+W', D)
        return self.content_frame(video, u), motion.permute(0, 3, 1, 2)

    def content_frame(self, video, u):
        """Equation 3: a weighted mean of the frames, with weights of its own at every pixel. (B, C, H, W)"""
        if self.content == "frame":
            return video[:, :, 0]
        if self.content == "mean":
            return video.mean(2)
        logits = self.to_logits(u)
        if self.smooth:
            logits = rearrange(logits.float(), "b l h w c -> (b l) c h w")
            logits = F.interpolate(logits, self.size, mode="bilinear")
            logits = rearrange(logits, "(b l) c h w -> b c l h w", l=self.frames)
        else:
            logits = self.unpatches(logits)
        return (video * logits.float().softmax(2)).sum(2)

    def decode(self, content, motion):
        """content (B, C, H, W), motion (B, D, L, H'+W') -> video (B, C, L, H, W), within [-1, 1] where `squash`"""
        z_x, z_y = motion.permute(0, 2, 3, 1).split(self.grid, 2)  # (B, L, H', D), (B, L, W', D)
        # Equation 5: v[l, h, w] = content[h, w] + z_x[l, h] + z_y[l, w]
        v = self.embed_content(self.patches(content))[:, None]  # (B, 1, H', W', C')
        v = v + self.embed_rows(z_x)[:, :, :, None] + self.embed_columns(z_y)[:, :, None]  # (B, L, H', W', C')
        video = self.unpatches(self.to_frames(self.decoder(v)))  # Equation 6
        return 2 * video.sigmoid() - 1 if self.squash else video

    def forward(self, video, noise=None):
        """The reconstruction of a clip (B, C, L, H, W). noise: added to the motion latent, for training."""
        content, motion = self.encode(video)
        return self.decode(content, motion if noise is None else motion + noise)

    def normalise(self, motion):
        """Motion latents (B, D, L, H'+W') as the motion model sees them: mean 0 and deviation 1 in every channel."""
        return (motion - self.motion_mean) / self.motion_std

    def denormalise(self, motion):
        """The way back."""
        return motion * self.motion_std + self.motion_mean


# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion's image autoencoder


def image_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)  # the file's; PyTorch's own eps is 1e-5


class ImageResBlock(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1 = image_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = image_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class ImageAttention(nn.Module):
    """One head over all places of a picture, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = image_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # (B, 1, HW, C), contiguous: the fast kernels, which never hold the HW x HW matrix, take nothing else.
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None].contiguous() for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)
        return x + self.proj_out(h)


def named(**layers):
    """Layers one after another, under the raw file's names."""
    return nn.Sequential(OrderedDict(layers))


def image_level(inputs, outputs, blocks):
    """The residual blocks of one resolution."""
    return named(block=nn.Sequential(*(ImageResBlock(outputs if i else inputs, outputs) for i in range(blocks))))


def image_middle(width):
    return named(block_1=ImageResBlock(width, width), attn_1=ImageAttention(width), block_2=ImageResBlock(width, width))


def image_encoder(channels, multipliers, blocks):
    """Images (B, 3, H, W) -> moments of the latents, mean and log variance, (B, 8, H/8, W/8)."""
    widths = [channels * m for m in (1, *multipliers)]
    levels = [image_level(before, width, blocks) for before, width in zip(widths, widths[1:])]
    for level, width in zip(levels[:-1], widths[1:]):  # (H, W) -> (H/2, W/2), padded right and below only
        level.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))
    return named(conv_in=nn.Conv2d(3, channels, 3, padding=1), down=nn.Sequential(*levels),
                 mid=image_middle(widths[-1]), norm_out=image_norm(widths[-1]), act=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[-1], 8, 3, padding=1))


def image_decoder(channels, multipliers, blocks):
    """Latents (B, 4, H/8, W/8) -> images (B, 3, H, W)."""
    widths = [channels * m for m in (*multipliers, multipliers[-1])]
    levels = [image_level(before, width, blocks + 1) for width, before in zip(widths, widths[1:])]
    for level, width in zip(levels[1:], widths[1:]):  # (H, W) -> (2H, 2W)
        level.upsample = named(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(width, width, 3, padding=1))
    up = {str(i): level for i, level in enumerate(levels)}  # counted from the full resolution, run from the last
    return named(conv_in=nn.Conv2d(4, widths[-1], 3, padding=1), mid=image_middle(widths[-1]),
                 up=nn.Sequential(OrderedDict(reversed(up.items()))), norm_out=image_norm(widths[0]), act=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[0], 3, 3, padding=1))


class ImageAutoencoder(nn.Module):
    """Stable Diffusion's image autoencoder (the same in 1.x and 2.x). Its state_dict has the raw file's names.

    It computes in its weights' dtype, takes any and returns float32, `chunk` images at a time, so memory does not grow
    with N. The latents are the posterior's mean.
    """

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), blocks=2):
        super().__init__()
        self.scale = 0.18215  # brings the latents to about unit variance
        self.factor = 2 ** (len(multipliers) - 1)  # pixels per latent, each way
        self.encoder = image_encoder(channels, multipliers, blocks)
        self.decoder = image_decoder(channels, multipliers, blocks)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def encode(self, images, chunk=4):
        """Images (N, 3, H, W) in [-1, 1] -> scaled latents (N, 4, H/8, W/8). H, W not multiples of 8: InputError."""
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise InputError(f"images of {height}x{width}: the image autoencoder needs multiples of {self.factor}")
        images = images.to(self.quant_conv.weight.dtype)
        moments = torch.cat([self.quant_conv(self.encoder(part)) for part in images.split(chunk)])
        return self.scale * moments[:, :4].float()

    def decode(self, latents, chunk=4):
        """Scaled latents (N, 4, H/8, W/8) -> images (N, 3, H, W), about in [-1, 1]."""
        latents = (latents / self.scale).to(self.quant_conv.weight.dtype)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in latents.split(chunk)]).float()


def build_image_autoencoder(tensors, what):
    """An ImageAutoencoder (frozen) with these tensors, which also tell its width. `what` opens the InputError."""
    with torch.device("meta"):
        model = ImageAutoencoder(channels=len(tensors["encoder.conv_in.weight"]))
    load_weights(model, tensors, what)
    return model.eval().requires_grad_(False)


def load_image_autoencoder(path):
    """The ImageAutoencoder (float32, frozen, on the CPU) of a full Stable Diffusion file or its own. Or InputError."""
    tensors = read_checkpoint(path)
    tensors = with_prefix(tensors, "first_stage_model.") or tensors
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # leaves 'loss.' and 'model_ema.' out
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    if "encoder.conv_in.weight" not in own or "encoder.down.0.block.0.conv1.weight" not in own:
        raise InputError(f"{path} holds no Stable Diffusion image autoencoder: {describe(tensors)}")
    for name, tensor in own.items():
        if ".attn_1." in name and tensor.ndim == 2:  # newer files store these 1x1 convolutions as linear layers
            own[name] = tensor[:, :, None, None]
    return build_image_autoencoder(own, f"{path}: the image autoencoder")


def half(module):
    """A frozen module's weights as the run folder keeps them."""
    return {name: tensor.half() for name, tensor in module.state_dict().items()}


def open_image_autoencoder(tensors, device):
    """The frozen ImageAutoencoder with a run's weights, in half precision on a GPU."""
    image = build_image_autoencoder(tensors, "the run's image autoencoder")
    return image.to(device, torch.float16 if device.type == "cuda" else torch.float32,
                    memory_format=torch.channels_last)


def to_frames(video, image):
    """What stage 1 calls frames: pixels, or with `image` their latents. (B, 3, L, H, W) -> (B, 4, L, H/8, W/8)"""
    if image is None:
        return video
    latents = image.encode(rearrange(video, "b c l h w -> (b l) c h w"))
    return rearrange(latents, "(b l) c h w -> b c l h w", b=len(video))


def to_pixels(video, image):
    """The way back, (B, C, L, h, w) -> (B, 3, L, H, W) in [-1, 1]; content frames are clips of one frame."""
    if image is not None:
        pixels = image.decode(rearrange(video, "b c l h w -> (b l) c h w"))
        video = rearrange(pixels, "(b l) c h w -> b c l h w", b=len(video))
    return video.float().clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


class LPIPS(nn.Module):
    """The perceptual distance of Zhang et al. (2018), VGG16 version 0.1, frozen.

    (N, 3, H, W) twice, in [-1, 1], H and W at least 16 -> (N,), 0 for equal images.
    """

    def __init__(self):
        super().__init__()
        layers, inputs = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: halve the size
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            inputs = width or inputs
        self.features = nn.Sequential(*layers)  # numbered as in torchvision's VGG16
        self.lin = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in (64, 128, 256, 512, 512))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def stages(self, x):
        """The five stages' last activations, each place's channel vector brought to length 1."""
        x = (x - self.mean) / self.deviation
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (3, 8, 15, 22, 29):  # the last ReLU before each halving, and the last of all
                y = x.float()
                yield y / (y.square().sum(1, keepdim=True) + 1e-20).sqrt()  # 1e-20: a finite gradient at 0

    def forward(self, images, others):
        if min(images.shape[2:]) < 16:
            raise InputError(f"LPIPS needs images of at least 16x16, not {images.shape[2]}x{images.shape[3]}")
        return sum(lin((a - b).square()).mean((1, 2, 3))
                   for lin, a, b in zip(self.lin, self.stages(images), self.stages(others)))


def load_lpips(vgg_path, lpips_path):
    """LPIPS from torchvision's vgg16-397923af.pth and LPIPS's own vgg.pth (version 0.1). Raises InputError."""
    vgg, own = read_checkpoint(vgg_path), read_checkpoint(lpips_path)
    if "features.0.weight" not in vgg:
        raise InputError(f"{vgg_path} is not torchvision's vgg16-397923af.pth: {describe(vgg)}")
    if "lin0.model.1.weight" not in own:
        raise InputError(f"{lpips_path} is not LPIPS's vgg.pth: {describe(own)}")
    tensors = {name: tensor for name, tensor in vgg.items() if name.startswith("features.")}
    tensors |= {name.replace("lin", "lin.").replace("model.1.", ""): tensor for name, tensor in own.items()}
    model = LPIPS()
    load_weights(model, tensors, f"{vgg_path} and {lpips_path}: LPIPS")
    return model


def reconstruction_loss(again, video, kind, lpips=None, one=None):
    """Mean square ('mse') or absolute ('l1') error between two clips (B, C, L, H, W), a number; with an LPIPS, plus the
    perceptual distance in one frame of each clip, number one[b], as appendix B has it."""
    error = again.float() - video
    loss = error.square().mean() if kind == "mse" else error.abs().mean()
    if lpips:
        frame = torch.arange(len(video), device=video.device), slice(None), one
        loss = loss + lpips(again[frame].float(), video[frame]).mean()
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Reading raw checkpoints
#
# torch.load would not do: weights_only=True refuses Stable Diffusion's .ckpt, which has Lightning's objects beside the
# weights, and with an unpickler of ours it still runs TorchScript and writes the patch files of its old source check.

# What no file of weights needs: one that names it is refused aloud, though nothing that a file names is ever called.
ATTACKS = set("os posix nt subprocess sys runpy importlib shutil socket pickle _pickle ctypes pty".split())
STORAGES = dict(Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16,
                Long=torch.int64, Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8,
                Bool=torch.bool, Untyped=torch.uint8)


class Inert(dict):
    """Stands for an object of any class in a pickle: takes every call, keeps dictionary items, does nothing else."""

    def ignore(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    __init__ = __setstate__ = append = extend = add = ignore
    __hash__, __eq__ = object.__hash__, object.__eq__  # Lightning uses classes' instances as keys


class TensorUnpickler(pickle.Unpickler):
    """Reads a pickle of tensors without importing or running anything that it names: only tensors, their storages and
    OrderedDict are built, all else is Inert. storage(dtype, key, ...) gives a storage's data as a flat tensor."""

    def __init__(self, file, storage):
        super().__init__(file, encoding="latin1")
        self.storage = storage

    def persistent_load(self, key):
        return self.storage(*key[1:])

    def find_class(self, module, name):
        names, modules = _compat_pickle.NAME_MAPPING, _compat_pickle.IMPORT_MAPPING  # Python 2's names
        module, name = names.get((module, name), (modules.get(module, module), name))
        full = f"{module}.{name}"
        if (ATTACKS.intersection(full.split(".")[:-1]) or full == "io.open"
                or module == "builtins" and not isinstance(getattr(builtins, name, None), type)):
            raise InputError(f"is refused: reading it as its author meant would call {full}, so it is not only weights."
                             " Nothing of it was run; get the file from its original place")
        if module.startswith("torch") and name.removesuffix("Storage") in STORAGES:
            return STORAGES[name.removesuffix("Storage")]
        # A new function each time, so that a pickle that sets attributes on it reaches nobody else.
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return lambda data, offset, size, stride, *_: data.as_strided(size, stride, data.storage_offset() + offset)
        if full in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return lambda data, *_: data
        if full == "torch._tensor._rebuild_from_type_v2":
            return lambda function, kind, args, state: function(*args)
        return OrderedDict if full == "collections.OrderedDict" else type(name, (Inert,), {})


def read_zip(file):
    """PyTorch's zip format (1.6 and later). Tensors are views of the mapped file: nothing is read before it is used."""
    archive = zipfile.ZipFile(file)
    entries = {name.split("/", 1)[-1]: name for name in archive.namelist()}
    if "constants.pkl" in entries:
        raise InputError("is a TorchScript program, not weights: save its state_dict() with torch.save instead")
    if "data.pkl" not in entries:
        raise InputError(f"is a zip archive of something else than weights (it holds {archive.namelist()[0]})")
    mapped = torch.from_file(file.name, size=os.path.getsize(file.name), dtype=torch.uint8)  # private: copied on write

    def storage(dtype, key, location, count):
        entry = archive.getinfo(entries[f"data/{key}"])
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < count * dtype.itemsize:
            raise ValueError(f"storage {key} is compressed or too short")
        file.seek(entry.header_offset + 26)  # where the lengths of the two fields before the data stand
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        return mapped[begin : begin + count * dtype.itemsize].view(dtype)

    return TensorUnpickler(archive.open(entries["data.pkl"]), storage).load()


def read_legacy(file):
    """PyTorch's format before 1.6: pickles one after another, then the storages' bytes, in a list of keys' order."""
    storages = {}

    def storage(dtype, key, location, count, view=None):
        if key not in storages:
            storages[key] = torch.empty(count, dtype=dtype)  # filled below
        return storages[key] if view is None else storages[key][view[1] : view[1] + view[2]]

    def load():
        return TensorUnpickler(file, storage).load()

    if load() != 0x1950A86A20F9469CFC6C:
        raise InputError("is a pickle, but not one that PyTorch wrote: save tensors with torch.save")
    _version, _system, tree, keys = load(), load(), load(), load()
    for key in keys:
        file.seek(8, os.SEEK_CUR)  # the number of elements, known already
        data = storages[key].view(torch.uint8).numpy()
        if file.readinto(data) < len(data):
            raise EOFError(f"storage {key} is too short")
    return tree


def read_tree(file):
    """What a file of weights holds, as nested dictionaries; its format is told by its first bytes."""
    head = file.read(512)
    file.seek(0)
    if head[8:9] == b"{":
        with safe_open(file.name, framework="pt") as tensors:
            return (tensors.metadata() or {}) | {name: tensors.get_tensor(name) for name in tensors.keys()}
    if head.startswith(b"PK\3\4"):
        return read_zip(file)
    if head.startswith(b"\x80"):
        return read_legacy(file)
    if not head:
        raise InputError("is empty: download it again")
    if head.lstrip().startswith(b"<"):
        raise InputError("is a web page, not weights: its download was refused or needs a login")
    if head.startswith(b"version https://git-lfs"):
        raise InputError("is a Git LFS pointer, not the weights: fetch them with 'git lfs pull'")
    raise InputError(f"is neither .safetensors nor a PyTorch checkpoint (it starts {head[:12]!r})")


def find_tensors(tree):
    """The dictionary of tensors in what a checkpoint holds, without the levels that training programs put around it."""
    if not isinstance(tree, dict):
        return {}
    for key in ("state_dict", "ema", "model", "module", "params"):
        if inner := find_tensors(tree.get(key)):
            return inner
    return {name: tensor.detach() for name, tensor in tree.items()
            if isinstance(name, str) and isinstance(tensor, torch.Tensor)}


def find_hints(tree, prefix=""):
    """The strings in nested dictionaries, by dotted name: hyper-parameters, for the most part."""
    hints = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, str):
            hints[f"{prefix}{key}"] = value
        hints |= find_hints(value, f"{prefix}{key}.")
    return hints


def read_checkpoint(path, hints=None):
    """Raw weights: .safetensors, or PyTorch's .ckpt / .pt / .pth in its zip or old format, told apart by content.

    Returns {name: tensor} on the CPU, in the file's dtype; most are views of the mapped file, so copy what you keep.
    Nothing in the file is ever run or imported: what is no tensor (Lightning's objects, optimizers) is dropped, and so
    are the levels around the tensors ('state_dict', 'ema' before 'model' and the like). `hints`, a dictionary, receives
    the strings beside them: a safetensors file's metadata, a pickle's hyper-parameters. Raises InputError for anything
    else than weights, a damaged file, and one that tries to run code.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is a folder, not weights" if os.path.isdir(path) else f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            tree = read_tree(file)
        tensors = find_tensors(tree)
        if hints is not None:
            hints |= find_hints(tree)
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path} is cut short or damaged: download it again, and compare its size with the"
                         f" original's ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None
    for wrapper in ("module.", "_orig_mod."):  # DistributedDataParallel's and torch.compile's
        if all(name.startswith(wrapper) for name in tensors):
            tensors = with_prefix(tensors, wrapper)
    if not tensors:
        raise InputError(f"{path} holds no tensors by name: save a state_dict(), not a whole model, with torch.save")
    return tensors


def with_prefix(tensors, prefix):
    """The tensors whose names start with `prefix`, under their names without it."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def describe(tensors):
    """What a file seems to be, from its tensors' names: for the error when it is not what was asked for."""
    kinds = {"lora_": "a LoRA, which is a change to a model and not a model", "control": "a ControlNet",
             "conditioner.embedders.": "SDXL", "label_emb.": "SDXL", "joint_blocks.": "SD 3", "double_blocks.": "Flux",
             "down_blocks.": "in diffusers' format; the single original file is needed",
             "transformer_blocks.": "a Stable Diffusion U-Net", "encoder.down.": "Stable Diffusion's image autoencoder",
             "visual.": "a whole CLIP", "text_model.": "a CLIP text encoder", "resblocks.": "a CLIP text encoder",
             "y_embedder.": "a DiT", "features.0.weight": "torchvision's VGG", "lin0.model.1.": "LPIPS's own layer"}
    for part, kind in kinds.items():
        if found := [name for name in tensors if part in name]:
            return f"it seems to be {kind} ({found[0]})"
    return f"it holds {len(tensors)} tensors, the first named {', '.join(list(tensors)[:3])}"


def load_weights(module, tensors, what):
    """Loads {name: tensor} into a module, which may be on the meta device, in its dtype. Raises InputError that names,
    after `what`, the missing, unexpected and misshaped tensors."""
    own = module.state_dict()
    faults = {
        "missing": [name for name in own if name not in tensors],
        "not part of it": [name for name in tensors if name not in own],
        "of another shape": [f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
                             for name in own if name in tensors and tensors[name].shape != own[name].shape]}
    faults = [f"{len(names)} tensors {fault} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
              for fault, names in faults.items() if names]
    if faults:
        raise InputError(f"{what}: {'; '.join(faults)}")
    if any(tensor.is_meta for tensor in own.values()):  # copies, so that the file may go while the model trains
        module.load_state_dict({name: tensors[name].to(own[name].dtype, copy=True) for name in own}, assign=True)
    else:
        module.load_state_dict(tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Presets and flags

PAPER = dict(  # table 5 and appendix B
    frames=16, patch=2, width=384, motion_channels=8, depth=8, heads=8, smooth=False, noise=0.0, lr=1e-5,
    betas=[0.5, 0.9], batch_size=24, steps=500_000, decay_steps=0, clips=0, save_every=2000, preview_every=2000,
    log_every=50, workers=8,
)
PRESETS = {
    # Embedded data, minutes on a CPU. Against the paper: a tenth of the width; one content weight a token, upsampled,
    # because with one a pixel so small a model hides information in the content frame as a fine periodic pattern, which
    # the content model then fails to draw; noise on the motion latent, so that the decoder forgives the motion model's
    # small errors; MSE, a higher learning rate that decays, and Adam's usual first beta, because the run is short.
    "shapes": dict(
        data="shapes", size=[32], frames=16, channels=3, patch=4, width=64, motion_channels=8, depth=2, heads=4,
        smooth=True, noise=0.1, loss="mse", lr=2e-3, betas=[0.9, 0.99], batch_size=4, steps=1400, decay_steps=1400,
        clips=4000, save_every=500, preview_every=1000, log_every=50, workers=0,
    ),
    "ucf101": dict(PAPER, size=[64], channels=3, loss="l1"),  # LPIPS joins where its two weight files are named
    "webvid_sd15": dict(PAPER, size=[512], channels=4, loss="mse"),
    "webvid_sd21": dict(PAPER, size=[512, 1024], channels=4, loss="mse"),
}


def flags():
    parser = Flags(__doc__.split("\n")[0])
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, help="fills every default below (default: the run's, else shapes)")
    add("--run", help="run folder (default: runs/PRESET)")
    add("--resume", action="store_true", help="go on from the run folder's checkpoint")
    add("--encode", action="store_true", help="train no further: only encode the data set")
    add("--seed", type=SEED, default=0, help="of the weights, the clips, their order and the noise")
    add("--workers", type=within(0), help="loader processes on each rank, at most one a core")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="'shapes', a folder of videos, a CSV of captions, or a folder of .tar shards")
    add("--captions", help="CSV whose paths start from --data: WebVid's columns, or path,caption")
    add("--split", help="UCF-101 list of the videos to use, such as trainlist01.txt")
    add("--size", type=COUNT, nargs="+", help="pixels: one number, or height and width")
    add("--frames", type=COUNT, help="L, frames a clip (table 4b: 16 or 24)")
    add("--stride", type=COUNT, default=1, help="take every n-th frame of the video")
    add = parser.add_argument_group("model (table 5)").add_argument
    add("--sd", help="raw Stable Diffusion or image autoencoder file: clips become its latents")
    add("--patch", type=COUNT, help="side of a patch, in pixels or latents")
    add("--width", type=COUNT, help="C', width of the trunks")
    add("--motion-channels", type=COUNT, help="D (table 4b: 8 or 16)")
    add("--depth", type=COUNT, help="blocks in each trunk")
    add("--heads", type=COUNT, help="attention heads, each width / heads wide")
    add("--content", choices=["weights", "mean", "frame"], default="weights",
        help="the content frame: learned weights, plain mean (table 4b), or the first frame")
    add("--smooth", action=argparse.BooleanOptionalAction, help="content weights a token, not a pixel")
    add = training_flags(parser)
    add("--loss", choices=["mse", "l1"], help="squared or absolute error of the frames")
    add("--lpips", nargs=2, metavar=("VGG", "LPIPS"), help="vgg16-397923af.pth and LPIPS's vgg.pth: adds LPIPS of one "
        "random frame a clip to the loss (pixels only)")
    add("--noise", type=within(0, kind=float), help="deviation of the noise on the motion latent")
    add = parser.add_argument_group("encoding").add_argument
    add("--clips", type=within(0), help="clips to encode; 0: one of every video")
    add("--clips-per-video", type=COUNT, default=1, help="random starts of each video")
    add("--shard-size", type=COUNT, default=1024, help="clips a shard")
    return parser


def training_flags(parser):
    """Adds the flags that all three stages train with; returns what adds further ones to their group."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=COUNT, help="steps in all")
    add("--batch-size", type=COUNT, help="clips a step, over all ranks")
    add("--accumulate", type=COUNT, default=1, help="split each rank's batch into so many passes")
    add("--lr", type=within(0, kind=float), help="Adam's learning rate")
    add("--decay-steps", type=within(0), help="short rise, cosine decay of the rate by this step; 0 keeps it constant")
    add("--clip", type=within(0, kind=float), default=1.0, help="largest gradient norm")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the model's arithmetic, not of its weights (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpointing", action="store_true", help="less memory, a third more time")
    add("--log-every", type=COUNT, help="steps between rows of the log")
    add("--save-every", type=COUNT, help="steps between checkpoints")
    add("--preview-every", type=COUNT, help="steps between pictures in previews/")
    return add


# ---------------------------------------------------------------------------------------------------------------------
# Encoding the data set


class Readable(torch.utils.data.Dataset):
    """Batches without their broken clips, in whose place training reads others."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, keys):
        items = []
        for key in keys:
            with contextlib.suppress(BadVideo):
                items.append(self.dataset.read(*key))
        return items


def encode_shard(args, batches, model, image, device, stop):
    """One shard, as write_shard takes it, from lists of items. None where `stop` was asked for: half a shard is none.

    Its `sums` are those of the motion latents and of their squares, by channel.
    """
    latents, records = [[np.zeros((0, *shape), np.float16) for shape in (model.content_shape, model.motion_shape)]], []
    for items in filter(None, batches):
        if stop.asked:
            return None
        # Not under autocast: Stable Diffusion's latents as precise as those it was trained on.
        frames = to_frames(torch.stack([item["video"] for item in items]).to(device), image)
        with autocast(args, device):
            latents.append([latent.half().cpu().numpy() for latent in model.encode(frames)])
        records += [dict(label=item["label"], caption=item["caption"]) for item in items]
    content, motion = (np.concatenate(parts) for parts in zip(*latents))
    sums = [(motion.astype(np.float64) ** power).sum((0, 2, 3)).tolist() for power in (1, 2)]
    return dict(content=content, motion=motion, records=records, sums=sums)


@torch.no_grad()
def encode_dataset(args, model, image, dataset, indices, rank, world, device, stop):
    """Encodes the data set into the run folder's shards and measures the motion latents' mean and deviation.

    Shard k belongs to rank k mod world and does not depend on their number; one that is there already is kept, so an
    interrupted encoding goes on where it stopped. Returns the weights' hash, or None where `stop` was asked for.
    """
    folder = os.path.join(args.run, "encodings")
    index_path = os.path.join(folder, "index.json")
    indices = range(args.clips) if indices is None else indices[: args.clips or None]
    keys = [(int(index), draw) for index in indices for draw in range(args.clips_per_video)]
    shards = [keys[i : i + args.shard_size] for i in range(0, len(keys), args.shard_size)]
    paths = [os.path.join(folder, f"shard-{number:05d}") for number in range(len(shards))]
    index = dict(complete=False, fingerprint=weights_hash(dict(model.named_parameters())), keys=len(keys),
                 shards=len(shards), classes=dataset.classes)
    for name in ("preset", "data", "shard_size", "stride", "seed", "clips_per_video", "split", "captions"):
        index[name] = getattr(args, name)
    if rank == 0:
        old = index
        with contextlib.suppress(OSError, ValueError), open(index_path) as file:
            old = json.load(file)
        if any(old.get(name) != index[name] for name in index if name != "complete"):
            print(f"{folder} holds encodings by other weights or settings: they are replaced")
            shutil.rmtree(folder)
        os.makedirs(folder, exist_ok=True)
        write_json(index_path, index)
    if world > 1:
        torch.distributed.barrier()

    # Batches in the order of the shards, none across two of them, none larger than training's, which fit.
    size = max(1, min(args.batch_size // world, 32))
    todo = {number: [shards[number][i : i + size] for i in range(0, len(shards[number]), size)]
            for number in range(rank, len(shards), world) if not os.path.isdir(paths[number])}
    loader = torch.utils.data.DataLoader(
        Readable(dataset), batch_sampler=[batch for batches in todo.values() for batch in batches],
        num_workers=at_most_cores(args.workers), collate_fn=list, worker_init_fn=quiet_worker)
    model.eval()
    with tqdm(loader, desc="encode", unit="batch", disable=rank > 0) as bar:
        batches = iter(bar)
        for first in range(0, len(shards), world):  # in rounds, so that a signal stops all ranks after the same one
            number = first + rank
            if number in todo:
                shard = encode_shard(args, islice(batches, len(todo[number])), model, image, device, stop)
                if shard:
                    write_shard(folder, number, **shard)
            if stop:
                if rank == 0:
                    bar.write("stopped while encoding: --encode goes on after the shards that are written")
                return None

    infos = [check_shard(path, checksums=False) for path in paths]
    clips = sum(info["clips"] for info in infos)
    if not clips:
        raise InputError(f"not one clip of {args.data} could be encoded")
    mean, square = np.sum([info["sums"] for info in infos], 0) / (clips * model.frames * sum(model.grid))
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    model.motion_mean.copy_(torch.tensor(mean)[:, None, None])
    model.motion_std.copy_(torch.tensor(std)[:, None, None])
    if rank == 0:
        index |= dict(complete=True, clips=clips, left_out=len(keys) - clips, content=model.content_shape,
                      motion=model.motion_shape, motion_mean=mean.tolist(), motion_std=std.tolist())
        write_json(index_path, index)
        left = f", {len(keys) - clips} unreadable left out" if clips < len(keys) else ""
        print(f"encoded {clips} clips into {folder}{left}")
    return index["fingerprint"]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def check_flags(args, resuming):
    """Raises InputError for flags that do not fit together."""
    if len(args.size) > 2:
        raise InputError("--size takes one number, or height and width")
    if not args.data:
        raise InputError(f"--preset {args.preset} needs --data: a folder of videos or a CSV of captions")
    if args.channels == 3:
        if args.sd:
            raise InputError(f"--preset {args.preset} works on pixels: drop --sd, or take --preset webvid_sd15")
        return
    if args.lpips:
        raise InputError(f"--lpips compares pixels, and --preset {args.preset} works on latents: drop it")
    if not args.sd and not resuming:
        raise InputError(f"--preset {args.preset} needs --sd: a raw Stable Diffusion or image autoencoder file")
    if any(n % (8 * args.patch) for n in args.size):
        raise InputError(f"--size {' '.join(map(str, args.size))}: height and width must be multiples of "
                         f"{8 * args.patch}, the image autoencoder's 8 times the patch")


def load_autoencoder(run_folder, device):
    """(Autoencoder, ImageAutoencoder or None where frames are pixels, checkpoint) of a run folder, ready for use."""
    state = load_checkpoint(os.path.join(run_folder, "autoencoder.pt"), "autoencoder")
    model = Autoencoder(**state["config"])
    model.load_state_dict(state["model"])
    image = state["image_autoencoder"] and open_image_autoencoder(state["image_autoencoder"], device)
    return model.requires_grad_(False).eval().to(device), image, state


def psnr(a, b):
    """Mean over clips of the PSNR in dB, for values in [-1, 1]."""
    return (10 * torch.log10(4 / (a - b).float().square().flatten(1).mean(1).clamp_min(1e-12))).mean().item()


@torch.no_grad()
def evaluate(model, image, dataset, indices, picture):
    """PSNR in dB of the reconstruction and of repeating the mean frame; writes input, content, reconstruction."""
    model.eval()
    ours, mean, rows = [], [], []
    for index in indices:
        video = dataset[int(index)]["video"][None].to(model.motion_mean.device)
        content, motion = model.encode(to_frames(video, image))
        again = to_pixels(model.decode(content, motion), image)
        ours.append(psnr(again, video))
        mean.append(psnr(video.mean(2, keepdim=True).expand_as(video), video))
        if len(rows) < 8:  # every fourth frame
            still = to_pixels(content[:, :, None], image)
            rows.append(torch.cat([video[0, :, ::4], still[0], again[0, :, ::4]], 1).cpu())  # (3, frames, H, W)
    write_sheet(picture, rows, columns=1, frames=rows[0].shape[1])
    model.train()
    return float(np.mean(ours)), float(np.mean(mean))


def main():
    args, saved = parse_flags(flags(), PRESETS, "autoencoder")
    rank, world, device = start(args.seed)
    share, parts = split_batch(args, world)
    path = os.path.join(args.run, "autoencoder.pt")
    check_flags(args, saved)
    size = pair(args.size)

    # Model
    image_state = saved and saved["image_autoencoder"]
    if args.sd and not saved:
        image_state = half(load_image_autoencoder(args.sd))
    image = image_state and open_image_autoencoder(image_state, device)
    config = dict(channels=args.channels, frames=args.frames, size=[n // 8 for n in size] if image else list(size),
                  patch=args.patch, width=args.width, motion_channels=args.motion_channels, depth=args.depth,
                  heads=args.heads, content=args.content, smooth=args.smooth, squash=image is None)
    if saved:
        check_config(config, saved, path)
    model = Autoencoder(**config).to(device)
    model.encoder.checkpointing = model.decoder.checkpointing = args.checkpointing
    lpips = load_lpips(*args.lpips).to(device) if args.lpips else None
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=args.lr, betas=args.betas, fused=True)
    first, loss_sum, bad_row, skipped = 0, *torch.zeros(3, device=device)  # skipped steps: in a row, and in all
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, (loss_sum, bad_row, skipped) = saved["step"], saved["counts"].to(device)
    reconstruct = torch.compile(model) if args.compile else model
    if world > 1:
        reconstruct = DistributedDataParallel(reconstruct, gradient_as_bucket_view=True)

    # Data
    dataset, indices, test_set, test = open_dataset(args.data, args.frames, size, args.stride, args.split,
                                                    args.captions, args.seed)
    batches = stream(dataset, args.batch_size, args.seed, first, args.workers, rank, world, indices)
    mine = slice(rank * share, (rank + 1) * share)  # this rank's rows of the whole batch

    def save(step, fingerprint=None):
        save_checkpoint(path, dict(
            stage="autoencoder", step=step, args=vars(args), config=config, classes=dataset.classes,
            fingerprint=fingerprint, model=model.state_dict(), optimizer=optimizer.state_dict(),
            counts=torch.stack([loss_sum, bad_row, skipped]), image_autoencoder=image_state))

    previews = os.path.join(args.run, "previews")
    os.makedirs(previews, exist_ok=True)
    log = rank == 0 and Log(os.path.join(args.run, "autoencoder.csv"),
                            "step loss lr grad_norm skipped clips_per_second psnr psnr_of_mean_frame".split(), first,
                            (args.log_every, args.preview_every))
    stop, generator = StopSignal(), torch.Generator(device)
    last = first if args.encode else max(first, args.steps)
    if rank == 0:
        print(f"autoencoder: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, steps {first} to {last}, "
              f"{args.run}")
    bar = tqdm(range(first, last), initial=first, total=last, desc="autoencoder", disable=rank > 0)
    since, clock = first, time.perf_counter()
    for step in bar:
        # The draws of step s are a function of (seed, s), made for the whole batch, of which each rank takes its rows:
        # so a resumed run, or one on more ranks, sees the same noise. Seeds are about a million steps apart.
        video = to_frames(next(batches)["video"].to(device, non_blocking=True), image)
        generator.manual_seed(args.seed * 1_000_003 + step)
        noise = args.noise * torch.randn(args.batch_size, *model.motion_shape, generator=generator, device=device)[mine]
        one = torch.randint(args.frames, (args.batch_size,), generator=generator, device=device)[mine]  # for LPIPS

        optimizer.param_groups[0]["lr"] = lr = learning_rate(args, step)
        for part in parts:
            with last_only(reconstruct, part, parts):
                with autocast(args, device):
                    again = reconstruct(video[part], noise[part])
                loss = reconstruction_loss(again, video[part], args.loss, lpips, one[part])
                (loss / len(parts)).backward()
            loss_sum += loss.detach().nan_to_num(0, 0, 0) / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip)
        bad = ~norm.isfinite()  # NaN or infinite somewhere: fused Adam skips the step where found_inf is 1,
        optimizer.found_inf = bad.float()  # so that the device need not be asked
        optimizer.step()
        optimizer.zero_grad()
        bad_row, skipped = (bad_row + 1) * bad, skipped + bad

        # The rest is logging, pictures, saving.
        done, stopping = step + 1, bool(stop)
        saving = done % args.save_every == 0 or done == last or stopping
        logging = done % args.log_every == 0 or done == last
        row = dict(step=done, lr=lr)
        if saving or logging:
            loss_sum = average(loss_sum)
        if logging:
            row |= dict(loss=loss_sum.item() / (done % args.log_every or args.log_every), grad_norm=norm.item(),
                        skipped=int(skipped),
                        clips_per_second=(done - since) * args.batch_size / (time.perf_counter() - clock))
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['clips_per_second']:.1f} clips/s")
            check_finite(bad_row, done, path)
        if rank == 0 and (done % args.preview_every == 0 or done == last):
            row["psnr"], row["psnr_of_mean_frame"] = evaluate(
                model, image, test_set, test[: 240 if done == last else 32], f"{previews}/autoencoder-{done:06d}.png")
            bar.write(f"step {done}: PSNR {row['psnr']:.1f} dB on test clips, repeating the mean frame "
                      f"{row['psnr_of_mean_frame']:.1f} dB")
        if rank == 0 and (logging or "psnr" in row):
            log(**row)
        if done % args.log_every == 0:
            loss_sum = torch.zeros_like(loss_sum)
            since, clock = done, time.perf_counter()
        if rank == 0 and saving:
            save(done)
        if stopping:
            bar.close()
            if rank == 0:
                print(f"stopped after step {done}, saved: --resume goes on")
            return
    fingerprint = encode_dataset(args, model, image, dataset, indices, rank, world, device, stop)
    if rank == 0 and fingerprint:
        save(last, fingerprint)


if __name__ == "__main__":
    run(main)
