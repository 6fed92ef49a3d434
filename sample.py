"""Sampling: noise -> content frame -> motion latent -> clip. Algorithm 1 and appendix B.4 of the paper.

Reads the checkpoints that it needs from a run folder, and what --image or --data names. Writes an .mp4 for each clip
(an .mkv with --lossless, for fvd.py), captions.txt with its caption, and samples.gif and samples.png, an overview.

    python sample.py                                                 # two clips of each class of moving shapes
    python sample.py --run-dir runs/shapes_text --prompt "a red circle moving left"
    python sample.py --run-dir runs/ucf101 --label Archery --num 4
    python sample.py --run-dir runs/webvid_sd21 --prompt "a ship in a storm, oil painting" --guidance 8.5
    python sample.py --run-dir runs/webvid_sd21 --prompt "waves" --image photo.jpg       # animate a picture
    python sample.py --run-dir runs/ucf101 --reconstruct --split ucfTrainTestlist/trainlist01.txt --num 2048 --lossless

A guidance scale s means eps = eps(nothing) + s (eps(c) - eps(nothing)), of x and v too; s = 1 is none. The paper does
not say whether its figures (4.0 on UCF-101, 7.5 for text) are s or w = s - 1; we take them as w. The motion has none.
"""

import argparse
import concurrent.futures
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from autoencoder import from_pixels, load_autoencoder, to_pixels
from content_diffusion import ddim, guided, load_content
from motion_diffusion import load_motion


class Sampler:
    """The trained stages of a run folder that args ask for. Call draw_content, draw_motion, decode, in this order."""

    def __init__(self, args, device, dtype):
        self.args, self.device, self.dtype = args, device, dtype
        self.autoencoder, self.image, self.state = load_autoencoder(args.run_dir, device)
        preset, states = self.state["args"]["preset"], {"autoencoder.pt": self.state}
        self.content = self.motion = None
        if not args.reconstruct:
            self.motion, state = self.load(load_motion, "motion.pt", args.motion_guidance)
            self.mean, self.std = (state[name].to(device) for name in ("motion_mean", "motion_std"))  # as in training
            states["motion.pt"] = state
            if not args.predict_motion and not args.image:
                self.content, states["content.pt"] = self.load(load_content, "content.pt", args.guidance)
        for name, state in states.items():
            if state["step"] < state["args"]["steps"]:
                print(f"{args.run_dir}/{name} is unfinished: step {state['step']} of {state['args']['steps']}")
        self.compiled = device.type == "cuda" and "shapes" not in preset if args.compile is None else args.compile
        if self.compiled:
            torch._dynamo.config.suppress_errors = True  # where compiling fails, go on without
            for stage in filter(None, (self.content, self.motion)):
                stage.model.compile(mode="reduce-overhead", dynamic=False)  # CUDA graphs
            self.autoencoder.decoder.compile(dynamic=False)

    def load(self, load_stage, name, scale):
        """(a stage's parts, on the device, its checkpoint)."""
        model, text, diffusion, state = load_stage(self.args.run_dir)
        if state["identity"] != self.state["identity"]:
            raise SystemExit(f"{self.args.run_dir}/{name} was trained on other encodings than its autoencoder.pt has "
                             f"now: `autoencoder.py --encode {self.args.run_dir} --run-dir NEW`, and train it in NEW")
        if scale is None:  # by default there is no guidance where all clips are of one class, which it cannot bring out
            one = not text and len(self.state["classes"]) < 2
            scale = self.args.guidance = 1.0 if one else GUIDANCE[self.state["args"]["preset"]]
        if scale != 1 and not state["args"]["drop"] and not (text and name == "content.pt"):  # but SD knows ""
            raise SystemExit(f"{self.args.run_dir}/{name} was trained with --drop 0: its guidance scale can only be 1")
        model = model.requires_grad_(False).eval().to(self.device, self.dtype)
        text = text and text.to(self.device, torch.float16 if self.device.type == "cuda" else torch.float32)
        return SimpleNamespace(model=model, text=text, shape=state["shape"], diffusion=diffusion.to(self.device)), state

    def draw_content(self, wishes, numbers):
        """Content frames (B, C, H, W) for a batch of labels or prompts. numbers: the clips', which seed their noise."""
        seeds = [2 * (self.args.seed * 1_000_003 + n) for n in numbers]  # the odd ones are the motion's
        bounds = None if self.image else (-1, 1)  # a mean of pixels is in their range; latents have none
        return self.draw("content", self.content, wishes, seeds, self.args.guidance, self.args.steps, bounds)

    def draw_motion(self, content, wishes, numbers):
        """Motion latents (B, D, L, H'+W'), as the decoder takes them, for content frames and labels or prompts."""
        seeds = [2 * (self.args.seed * 1_000_003 + n) + 1 for n in numbers]
        bounds = (-1 - self.mean) / self.std, (1 - self.mean) / self.std  # the encoder's tanh keeps motion in [-1, 1]
        motion = self.draw("motion", self.motion, wishes, seeds, self.args.motion_guidance, self.args.motion_steps,
                           bounds, content.to(self.dtype))
        return motion * self.std + self.mean

    def decode(self, content, motion):
        """content (B, C, H, W), motion (B, D, L, H'+W') -> clips (B, 3, L, H, W) in [-1, 1]"""
        half, parts = self.device.type == "cuda" and self.dtype == torch.bfloat16, []
        for c, m in zip(content.split(8), motion.split(8)):  # kernels of attention fail above 16 clips of 512x1024
            with torch.autocast(self.device.type, torch.bfloat16, half):
                frames = self.autoencoder.decode(c, m)
            parts.append(to_pixels(frames, self.image))
            if parts[-1].isnan().any():
                raise SystemExit("decoded to NaN: is the image autoencoder one that overflows in half precision?")
        return torch.cat(parts)

    def draw(self, name, stage, wishes, seeds, scale, steps, bounds, frame=None):
        """Noise, each clip's from its own seed -> clean samples (B, ...) by DDIM, with guidance. frame: content frames
        (B, C, H, W), which the motion model sees with and without the condition."""
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
        return ddim(guided(predict, condition, nothing, scale), noise.to(self.device), stage.diffusion, steps,
                    self.args.eta, generators, bounds, lambda steps: tqdm(steps, desc=name, leave=False, disable=None))


