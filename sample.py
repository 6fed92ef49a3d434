"""Sampling: noise -> content frame -> motion latent -> clip. Algorithm 1 and appendix B.4 of the paper.

Reads the checkpoints that it needs from a run folder, and what --image or --data names. Writes an .mp4 for each clip
(an .mkv with --lossless, for fvd.py), captions.txt with its caption, and samples.gif and samples.png, an overview.

    python sample.py                                                 # two clips of each class of runs/shapes
    python sample.py --run-dir runs/shapes_text --prompt "a red circle moving left"
    python sample.py --run-dir runs/ucf101 --label Archery --num 4
    python sample.py --run-dir runs/webvid_sd21 --prompt "a ship in a storm, oil painting" --guidance 8.5
    python sample.py --run-dir runs/webvid_sd21 --prompt "waves" --image photo.jpg       # animate a picture
    python sample.py --run-dir runs/ucf101 --reconstruct --split ucfTrainTestlist/trainlist01.txt --num 2048 --lossless

A guidance scale s means eps = eps(nothing) + s (eps(c) - eps(nothing)): the paper's w is s - 1, and s = 1 is no
guidance. The same formula holds where the model predicts x or v. Whether the paper's figures (4.0 on UCF-101, 7.5 for
text) are w or s it leaves open: its formula says w, the authors' release passes 4.0 as s, and 7.5 is Stable Diffusion's
usual s. Here they are taken as w. The motion is drawn without guidance: the release guides the content frame alone.
"""

import argparse
import concurrent.futures
import functools
import os
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import data
from autoencoder import load_autoencoder, to_frames, to_pixels
from content_diffusion import SAMPLERS, guided, load_content
from data import InputError
from motion_diffusion import load_motion


