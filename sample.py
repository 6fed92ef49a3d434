"""Sampling: noise -> content frame -> motion latent -> clip. Algorithm 1 and appendix B.4 of the paper.

Reads the three checkpoints of a run folder and nothing else. Writes one .mp4 a clip, captions.txt with a line a clip,
and for people to look at samples.gif and samples.png.

    python sample.py                                                 # two clips of each class of runs/shapes
    python sample.py --run runs/ucf101 --label Archery --num 4
    python sample.py --run runs/webvid_sd21 --prompt "a ship in a storm, oil painting" --guidance 8.5
    python sample.py --run runs/webvid_sd21 --prompt "waves" --image photo.jpg       # animate a picture
    python sample.py --run runs/ucf101 --reconstruct --num 2048      # table 4a: real/ and fake/ for fvd.py

A guidance scale s means eps = s eps(c) + (1 - s) eps(nothing): the paper's w is s - 1, and s = 1 is no guidance.
"""

import concurrent.futures
import copy
import os
import resource
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from autoencoder import load_autoencoder, to_frames, to_pixels
from content_diffusion import Diffusion, TextEncoder, build_content_model
from data import (
    COUNT,
    SEED,
    Flags,
    InputError,
    chosen_dtype,
    load_checkpoint,
    open_dataset,
    pair,
    run,
    say,
    start,
    tile,
    within,
    write_sheet,
    write_video,
)
from motion_diffusion import build_motion_model, text_features

# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def timesteps(steps):
    """A list of `steps` timesteps, 1 to 1000 of them (else InputError), evenly from 999 down to 0."""
    if not 1 <= steps <= 1000:
        raise InputError(f"{steps} steps: choose 1 to 1000")
    return torch.linspace(999, 0, steps).round().long().tolist()


def ddim(denoise, x, diffusion, steps=50, eta=0.0, generators=None, bounds=None, progress=iter):
    """DDIM (Song et al. 2021, equation 12) from noise x (B, ...) to a clean sample of the same shape.

    denoise(x_t, t) returns what the model predicts for timesteps t (B,). eta 0 is deterministic, 1 is ancestral; its
    noise comes from `generators`, one a sample. bounds: (low, high) that the clean x is known to lie in. progress wraps
    the list of steps, as tqdm does.
    """
    times = timesteps(steps)
    abars = diffusion.abar[times]
    for time, abar, after in progress(list(zip(times, abars, [*abars[1:], torch.ones_like(abars[0])]))):
        t = torch.full((len(x),), time, device=x.device)
        x0, eps = diffusion.split(denoise(x, t), x, t)
        if bounds is not None:
            x0 = x0.clamp(*bounds)
            eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        sigma = eta * ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()  # 0 in the last step
        x = after.sqrt() * x0 + (1 - after - sigma**2).clamp_min(0).sqrt() * eps
        if eta:
            x = x + sigma * gaussian(generators, x)
    return x


def dpm(denoise, x, diffusion, steps=20, eta=0.0, generators=None, bounds=None, progress=iter):
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order in the log signal-to-noise ratio, one call a step.

    The same arguments as ddim, but eta is not used: it is deterministic. Its timesteps are even in that ratio, not in
    t: even in t, its last step would span half of the ratio's range and spoil the rest.
    """
    ratio = 0.5 * torch.logit(diffusion.abar)  # lambda_t = log(sqrt(abar) / sqrt(1 - abar))
    even = torch.linspace(ratio[999], ratio[0], len(timesteps(steps)), device=ratio.device)
    times = sorted({(ratio - value).abs().argmin().item() for value in even}, reverse=True)
    following = dict(zip(times, times[1:]))
    x0_before = h_before = None
    for time in progress(times):
        t = torch.full((len(x),), time, device=x.device)
        x0, _ = diffusion.split(denoise(x, t), x, t)
        if bounds is not None:
            x0 = x0.clamp(*bounds)
        if time not in following:
            return x0
        abar, after = diffusion.abar[time], diffusion.abar[following[time]]
        h = ratio[following[time]] - ratio[time]
        mean = x0
        if x0_before is not None:
            mean = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = ((1 - after) / (1 - abar)).sqrt() * x - after.sqrt() * torch.expm1(-h) * mean
        x0_before, h_before = x0, h
    return x


SAMPLERS = {"ddim": ddim, "dpm++": dpm}


def guided(predict, condition, nothing, scale):
    """denoise(x_t, t) with classifier-free guidance, both branches in one batch. predict(x, t, condition)."""
    if scale == 1:
        return lambda x, t: predict(x, t, condition)
    both = torch.cat([condition, nothing])

    def denoise(x, t):
        with_, without = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (with_ - without)

    return denoise


def gaussian(generators, like):
    """Noise of the shape of `like`, each sample's from its own CPU generator: the same in any batch, on any device."""
    return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators]).to(like.device)


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