# ---- Flags ----------------------------------------------------------------------------------------------------------

GUIDANCE = dict(shapes=2.0, shapes_text=3.0, ucf101=5.0, webvid_sd15=8.5, webvid_sd21=8.5)  # content's, by preset


def read_flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run-dir", help="run folder (default: runs/shapes when its three stages are trained, before that "
        "pretrained/shapes, which comes with the code)")
    # What to draw
    add("--label", help="class, by name or number (default: all classes in turn)")
    add("--prompt", help="text to draw")
    add("--prompts", help="file with one prompt a line")
    add("--negative-prompt", default="", help="text to steer away from, in place of the empty prompt")
    add("-n", "--num", type=int, help="clips in all (default: 24, 4 of a --prompt, 1 of each of --prompts)")
    add("--image", help="picture to animate: it is the content frame")
    add("--same-content", action="store_true", help="one content frame, many motions (figure 12)")
    add("--reconstruct", action="store_true", help="real clips through the autoencoder (table 4a)")
    add("--predict-motion", action="store_true", help="real content frames, generated motion (table 4a)")
    add("--data", help="real clips for the two above, from all of this data set (default: stage 1's test clips)")
    add("--split", help="the same, from all videos in this list, of --data or stage 1's, such as trainlist01.txt")
    add("--captions", help="CSV whose paths start from --data")
    # How to draw it
    add("--steps", type=int, default=50, help="sampling steps of the content frame, at most 1000")
    add("--motion-steps", type=int, default=100, help="sampling steps of the motion, at most 1000")
    add("--guidance", type=float, help=f"guidance scale of the content frame (default: {GUIDANCE}; 1 for one class)")
    add("--motion-guidance", type=float, default=1.0, help="guidance scale of the motion; 1: none")
    add("--eta", type=float, default=0.0, help="DDIM's noise, from 0 (none) to 1 (DDPM)")
    add("--seed", type=int, default=0, help="a seed gives the same clips whatever the batch size")
    add("--batch-size", type=int, default=24, help="clips at a time")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU, but for shapes)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the diffusion models (default: bfloat16 on a GPU)")
    # Output
    add("--out", help="folder (default: a new one in the run folder, or samples/ for models that come with the code)")
    add("--fps", type=float, help="frames per second (default: such that things move at the videos' own speed)")
    add("--lossless", action="store_true", help="write .mkv files that keep every bit, for scoring, in place of .mp4")
    args = parser.parse_args()
    if args.reconstruct and args.predict_motion or args.prompt is not None and args.prompts:
        parser.error("give only one of --reconstruct and --predict-motion, and only one of --prompt and --prompts")
    if not 1 <= min(args.steps, args.motion_steps) <= max(args.steps, args.motion_steps) <= 1000:
        parser.error("--steps and --motion-steps: 1 to 1000, the number of noise levels in training")
    real = args.reconstruct or args.predict_motion
    for name in "label prompt prompts image same_content guidance".split() if real else ("data", "split", "captions"):
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} does not go with {'real' if real else 'generated'} clips")
    if args.negative_prompt and args.motion_guidance == 1 and (args.image or real or args.guidance == 1):
        parser.error("--negative-prompt needs guidance: of the content frame, or --motion-guidance")
    if not args.run_dir:
        here, stages = os.path.dirname(os.path.abspath(__file__)), ("autoencoder", "content", "motion")
        trained = all(os.path.exists(f"runs/shapes/{stage}.pt") for stage in stages)
        args.run_dir = "runs/shapes" if trained else os.path.relpath(os.path.join(here, "pretrained", "shapes"))
    return args