class Sampler:
    """The trained stages of a run folder that args ask for. Call draw_content, draw_motion, decode, in this order."""

    def __init__(self, args, device, dtype):
        self.args, self.device, self.dtype = args, device, dtype
        self.autoencoder, self.image, self.state = load_autoencoder(args.run_dir, device)
        if args.guidance is None:
            args.guidance = GUIDANCE[self.state["args"]["preset"]]
        self.unfinished = []
        self.note_unfinished("autoencoder", self.state)
        needs_motion = not args.reconstruct
        needs_content = needs_motion and not args.predict_motion and not args.image
        self.content = self.load("content", load_content) if needs_content else None
        self.motion = self.load("motion", load_motion) if needs_motion else None
        if self.content and self.motion and bool(self.content.text) != bool(self.motion.text):
            raise InputError(f"one of content.pt and motion.pt in {args.run_dir} is conditioned on classes, the other "
                             "on text: train one of them again")
        self.compiled = self.compile(self.state["args"]["preset"])

    def note_unfinished(self, stage, state):
        if state["step"] < state["args"]["steps"]:
            self.unfinished.append(f"{stage}.pt is unfinished: step {state['step']} of {state['args']['steps']}")

    def load(self, stage, load_stage):
        model, text_encoder, diffusion, state = load_stage(self.args.run_dir)
        if self.state["fingerprint"] is None:
            raise InputError(f"{self.args.run_dir} has no complete encodings: finish autoencoder.py first")
        if state["fingerprint"] != self.state["fingerprint"]:
            raise InputError(f"{self.args.run_dir}/{stage}.pt was trained on the encodings of another autoencoder than "
                             f"{self.args.run_dir}/autoencoder.pt: train it again in another --run-dir")
        self.note_unfinished(stage, state)
        return self.prepare(model, text_encoder, diffusion, state["shape"])

    def prepare(self, model, text_encoder, diffusion, shape):
        """A stage's parts, on the device and ready to be called."""
        model = model.requires_grad_(False).eval().to(self.device, self.dtype)
        if text_encoder:
            text_encoder.to(self.device, torch.float16 if self.device.type == "cuda" else torch.float32)
        return SimpleNamespace(model=model, text=text_encoder, shape=shape, diffusion=diffusion.to(self.device))

    def compile(self, preset):
        """Compiles what draws, with CUDA graphs, which write each result over the one before, and what decodes."""
        compiled = functools.partial(data.compile_modules, self.args, preset, self.device)
        compiled(*(stage.model for stage in (self.content, self.motion) if stage), mode="reduce-overhead")
        return compiled(self.autoencoder.decoder, self.image and self.image.decoder)

    def draw_content(self, wishes, numbers):
        """Content frames (B, C, H, W) for a batch of labels or prompts. numbers: the clips', which seed their noise."""
        seeds = [2 * (self.args.seed * 1_000_003 + n) for n in numbers]  # the odd ones are the motion's
        bounds = None if self.image else (-1, 1)  # a mean of pixels is in their range; latents have none
        return self.draw("content", self.content, wishes, seeds, self.args.guidance, self.args.steps, bounds)

    def draw_motion(self, content, wishes, numbers):
        """Motion latents (B, D, L, H'+W'), as the decoder takes them, for content frames and labels or prompts."""
        seeds = [2 * (self.args.seed * 1_000_003 + n) + 1 for n in numbers]
        ones = torch.ones_like(self.autoencoder.motion_mean)  # the encoder's tanh keeps motion within -1 to 1
        bounds = self.autoencoder.normalise(-ones), self.autoencoder.normalise(ones)
        motion = self.draw("motion", self.motion, wishes, seeds, self.args.motion_guidance, self.args.motion_steps,
                           bounds, content.to(self.dtype))
        return self.autoencoder.denormalise(motion)

    def decode(self, content, motion):
        """content (B, C, H, W), motion (B, D, L, H'+W') -> clips (B, 3, L, H, W) in [-1, 1]"""
        half = self.device.type == "cuda" and self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, half):
            frames = self.autoencoder.decode(content, motion)
        return to_pixels(frames, self.image)

    def draw(self, name, stage, wishes, seeds, scale, steps, bounds, frame=None):
        """Noise, each clip's from its own seed -> clean samples (B, ...) by the chosen sampler, with guidance. frame:
        content frames (B, C, H, W), which the motion model sees with and without the condition."""
        if stage.text:
            hidden = stage.text.encode([*wishes, self.args.negative_prompt]).to(self.dtype)  # (B + 1, 77, width)
            hidden = hidden if frame is None else hidden.mean(1)
            condition, nothing = hidden[:-1], hidden[-1:].expand_as(hidden[:-1])
        else:
            condition = torch.tensor(wishes, device=self.device)
            nothing = torch.full_like(condition, stage.model.classes)

        def predict(x, t, condition):
            frames = [] if frame is None else [torch.cat([frame] * (len(x) // len(frame)))]
            return stage.model(x.to(self.dtype), t, *frames, condition).to(torch.float32, copy=True)

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on any device
        noise = torch.stack([torch.randn(*stage.shape, generator=generator) for generator in generators])
        return SAMPLERS[self.args.sampler](
            guided(predict, condition, nothing, scale), noise.to(self.device), stage.diffusion, steps, self.args.eta,
            generators, bounds, lambda steps: tqdm(steps, desc=name, leave=False, disable=None))


# ---- Flags ----------------------------------------------------------------------------------------------------------

GUIDANCE = dict(shapes=2.0, shapes_text=3.0, ucf101=5.0, webvid_sd15=8.5, webvid_sd21=8.5)  # content's, by preset


def flags():
    parser = data.Flags(__doc__)
    add = parser.add_argument_group("what to draw").add_argument
    own, shipped = "runs/shapes", os.path.join(os.path.dirname(__file__), "pretrained", "shapes")
    add("--run-dir", default=own if os.path.exists(f"{own}/autoencoder.pt") else shipped,
        help="run folder; until runs/shapes is trained, the small models that come with the code")
    add("--label", help="class, by name or number (default: all classes in turn)")
    add("--prompt", help="text to draw")
    add("--prompts", help="file with one prompt a line")
    add("--negative-prompt", default="", help="text to steer away from, in place of the empty prompt")
    add("-n", "--num", type="count", help="clips in all; torchrun takes only -n (default: 24; 4 with --prompt; with "
        "--prompts one clip for each)")
    add("--image", help="picture to animate: it is the content frame")
    add("--same-content", action="store_true", help="one content frame, many motions (figure 12)")
    add("--reconstruct", action="store_true", help="real clips through the autoencoder (table 4a)")
    add("--predict-motion", action="store_true", help="real content frames, generated motion (table 4a)")
    add("--data", help="real clips for the two above, from all of this data set (default: stage 1's test clips)")
    add("--split", help="the same, from all that this list names of --data or of stage 1's, such as trainlist01.txt")
    add("--captions", help="CSV whose paths start from --data")
    add = parser.add_argument_group("how to draw it").add_argument
    add("--steps", type="count", default=50, help="sampling steps of the content frame, at most 1000")
    add("--motion-steps", type="count", default=100, help="sampling steps of the motion, at most 1000")
    add("--guidance", type="number", help="guidance scale of the content frame (default: 2 for shapes, 3 for "
        "shapes_text, 5 for ucf101, 8.5 for webvid)")
    add("--motion-guidance", type="number", default=1.0, help="guidance scale of the motion; 1: none")
    add("--sampler", choices=SAMPLERS, default="ddim", help="dpm++ (2M) needs fewer steps")
    add("--eta", type="share", default=0.0, help="DDIM's noise, from 0 (none) to 1 (DDPM)")
    add("--seed", type="whole", default=0, help="a seed gives the same clips whatever the batch size")
    add("--batch-size", type="count", default=24, help="clips at a time")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the models, with CUDA graphs (default: on a GPU, but for the shapes preset)")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the two diffusion models (default: bfloat16 on a GPU, float32 on a CPU)")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="folder (default: a new one in the run folder)")
    add("--fps", type="count", help="frames per second (default: the training videos', or --data's, divided by stage "
        "1's --stride, so that things move at their own speed)")
    add("--lossless", action="store_true", help="write .mkv files that keep every bit, for scoring, in place of .mp4")
    return parser


def check_flags(args):
    """Raises InputError for flags that do not fit together."""
    if args.eta and args.sampler != "ddim":
        raise InputError(f"--sampler {args.sampler} is deterministic: drop --eta, or use ddim")
    if args.reconstruct and args.predict_motion or args.prompt is not None and args.prompts:
        raise InputError("give only one of --reconstruct and --predict-motion, and only one of --prompt and --prompts")
    if max(args.steps, args.motion_steps) > 1000:
        raise InputError("--steps and --motion-steps are at most 1000, the number of noise levels in training")
    real = args.reconstruct or args.predict_motion
    for name in ("label", "prompt", "prompts", "image", "same_content") if real else ("data", "split", "captions"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} does not go with "
                             f"{'real clips' if real else 'generated clips'}: drop it")