class Sampler:
    """The three trained stages of a run folder, those that args ask for. Raises InputError where one is missing."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.dtype = chosen_dtype(args, device)
        self.autoencoder, self.image, self.state = load_autoencoder(args.run, device)
        self.sampler = SAMPLERS[args.sampler]
        if args.compile:
            self.compile_decoders()
        needs_motion = not args.reconstruct
        needs_content = needs_motion and not args.predict_motion and not args.image
        self.content = self.load("content", build_content_model) if needs_content else None
        self.motion = self.load("motion", build_motion_model) if needs_motion else None

    def load(self, stage, build):
        state = load_checkpoint(os.path.join(self.args.run, f"{stage}.pt"), stage)
        if state["fingerprint"] != self.state["fingerprint"]:
            raise InputError(f"{self.args.run}/{stage}.pt was trained on the encodings of another autoencoder than "
                             f"{self.args.run}/autoencoder.pt: train it anew in another --run")
        diffusion = Diffusion(state["args"]["schedule"], state["args"]["predict"])
        return self.prepare(*build(state), diffusion, state["shape"])

    def compile_decoders(self):
        for module in (self.autoencoder, self.image):
            if module:
                module.decoder.compile(dynamic=False)

    def prepare(self, model, text_encoder, diffusion, shape):
        """A stage's parts, on the device and ready to be called."""
        model = model.requires_grad_(False).eval().to(self.device, self.dtype)
        if text_encoder:
            text_encoder.to(self.device, torch.float16 if self.device.type == "cuda" else torch.float32)
        # CUDA graphs write each result over the one before: predict() copies it out before the next call.
        call = torch.compile(model, mode="reduce-overhead", dynamic=False) if self.args.compile else model
        return SimpleNamespace(model=model, call=call, text=text_encoder, diffusion=diffusion.to(self.device),
                               shape=shape, cache={})

    def condition(self, stage, wishes, features):
        """(conditions, those that stand for nothing) of a batch of wishes: labels, or prompts, which features(text
        encoder, prompts) turns into what the model takes."""
        if stage.text is None:
            labels = torch.tensor(wishes, device=self.device)
            return labels, torch.full_like(labels, stage.model.classes)
        new = [text for text in dict.fromkeys([*wishes, self.args.negative_prompt]) if text not in stage.cache]
        if new:  # each distinct prompt is encoded once
            stage.cache |= dict(zip(new, features(stage.text, new).to(self.dtype)))
        rows = [stage.cache[text] for text in wishes]
        return torch.stack(rows), torch.stack([stage.cache[self.args.negative_prompt]] * len(rows))

    def progress(self, name):
        return lambda times: tqdm(times, desc=name, leave=False, disable=None)

    def draw(self, stage, name, predict, conditions, scale, steps, seeds, bounds):
        """Noise, each clip's from a seed of its own, to clean samples (B, ...) by the chosen sampler, with guidance."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = gaussian(generators, torch.empty(len(seeds), *stage.shape, device=self.device))
        return self.sampler(guided(predict, *conditions, scale), noise, stage.diffusion, steps, self.args.eta,
                            generators, bounds, self.progress(name))

    def draw_content(self, wishes, numbers):
        """Content frames (B, C, H, W) for a batch of labels or prompts. numbers: the clips', which seed their noise."""
        stage, args = self.content, self.args

        def predict(x, t, condition):
            return stage.call(x.to(self.dtype), t, condition).to(torch.float32, copy=True)

        conditions = self.condition(stage, wishes, TextEncoder.encode)
        seeds = [2 * (args.seed * 1_000_003 + n) for n in numbers]  # the odd ones are the motion's
        bounds = None if self.image else (-1, 1)  # a mean of pixels is in their range; latents have none
        return self.draw(stage, "content", predict, conditions, args.guidance, args.steps, seeds, bounds)

    def draw_motion(self, content, wishes, numbers):
        """Motion latents (B, D, L, H'+W'), as the decoder takes them, for content frames and labels or prompts."""
        stage, args = self.motion, self.args
        frame = content.to(self.dtype)

        def predict(x, t, condition):  # the content frame stays in both branches
            frames = torch.cat([frame] * (len(x) // len(frame)))
            return stage.call(x.to(self.dtype), t, frames, condition).to(torch.float32, copy=True)

        conditions = self.condition(stage, wishes, text_features)
        seeds = [2 * (args.seed * 1_000_003 + n) + 1 for n in numbers]
        ones = torch.ones_like(self.autoencoder.motion_mean)  # the encoder's tanh keeps motion within -1 to 1
        bounds = self.autoencoder.normalise(-ones), self.autoencoder.normalise(ones)
        return self.autoencoder.denormalise(self.draw(stage, "motion", predict, conditions, args.motion_guidance,
                                                      args.motion_steps, seeds, bounds))

    def decode(self, content, motion):
        """content (B, C, H, W), motion (B, D, L, H'+W') -> clips (B, 3, L, H, W) in [-1, 1]"""
        half = self.device.type == "cuda" and self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, half):
            frames = self.autoencoder.decode(content, motion)
        return to_pixels(frames, self.image)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


class Clock:
    """Adds up the seconds of each part. Waits for the device, and so takes time itself, only where it is `on`."""

    def __init__(self, on):
        self.on, self.seconds, self.last = on, {}, perf_counter()

    def __call__(self, part):
        if self.on:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = perf_counter()
            self.seconds[part], self.last = self.seconds.get(part, 0) + now - self.last, now


class CountAttention(TorchFunctionMode):
    """Counts attention's multiply-accumulates in its place: the result has the right shape and no meaning."""

    macs = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        query, key, _ = args
        self.macs += 2 * query.numel() * key.shape[-2]  # query times key, and that times value
        return torch.empty_like(query)


def macs(call):
    """Multiply-accumulates of a call: (of convolutions and linear layers, which the paper counts; of attention).

    On the meta device nothing is computed.
    """
    layers, attention = FlopCounterMode(display=False), CountAttention()
    with torch.inference_mode(False), torch.no_grad(), layers, attention:
        call()
    return layers.get_total_flops() // 2, attention.macs  # two a multiply-accumulate


def sampling_macs(sampler):
    """{part: (as the paper counts, in full)} of one clip: multiply-accumulates.

    The paper counts one branch of guidance, the whole autoencoder once, and no image decoder; in full are also the
    attention products, both branches and the image decoder, but not the autoencoder's encoder, which is not run.
    Moves the models to the meta device: they are of no use afterwards.
    """
    def empty(*shape, dtype=sampler.dtype):
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    # Copies: a module that was compiled in place has a copy that is not, in which operations can be counted.
    args, autoencoder, image = sampler.args, copy.deepcopy(sampler.autoencoder).to("meta"), copy.deepcopy(sampler.image)
    frame, latent = autoencoder.content_shape, autoencoder.motion_shape
    parts = {}
    for name, stage, steps, scale, inputs in (
            ("content", sampler.content, args.steps, args.guidance, [empty(*frame), empty()]),
            ("motion", sampler.motion, args.motion_steps, args.motion_guidance,
             [empty(*latent), empty(), empty(*frame)])):
        if stage:
            condition = empty(dtype=torch.long)  # a label
            if stage.text:
                condition = empty(*([77] if name == "content" else []), stage.text.width)
            layers, attention = macs(lambda: stage.model.to("meta")(*inputs, condition))
            parts[name] = steps * layers, steps * (layers + attention) * (1 if scale == 1 else 2)
    encoder, _ = macs(lambda: autoencoder.encode(empty(frame[0], latent[1], *frame[1:], dtype=torch.float32)))
    decoder, attention = macs(lambda: autoencoder.decode(empty(*frame).float(), empty(*latent).float()))
    parts["autoencoder"] = encoder + decoder, decoder + attention
    if image:
        frames = empty(*frame).expand(latent[1], -1, -1, -1).to(image.quant_conv.weight.dtype)
        parts["image decoder"] = 0, sum(macs(lambda: image.to("meta").decode(frames)))
    return parts


def profile(sampler, seconds, clips):
    """Table 9's row for this model, as text. seconds: a Clock's, of `clips` clips in all."""
    peak = torch.cuda.max_memory_allocated() if sampler.device.type == "cuda" else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # kilobytes
    parts = sampling_macs(sampler)
    paper, full = (sum(part[i] for part in parts.values()) / 1e12 for i in (0, 1))
    times = ", ".join(f"{part} {seconds[part]:.2f}" for part in ("content", "motion", "decode"))
    share = ", ".join(f"{name} {part[1] / 1e12:.4g}" for name, part in parts.items())
    return (f"a clip: {paper:.4g} TFLOPs as the paper counts (multiply-accumulates of convolutions and linear layers, "
            f"one branch, no image decoder)\n        {full:.4g} T multiply-accumulates in full: {share}\n"
            f"{clips} clips: {sum(seconds.values()):.2f} s ({times}), peak memory {peak / 1e9:.2f} GB")


# ---------------------------------------------------------------------------------------------------------------------
# Flags

DEFAULTS = {  # by the run's preset: guidance scales of content and motion. The paper's w is 4 on UCF-101, 7.5 for text.
    "shapes": dict(guidance=2.0, motion_guidance=1.5),
    "ucf101": dict(guidance=5.0, motion_guidance=5.0),
    "webvid_sd15": dict(guidance=8.5, motion_guidance=8.5),
    "webvid_sd21": dict(guidance=8.5, motion_guidance=8.5),
}


def flags():
    parser = Flags(__doc__.split("\n")[0])
    add = parser.add_argument_group("what to draw").add_argument
    add("--run", default="runs/shapes", help="run folder")
    add("--label", help="class, by name or number (default: all classes in turn)")
    add("--prompt", help="text to draw")
    add("--prompts", help="file with one prompt a line")
    add("--negative-prompt", default="", help="text to steer away from, in place of the empty prompt")
    add("--num", type=COUNT, help="clips in all (default: 24; with --prompt 4, with --prompts one a prompt)")
    add("--image", help="picture to animate: it is the content frame")
    add("--same-content", action="store_true", help="one content frame, many motions (figure 12)")
    add("--reconstruct", action="store_true", help="real clips through the autoencoder (table 4a)")
    add("--predict-motion", action="store_true", help="real content frames, generated motion (table 4a)")
    add("--data", help="real clips for the two above (default: the data set that stage 1 was trained on)")
    add = parser.add_argument_group("how to draw it").add_argument
    add("--steps", type=within(1, 1000), default=50, help="sampling steps of the content frame")
    add("--motion-steps", type=within(1, 1000), default=100, help="sampling steps of the motion")
    add("--guidance", type=within(0, kind=float), help="guidance scale of the content frame (default: the preset's)")
    add("--motion-guidance", type=within(0, kind=float), help="guidance scale of the motion (default: the preset's)")
    add("--sampler", choices=SAMPLERS, default="ddim", help="dpm++ (2M) needs fewer steps")
    add("--eta", type=within(0, 1, float), default=0.0, help="DDIM's noise, 0 to 1: none, ancestral")
    add("--seed", type=SEED, default=0, help="a seed gives the same clips whatever the batch size")
    add("--batch-size", type=COUNT, default=24, help="clips at a time")
    add("--compile", action="store_true", help="torch.compile the models, with CUDA graphs")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the two diffusion models (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--profile", action="store_true", help="print the cost: table 9's row for this model")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="folder (default: a new one in the run folder)")
    add("--fps", type=COUNT, default=8, help="frames a second of the files")
    return parser


def check_flags(args):
    """Raises InputError for flags that do not fit together."""
    if args.eta and args.sampler != "ddim":
        raise InputError(f"--sampler {args.sampler} is deterministic: drop --eta, or use ddim")
    if args.reconstruct and args.predict_motion:
        raise InputError("--reconstruct and --predict-motion: give one of them")
    if args.reconstruct or args.predict_motion:
        for name in ("label", "prompt", "prompts", "image", "same_content"):
            if getattr(args, name):
                raise InputError("--reconstruct and --predict-motion take real clips: drop "
                                 f"--{name.replace('_', '-')}")
    elif args.data:
        raise InputError("--data is for --reconstruct and --predict-motion: drop it")


def read_wishes(args, sampler, classes, count_default):
    """What each clip shall show: (labels or prompts, captions), one a clip. Raises InputError."""
    stages = [stage for stage in (sampler.content, sampler.motion) if stage]
    with_text = any(stage.text for stage in stages)
    prompts = [args.prompt] if args.prompt is not None else None
    if args.prompt is not None and args.prompts:
        raise InputError("--prompt and --prompts: give one of them")
    if args.prompts:
        try:
            with open(args.prompts, encoding="utf-8") as file:
                prompts = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {args.prompts}: {error}") from None
        if not prompts:
            raise InputError(f"--prompts {args.prompts} holds no prompt: one a line")
    if with_text:
        if args.label is not None or not prompts:
            raise InputError(f"{args.run} is conditioned on text: say what to draw with --prompt or --prompts")
        count = args.num or (len(prompts) if args.prompts else count_default)
        wishes = [prompts[i % len(prompts)] for i in range(count)]
        return wishes, wishes
    names = classes or ["video"]
    if prompts or args.negative_prompt:
        raise InputError(f"{args.run} is conditioned on classes, not text: use --label, one of {', '.join(names[:12])}")
    labels = list(range(len(names)))
    if args.label is not None:
        found = [i for i, name in enumerate(names) if args.label in (name, str(i))]
        if not found:
            raise InputError(f"--label {args.label} is none of the {len(names)} classes: {', '.join(names[:24])}"
                             f"{' ...' if len(names) > 24 else ''}")
        labels = found[:1]
    wishes = [labels[i % len(labels)] for i in range(args.num or count_default)]
    return wishes, [names[label] for label in wishes]


def read_image(path, size):
    """A picture, resized and centre-cropped to `size` (H, W) -> (1, 3, 1, H, W) in [-1, 1]. Raises InputError."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--image {path} cannot be read as a picture: {error}") from None
    picture = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1


def new_folder(args):
    """--out, or in the run folder the first of samples, samples-2, ... that does not exist."""
    folder, number = args.out or os.path.join(args.run, "samples"), 1
    while args.out is None and os.path.exists(folder):
        number += 1
        folder = os.path.join(args.run, f"samples-{number}")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise InputError(f"--out {folder} exists and is not an empty folder: name another")
    return folder


@torch.inference_mode()
def main():
    args = flags().parse_args()
    check_flags(args)
    rank, world, device = start(args.seed)
    sampler = Sampler(args, device)
    trained = sampler.state["args"]
    for name, value in DEFAULTS[trained["preset"]].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    size = pair(trained["size"])

    real = None
    if args.reconstruct or args.predict_motion:
        _, _, real, test = open_dataset(args.data or trained["data"], trained["frames"], size, trained["stride"],
                                        trained["split"], trained["captions"], args.seed)
        numbers = [int(n) for n in test[: args.num or 24]]
        if len(numbers) < (args.num or 0):
            say(f"{len(numbers)} clips, not {args.num}: no more were kept out of training", once=True)
        wishes, captions = [None] * len(numbers), {}
    else:
        wishes, names = read_wishes(args, sampler, sampler.state["classes"], 4 if args.prompt else 24)
        captions = dict(enumerate(names))
    picture = to_frames(read_image(args.image, size).to(device), sampler.image)[:, :, 0] if args.image else None

    folder = [new_folder(args) if rank == 0 else None]
    if world > 1:
        torch.distributed.broadcast_object_list(folder)
    folder = folder[0]
    fake = os.path.join(folder, "fake") if real is not None else folder
    os.makedirs(fake, exist_ok=True)
    if real is not None:
        os.makedirs(os.path.join(folder, "real"), exist_ok=True)
    shown, drawn, clock = [], {}, Clock(args.profile)
    most = max(1, min(24, 2**21 // (size[0] * size[1])))  # clips in the overview: large ones would make it huge
    with concurrent.futures.ThreadPoolExecutor(2) as writers:  # files are written while the next batch is drawn
        jobs = []
        every = range(len(wishes))
        batches = [every[n : n + args.batch_size] for n in every[:: args.batch_size]][rank::world]  # ranks take turns
        bar = tqdm(total=sum(map(len, batches)), desc="sample", unit="clip", disable=rank > 0)
        for batch in batches:
            wanted = [wishes[n] for n in batch]
            clock("rest")
            if real is not None:
                items = [real[numbers[n]] for n in batch]
                videos = torch.stack([item["video"] for item in items])
                content, motion = sampler.autoencoder.encode(to_frames(videos.to(device), sampler.image))
                captions |= {n: item["caption"] for n, item in zip(batch, items)}
                wanted = [item["caption" if sampler.motion and sampler.motion.text else "label"] for item in items]
                for n, video in zip(batch, videos):
                    path = os.path.join(folder, "real", f"{n:05d}.mp4")
                    jobs.append(writers.submit(write_video, path, video, args.fps))
            elif picture is not None:
                content = picture.expand(len(batch), -1, -1, -1)
            elif args.same_content:  # one for each prompt or label, drawn once
                if new := [wish for wish in dict.fromkeys(wanted) if wish not in drawn]:
                    drawn |= dict(zip(new, sampler.draw_content(new, [0] * len(new))))
                content = torch.stack([drawn[wish] for wish in wanted])
            else:
                content = sampler.draw_content(wanted, batch)
            clock("content")
            if not args.reconstruct:
                motion = sampler.draw_motion(content, wanted, batch)
            clock("motion")
            videos = sampler.decode(content, motion).cpu()
            clock("decode")
            for n, video in zip(batch, videos):
                jobs.append(writers.submit(write_video, os.path.join(fake, f"{n:05d}.mp4"), video, args.fps))
            shown += list(zip(batch, videos))[: most - len(shown)]
            bar.update(len(batch))
        bar.close()
        for job in jobs:
            job.result()
    if world > 1:
        parts = [None] * world
        with torch.inference_mode(False):  # in which torch before 2.6 cannot gather
            torch.distributed.all_gather_object(parts, (captions, shown))
        captions = {n: caption for part, _ in parts for n, caption in part.items()}
        shown = sorted((one for _, part in parts for one in part), key=lambda one: one[0])[:most]
    if rank > 0:
        return
    with open(os.path.join(folder, "captions.txt"), "w", encoding="utf-8") as file:
        file.writelines(captions[n].replace("\n", " ") + "\n" for n in range(len(wishes)))
    numbers, clips = zip(*shown)
    write_sheet(os.path.join(folder, "samples.png"), clips, columns=2, captions=[captions[n] for n in numbers])
    write_video(os.path.join(folder, "samples.gif"), tile(clips, columns=min(6, len(clips))), args.fps)
    print(f"{len(wishes)} clip{'s' * (len(wishes) > 1)} in {folder}; look at {os.path.join(folder, 'samples.gif')}")
    if args.profile:
        print(profile(sampler, clock.seconds, len(wishes)))


if __name__ == "__main__":
    run(main)