def read_wishes(args, with_text, classes):
    """What each clip is to show: (labels or prompts, captions), one for each."""
    if with_text:
        lines = data.read_text(args.prompts).splitlines() if args.prompts else [args.prompt or ""]
        prompts = [line.strip() for line in lines if line.strip() or args.prompt is not None]
        if args.label is not None or not prompts:
            raise SystemExit(f"{args.run_dir} is conditioned on text: say what to draw with --prompt or --prompts")
        count = args.num or (len(prompts) if args.prompts else 4)
        wishes = [prompts[i % len(prompts)] for i in range(count)]
        return wishes, wishes
    names = classes or ["video"]
    if args.prompt is not None or args.prompts or args.negative_prompt:
        raise SystemExit(f"{args.run_dir} is conditioned on classes, not text: --label takes {', '.join(names[:12])}")
    labels = [i for i, name in enumerate(names) if args.label in (None, name)]
    labels = labels or [i for i in range(len(names)) if args.label == str(i)]  # a number, unless it is a name
    if not labels:
        raise SystemExit(f"--label {args.label} is none of the {len(names)} classes, such as {', '.join(names[:12])}")
    wishes = [labels[i % len(labels)] for i in range(args.num or 24)]
    return wishes, [names[label] for label in wishes]


def open_real(args, state, with_text):
    """(data set, indices of the clips to take, frames per second, class numbers of the run by the data set's)."""
    trained, classes = state["args"], state["classes"]
    split, listed = (getattr(args, name) or (None if args.data else trained[name]) for name in ("split", "captions"))
    everything = bool(args.data or args.split)
    train, indices, tests, test = data.open_dataset(
        args.data or trained["data"], trained["frames"], trained["size"], trained["stride"], split, listed, args.seed,
        everything=everything)
    if everything and indices is not None:
        tests, test = train, np.random.default_rng(args.seed).permutation(len(train)).tolist()
    elif indices is not None and train.identity != state["videos"]:
        print(f"these are not all videos that {args.run_dir} was trained on: some test clips may be of its training")
    if args.predict_motion and with_text and "" in getattr(tests, "captions", ()):
        raise SystemExit(f"{args.run_dir} draws motion from text, but not every video has a caption")
    names, own = tests.classes or ["video"], classes or ["video"]
    if args.predict_motion and not with_text and set(names) - set(own):
        raise SystemExit(f"{args.run_dir} does not know the classes {', '.join(sorted(set(names) - set(own))[:12])}")
    if len(test) < (args.num or 0):
        print(f"{len(test)} clips, not {args.num}: the data set has no more")
    numbers = {number: own.index(name) for number, name in enumerate(names) if name in own}
    return tests, test[: args.num or 24], train.frame_rate(), numbers