def read_wishes(args, with_text, classes):
    """What each clip is to show: (labels or prompts, captions), one for each."""
    if with_text:
        prompts = [args.prompt] if args.prompt is not None else data.read_lines(args.prompts) if args.prompts else []
        if args.label is not None or not prompts:
            raise InputError(f"{args.run_dir} is conditioned on text: say what to draw with --prompt or --prompts")
        count = args.num or (len(prompts) if args.prompts else 4)
        wishes = [prompts[i % len(prompts)] for i in range(count)]
        return wishes, wishes
    names = classes or ["video"]
    if args.prompt is not None or args.prompts or args.negative_prompt:
        raise InputError(f"{args.run_dir} is conditioned on classes, not text: use --label, one of "
                         f"{', '.join(names[:12])}")
    labels = [i for i, name in enumerate(names) if args.label in (None, name, str(i))]
    if not labels:
        raise InputError(f"--label {args.label} is not one of the {len(names)} classes: {', '.join(names[:24])}"
                         f"{' ...' if len(names) > 24 else ''}")
    wishes = [labels[i % len(labels)] for i in range(args.num or 24)]
    return wishes, [names[label] for label in wishes]


def read_image(path, size):
    """A picture, resized and centre-cropped to `size` (H, W) -> (1, 3, 1, H, W) in [-1, 1]."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--image {path} cannot be read as a picture: {error}") from None
    picture = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
    return data.to_floats(torch.from_numpy(np.array(picture))[None, None])


def new_folder(args, rank, world):
    """Makes --out, or in the run folder the first of samples, samples-2, ... that does not exist, on rank 0."""
    folder, number = args.out or f"{args.run_dir}/samples", 1
    while rank == 0 and args.out is None and os.path.exists(folder):
        number += 1
        folder = f"{args.run_dir}/samples-{number}"
    if rank == 0:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise InputError(f"--out {folder} is not an empty folder: choose another")
        data.write_lines(f"{folder}/captions.txt", [])  # a folder that is read-only ends this now, not after drawing
    if world > 1:
        shared = [folder]
        torch.distributed.broadcast_object_list(shared)
        folder = shared[0]
        data.compare_views(folder)
    return folder


@torch.inference_mode()
def main():
    args = flags().parse_args()
    check_flags(args)
    rank, world, device, dtype = data.start(args)
    sampler = Sampler(args, device, dtype)
    for line in sampler.unfinished if rank == 0 else ():
        print(f"{args.run_dir}/{line}")
    trained = sampler.state["args"]
    size, fps = trained["size"], sampler.state.get("fps", 8)  # [H, W] in pixels; version 0.2 did not save fps

    real = None
    if args.reconstruct or args.predict_motion:
        split, listed = (getattr(args, name) or (None if args.data else trained[name])
                         for name in ("split", "captions"))
        everything, indices, real, chosen = data.open_dataset(
            args.data or trained["data"], trained["frames"], size, trained["stride"], split, listed, trained["seed"])
        if (args.data or args.split) and indices is not None:  # else the test clips
            real, chosen = everything, np.random.default_rng(args.seed).permutation(len(everything))
        wishes, captions = [int(n) for n in chosen[: args.num or 24]], {}
        fps = everything.frame_rate() if args.data else fps
        if rank == 0 and len(wishes) < (args.num or 0):
            print(f"{len(wishes)} clips, not {args.num}: the data set has no more")
    else:
        with_text = any(stage and stage.text for stage in (sampler.content, sampler.motion))
        wishes, names = read_wishes(args, with_text, sampler.state["classes"])
        captions = dict(enumerate(names))
    picture = to_frames(read_image(args.image, size).to(device), sampler.image)[:, :, 0] if args.image else None
    folder, args.fps = new_folder(args, rank, world), args.fps or fps
    fake, ending = f"{folder}/fake" if real else folder, "mkv" if args.lossless else "mp4"
    for path in (f"{folder}/real", fake) if real else [fake]:
        os.makedirs(path, exist_ok=True)

    if rank == 0:
        print(f"{len(wishes)} clip{'s' * (len(wishes) > 1)} from {args.run_dir}; {device}, {dtype}, {sampler.compiled}")
    shown, drawn, jobs = [], {}, []
    most = max(1, min(24, 2**21 // (size[0] * size[1])))  # clips in the overview: large ones would make it huge
    batches = [range(len(wishes))[n : n + args.batch_size] for n in range(0, len(wishes), args.batch_size)][rank::world]
    bar = tqdm(total=sum(map(len, batches)), desc="sample", unit="clip", disable=rank > 0)
    with concurrent.futures.ThreadPoolExecutor(2) as writers:  # files are written while the next batch is drawn
        for batch in batches:
            wanted = [wishes[n] for n in batch]
            if real:
                items = [real[index] for index in wanted]
                videos = torch.stack([item["video"] for item in items])
                content, motion = sampler.autoencoder.encode(to_frames(videos.to(device), sampler.image))
                captions |= {n: item["caption"] for n, item in zip(batch, items)}
                wanted = [item["caption" if sampler.motion and sampler.motion.text else "label"] for item in items]
                jobs += [writers.submit(data.write_video, f"{folder}/real/{n:05d}.{ending}", video, args.fps)
                         for n, video in zip(batch, videos)]
            elif picture is not None:
                content = picture.expand(len(batch), -1, -1, -1)
            elif args.same_content:  # one for each prompt or label, drawn once
                if new := [wish for wish in dict.fromkeys(wanted) if wish not in drawn]:
                    drawn |= dict(zip(new, sampler.draw_content(new, [0] * len(new))))
                content = torch.stack([drawn[wish] for wish in wanted])
            else:
                content = sampler.draw_content(wanted, batch)
            if not args.reconstruct:
                motion = sampler.draw_motion(content, wanted, batch)
            videos = [video.clone() for video in sampler.decode(content, motion).cpu()]  # not views of one
            jobs += [writers.submit(data.write_video, f"{fake}/{n:05d}.{ending}", video, args.fps)
                     for n, video in zip(batch, videos)]
            shown += list(zip(batch, videos))[: most - len(shown)]
            bar.update(len(batch))
        for job in jobs:
            job.result()
    bar.close()
    if world > 1:
        parts = [None] * world if rank == 0 else None
        torch.distributed.gather_object((captions, shown), parts)
        if rank > 0:
            return
        captions = {n: caption for part, _ in parts for n, caption in part.items()}
        shown = sorted((one for _, part in parts for one in part), key=lambda one: one[0])[:most]
    data.write_lines(f"{folder}/captions.txt", [captions[n].replace("\n", " ") for n in range(len(wishes))])
    numbers, clips = zip(*shown)
    data.write_sheet(f"{folder}/samples.png", clips, columns=2, captions=[captions[n] for n in numbers])
    data.write_video(f"{folder}/samples.gif", list(clips), args.fps)
    print(f"{len(wishes)} clip{'s' * (len(wishes) > 1)} in {folder}; look at {folder}/samples.gif")


if __name__ == "__main__":
    data.launch(main)