@torch.inference_mode()
def main():
    args = read_flags()
    rank, local, world = int(os.getenv("RANK", 0)), int(os.getenv("LOCAL_RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group()
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    sampler = Sampler(args, device, dtype)
    trained, fps, real, picture = sampler.state["args"], sampler.state["fps"], None, None

    with_text = bool(sampler.motion and sampler.motion.text)
    if sampler.content and with_text != bool(sampler.content.text):
        raise SystemExit(f"of {args.run_dir}/content.pt and motion.pt one takes prompts, the other classes")
    if args.reconstruct or args.predict_motion:
        real, wishes, speed, numbers = open_real(args, sampler.state, with_text)
        captions, fps = {}, speed if args.data else fps
    else:
        wishes, names = read_wishes(args, with_text, sampler.state["classes"])
        captions = dict(enumerate(names))
    if args.image:
        try:
            picture = data.to_floats(torch.from_numpy(data.read_picture(args.image, trained["size"]))[None, None])
        except data.BadVideo as error:
            raise SystemExit(f"--image {args.image} cannot be read as a picture: {error}") from None
        picture = from_pixels(picture.to(device), sampler.image)[:, :, 0]

    folder, number = args.out or ("samples" if "pretrained" in args.run_dir else f"{args.run_dir}/samples"), 1
    while rank == 0 and args.out is None and os.path.exists(folder + f"-{number}" * (number > 1)):
        number += 1
    shared = [folder + f"-{number}" * (number > 1)]
    if rank == 0:
        os.makedirs(shared[0], exist_ok=True)
        if os.listdir(shared[0]):
            raise SystemExit(f"--out {shared[0]} is not an empty folder: choose another")
        open(f"{shared[0]}/captions.txt", "w").close()  # where nothing can be written, end now
        for part in ("real", "fake") if real else ():
            os.mkdir(f"{shared[0]}/{part}")
        print(f"{len(wishes)} clips from {args.run_dir} into {shared[0]}; {device}{', compiled' * sampler.compiled}")
    if world > 1:  # the other ranks go on when the folder is there
        dist.broadcast_object_list(shared)
    folder, fake = shared[0], f"{shared[0]}/fake" if real else shared[0]
    shown, drawn, jobs, ending, args.fps = [], {}, [], "mkv" if args.lossless else "mp4", args.fps or fps
    most = max(1, min(24, 2**21 // (trained["size"][0] * trained["size"][1])))  # clips in the overview, by their size
    batches = [range(len(wishes))[n : n + args.batch_size] for n in range(0, len(wishes), args.batch_size)][rank::world]
    bar = tqdm(total=sum(map(len, batches)), desc="sample", unit="clip", disable=rank > 0)
    with concurrent.futures.ThreadPoolExecutor(2) as writers:  # files are written while the next batch is drawn
        for batch in batches:
            wanted = [wishes[n] for n in batch]
            if real:
                items = [real[index] for index in wanted]
                videos = torch.stack([data.to_floats(item["video"]) for item in items])
                content, motion = sampler.autoencoder.encode(from_pixels(videos.to(device), sampler.image))
                captions |= {n: item["caption"] for n, item in zip(batch, items)}
                wanted = [item["caption"] if with_text else numbers.get(item["label"]) for item in items]
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
            videos = [torch.from_numpy(data.to_uint8(video)) for video in sampler.decode(content, motion)]
            jobs += [writers.submit(data.write_video, f"{fake}/{n:05d}.{ending}", video, args.fps)
                     for n, video in zip(batch, videos)]
            shown += list(zip(batch, videos))[: most - len(shown)]
            bar.update(len(batch))
        for job in jobs:
            job.result()
    bar.close()
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object((captions, shown), parts)
        dist.destroy_process_group()
        if rank > 0:
            return
        captions = {n: caption for part, _ in parts for n, caption in part.items()}
        shown = sorted((one for _, part in parts for one in part), key=lambda one: one[0])[:most]
    with open(f"{folder}/captions.txt", "w", encoding="utf-8") as file:
        file.writelines(" ".join(captions[n].splitlines()) + "\n" for n in range(len(wishes)))
    numbers, clips = zip(*shown)
    data.write_sheet(f"{folder}/samples.png", clips, columns=2, captions=[captions[n] for n in numbers])
    data.write_video(f"{folder}/samples.gif", list(clips), args.fps)
    print(f"{len(wishes)} clips in {folder}; look at {folder}/samples.gif")


if __name__ == "__main__":
    main()
