"""Proves that text-to-video works end to end, from raw Stable Diffusion files of both versions and captioned videos,
all of which it writes itself, small, to clips drawn from prompts and pictures; that a mistake costs one clear line and
leaves nothing behind; and that a picture comes back through both autoencoders as it does through one."""

import csv
import os
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import autoencoder
import content_diffusion
import motion_diffusion
import sample
from autoencoder import Autoencoder, ImageAutoencoder, psnr, read_checkpoint, to_frames, to_pixels
from content_diffusion import TextEncoder, UNet
from data import InputError, MovingShapes, read_clip, write_video

VERSIONS = {  # --preset: the small U-Net of that layout, --size, the raw file's name
    "webvid_sd15": (dict(width=32, context=64), [64], "v1-5-pruned.ckpt"),
    "webvid_sd21": (dict(width=64, context=128, head_width=64, multipliers=(1, 2), blocks=1), [64, 128],
                    "v2-1_512-ema-pruned.safetensors"),
}
UNET, IMAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
STEPS = "--steps 2 --batch-size 2 --log-every 1 --save-every 2 --preview-every 2 --workers 0".split()
LONG = "a very " + "long " * 72 + "ship purple giraffe"  # 77 tokens are START, 75 words and END


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For layers this small a second thread costs more than it brings, and very much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes
        yield
    torch.set_num_threads(before)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def openclip_text(width, layers):
    """Random weights with OpenCLIP's names, as in the raw 2.1 file."""
    def shaped(*shape):
        return 0.05 * torch.randn(*shape)

    state = {"positional_embedding": shaped(77, width), "token_embedding.weight": shaped(49408, width),
             "ln_final.weight": torch.ones(width), "ln_final.bias": shaped(width), "logit_scale": torch.ones(()),
             "text_projection": shaped(width, width)}
    for i in range(layers):
        parts = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
                 "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
                 "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
                 "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
                 **{f"ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}}
        state |= {f"transformer.resblocks.{i}.{name}": shaped(*shape) for name, shape in parts.items()}
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Raw files of both versions, others that are wrong, and WebVid's CSV beside encoded videos."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("files")
    image = prefixed(IMAGE, ImageAutoencoder(channels=32).state_dict())
    states = {}
    for version, (sizes, _, _) in VERSIONS.items():
        width = sizes["context"]
        text = (prefixed(TEXT + "transformer.text_model.", TextEncoder(width, 1, 1).state_dict())
                if version == "webvid_sd15" else prefixed(TEXT + "model.", openclip_text(width, 2)))
        states[version] = prefixed(UNET, UNet(**sizes).state_dict()) | image | text | {
            "model_ema.decay": torch.ones(()), "betas": torch.zeros(1000)}
    half = {name: tensor.half() for name, tensor in states["webvid_sd15"].items()}  # as Lightning saves, in half
    torch.save({"state_dict": half, "epoch": 3, "callbacks": types.SimpleNamespace(best=1)}, root / "v1-5-pruned.ckpt")
    save_file(states["webvid_sd21"], root / "v2-1_512-ema-pruned.safetensors")

    save_file({name: tensor for name, tensor in states["webvid_sd21"].items() if name.startswith(TEXT)},
              root / "text.safetensors")
    save_file(image, root / "image.safetensors")
    save_file(states["webvid_sd15"] | {UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
              root / "inpainting.safetensors")
    (root / "page.ckpt").write_text("<!DOCTYPE html><html><body>Please log in</body></html>")
    for name in ("v1-5-pruned.ckpt", "v2-1_512-ema-pruned.safetensors"):
        (root / f"cut-{name}").write_bytes((root / name).read_bytes()[:1_000_000])

    shapes = MovingShapes(10, (72, 160), seed=3)
    with open(root / "webvid.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        for i in range(8):
            rows.writerow([1000 + i, "https://nowhere", "PT00H00M01S", f"page{i % 2}", shapes[i]["caption"]])
            os.makedirs(root / f"page{i % 2}", exist_ok=True)
            if i != 5:  # one has vanished
                write_video(str(root / f"page{i % 2}" / f"{1000 + i}.mp4"), shapes[i]["video"], 10)
    (root / "columns.csv").write_text("file,text\na.mp4,a cat\n")
    (root / "prompts.txt").write_text(f"a red circle\n\n{LONG}\na blue square\n")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (100, 70), colour).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def runs(script, files, tmp_path_factory):
    """All three stages of both presets, as a user runs them; also the run folders as they are after the first."""
    made = {}
    for version, (_, size, name) in VERSIONS.items():
        run, encoded = (tmp_path_factory.mktemp(version) / part for part in ("run", "encoded"))
        commands = [["autoencoder.py", "--preset", version, "--data", files / "webvid.csv", "--sd", files / name,
                     "--size", *size, "--frames", 4, *"--width 16 --heads 2 --depth 1".split()],
                    ["content_diffusion.py", "--sd", files / name],  # the preset is now the run's
                    ["motion_diffusion.py", "--text", files / "v2-1_512-ema-pruned.safetensors", "--model", "mini"]]
        for command in commands:
            done = script(*command, *STEPS, "--run-dir", run)
            assert done.returncode == 0, done.stderr
            if command[0] == "autoencoder.py":
                assert "1005.mp4" in done.stderr and "1 unusable left out" in done.stdout
                shutil.copytree(run, encoded)
        made[version] = run, encoded
    return made


def state_of(run, stage):
    return torch.load(run / f"{stage}.pt", weights_only=True)


@pytest.fixture
def call(monkeypatch):
    """call(sample, "--run-dir", path, ...) runs a script's main() in this process."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("version", VERSIONS)
def test_the_unet_is_fine_tuned_with_nothing_added_and_what_is_only_read_is_kept_in_half(runs, files, version):
    run, raw = runs[version][0], read_checkpoint(files / VERSIONS[version][2])
    state = state_of(run, "content")
    unet = {name.removeprefix(UNET): tensor for name, tensor in raw.items() if name.startswith(UNET)}
    for weights in (state["model"], state["ema"]):
        assert {name: tensor.shape for name, tensor in weights.items()} == {
            name: tensor.shape for name, tensor in unet.items()}
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    moved = [(state["model"][name] - tensor.float()).abs().max() for name, tensor in unet.items()]
    assert 0 < max(moved) < 3e-4  # two steps of Adam at 1e-4, from the file's weights
    assert len(state["optimizer"]["param_groups"][0]["params"]) == len(state["optimizer"]["state"]) == len(unet)

    first = state_of(run, "autoencoder")
    assert {name: tensor.dtype for name, tensor in first["image_autoencoder"].items()} == {
        name.removeprefix(IMAGE): torch.float16 for name in raw if name.startswith(IMAGE)}
    assert all(torch.equal(tensor, raw[IMAGE + name].half()) for name, tensor in first["image_autoencoder"].items())
    trained = first["model"].keys() - {"motion_mean", "motion_std"}
    assert len(first["optimizer"]["param_groups"][0]["params"]) == len(trained)

    motion = state_of(run, "motion")
    assert len(motion["optimizer"]["param_groups"][0]["params"]) == len(motion["model"])
    assert motion["model"]["c_embedder.weight"].shape == (128, 128)  # linear, from the 2.1 file's hidden width
    pad_of_sd = 49407 if version == "webvid_sd15" else 0
    for encoder, pad in ((state["text_encoder"], pad_of_sd), (motion["text_encoder"], 0)):
        assert encoder["config"]["pad"] == pad
        assert {tensor.dtype for tensor in encoder["weights"].values()} == {torch.float16}
    prefix, name = ((TEXT + "transformer.text_model.", "final_layer_norm.weight") if version == "webvid_sd15" else
                    (TEXT + "model.", "ln_final.weight"))
    assert torch.equal(state["text_encoder"]["weights"]["final_layer_norm.weight"], raw[prefix + name].half())


@pytest.mark.parametrize("module, stage", [(content_diffusion, "content"), (motion_diffusion, "motion")])
def test_a_run_goes_on_without_the_raw_file_and_its_averages_hold_no_graph(runs, call, tmp_path, monkeypatch, module,
                                                                          stage):
    shutil.copytree(runs["webvid_sd21"][0], tmp_path / "run")
    seen = []
    monkeypatch.setattr(module, "preview", lambda args, step, ema, *rest: seen.extend(ema.parameters()) or {})
    call(module, "--run-dir", tmp_path / "run", "--resume", *STEPS, "--steps", 3)
    assert state_of(tmp_path / "run", stage)["step"] == 3
    assert seen and all(weight.grad_fn is None for weight in seen)  # else every step would add to it


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

FEW = "--steps 3 --motion-steps 2 --batch-size 2".split()


@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_become_clips_and_words_beyond_77_tokens_are_named(script, runs, files, tmp_path, version):
    out = tmp_path / "out"
    done = script("sample.py", "--run-dir", runs[version][0], "--prompts", files / "prompts.txt", *FEW, "--out", out,
                  "--negative-prompt", "blurred")
    assert done.returncode == 0, done.stderr
    assert (out / "captions.txt").read_text() == f"a red circle\n{LONG}\na blue square\n"
    size = VERSIONS[version][1]
    for n in range(3):
        assert read_clip(str(out / f"{n:05d}.mp4"), 4).shape == (4, size[0], size[-1], 3)
    assert os.path.getsize(out / "samples.gif") and os.path.getsize(out / "samples.png")
    warned = [line for line in done.stderr.splitlines() if "77 tokens" in line]
    assert warned and all(line.endswith("sample.py: a prompt is longer than 77 tokens; left out: 'purple giraffe'")
                          for line in warned), done.stderr
    assert len(warned) <= 2  # once for each text encoder


@pytest.fixture
def draw(runs, call, tmp_path, monkeypatch):
    """draw(flags...) samples and returns the content frames and motion latents, (N, C, H, W) and (N, D, L, H'+W')."""
    original = sample.Sampler.draw_motion

    def run(*flags, folder=runs["webvid_sd15"][0]):
        seen = []

        def spy(self, content, wishes, numbers):
            motion = original(self, content, wishes, numbers)
            seen.append((content.clone(), motion.clone()))
            return motion

        monkeypatch.setattr(sample.Sampler, "draw_motion", spy)
        monkeypatch.setattr(sample.Sampler, "decode", lambda _, content, motion: torch.zeros(len(content), 3, 4, 8, 8))
        call(sample, "--run-dir", folder, *FEW, "--out", tmp_path / f"out{len(os.listdir(tmp_path))}", *flags)
        return [torch.cat(parts) for parts in zip(*seen)]

    return run


def test_same_content_draws_one_content_frame_and_many_motions(draw):
    content, motion = draw("--prompt", "a cat", "--num", 3, "--same-content")
    assert torch.equal(content, content[:1].expand_as(content))  # exactly, in two batches
    assert all((motion[i] - motion[j]).abs().max() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))
    content, _ = draw("--prompt", "a cat", "--num", 3)
    assert all((content[i] - content[j]).abs().max() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_prompt_negative_prompt_and_guidance_steer_the_content_frame(draw):
    base, _ = draw("--prompt", "a cat", "--num", 1)
    for flags in (["--prompt", "two dogs in the snow"], ["--prompt", "a cat", "--negative-prompt", "grey fog"],
                  ["--prompt", "a cat", "--guidance", 1]):
        assert (draw(*flags, "--num", 1)[0] - base).abs().max() > 1e-4, flags
    assert torch.equal(draw("--prompt", "a cat", "--negative-prompt", "", "--num", 1)[0], base)
    # Where the prompt is its own negative, guidance does nothing: the formula's two branches are the same.
    without, _ = draw("--prompt", "a cat", "--guidance", 1, "--num", 1)
    both, _ = draw("--prompt", "a cat", "--negative-prompt", "a cat", "--num", 1)
    assert torch.allclose(both, without, atol=1e-3)


def test_an_image_is_the_content_frame_and_needs_no_content_model(runs, files, draw, tmp_path):
    run, folder = runs["webvid_sd21"][0], tmp_path / "part"
    os.makedirs(folder)
    for name in ("autoencoder.pt", "motion.pt"):
        os.symlink(run / name, folder / name)
    image = autoencoder.load_autoencoder(run, torch.device("cpu"))[1]
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        content, motion = draw("--prompt", "waves", "--image", files / f"{name}.png", "--num", 2, folder=folder)
        picture = torch.tensor(colour)[None, :, None, None].expand(1, 3, 64, 128) / 127.5 - 1
        assert torch.allclose(content, image.encode(picture).expand(2, -1, -1, -1), atol=1e-5)
        assert (motion[0] - motion[1]).abs().max() > 0.1


def test_the_types_of_a_gpu_fit_together(runs, files, monkeypatch):
    """As on a GPU: bfloat16 models, half text encoder and image autoencoder, everything between them float32."""
    args = sample.flags().parse_args(["--run-dir", str(runs["webvid_sd15"][0]), "--prompt", "a cat", *FEW])
    args.guidance = args.motion_guidance = 2.0
    with torch.inference_mode():
        sampler = sample.Sampler(args, torch.device("cpu"), torch.float32)
        plain = sampler.draw_content(["a cat"], [0])
        sampler = sample.Sampler(args, torch.device("cpu"), torch.bfloat16)
        sampler.image.half()
        for stage in (sampler.content, sampler.motion):
            stage.text.half()
        content = sampler.draw_content(["a cat"], [0])
        motion = sampler.draw_motion(content, ["a cat"], [0])
        with torch.autocast("cpu", torch.bfloat16):
            frames = sampler.autoencoder.decode(content, motion)
        video = to_pixels(frames, sampler.image)
        latents = to_frames(video, sampler.image)
    assert content.dtype == motion.dtype == video.dtype == latents.dtype == torch.float32
    assert video.shape == (1, 3, 4, 64, 64) and video.isfinite().all() and latents.isfinite().all()
    assert (content - plain).abs().mean() < 0.1 * plain.abs().mean()  # the same frame, less exactly


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

NEW = "--preset webvid_sd15 --size 64 --run-dir {new}"
DAMAGED = "is damaged, or not a file of weights: it starts with b"
MISTAKES = [  # command, words of the one line
    (f"autoencoder.py {NEW} --data {{csv}}", "needs --sd"),
    (f"autoencoder.py {NEW} --sd {{sd15}}", "needs --data"),
    (f"autoencoder.py {NEW} --data {{csv}} --sd /nowhere.ckpt", "/nowhere.ckpt: no such file"),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{files}}/page.ckpt", f"page.ckpt {DAMAGED}'<!DOCTYPE html><'"),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{files}}/cut-v1-5-pruned.ckpt", DAMAGED),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{files}}/cut-v2-1_512-ema-pruned.safetensors", DAMAGED),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{csv}}", DAMAGED),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{files}}/text.safetensors", "no Stable Diffusion image autoencoder"),
    (f"autoencoder.py {NEW} --data {{files}}/columns.csv --sd {{sd15}}", "columns are 'file, text'; needed are"),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{sd15}} --size 64 72", "--size 64 72: height and width must be "
                                                                        "multiples of 16"),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{sd15}} --patch 4 --size 48", "multiples of 32"),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{sd15}} --size 64 64 64", "one number, or height and width"),
    (f"autoencoder.py {NEW} --data {{csv}} --sd {{sd15}} --lpips a b", "--lpips compares pixels"),
    ("autoencoder.py --preset ucf101 --run-dir {new} --data {files} --sd {sd15}", "works on pixels: drop --sd"),
    ("content_diffusion.py --run-dir {encoded}", "--model sd needs --sd"),
    ("content_diffusion.py --run-dir {encoded} --sd {files}/text.safetensors",
     "is not a Stable Diffusion 1.5 or 2.1 file: it holds 30 tensors, the first named cond_stage_model."),
    ("content_diffusion.py --run-dir {encoded} --sd {files}/image.safetensors", "the first named first_stage_model."),
    ("content_diffusion.py --run-dir {encoded} --sd {files}/inpainting.safetensors",
     "this U-Net has 9 input channels, as inpainting models"),
    ("content_diffusion.py --run-dir {encoded} --sd {files}/page.ckpt", DAMAGED),
    ("motion_diffusion.py --run-dir {encoded}", "needs --text"),
    ("motion_diffusion.py --run-dir {encoded} --text {files}/image.safetensors", "this file has no text encoder"),
    ("motion_diffusion.py --run-dir {encoded} --text {files}/cut-v1-5-pruned.ckpt", DAMAGED),
    ("motion_diffusion.py --run-dir {encoded} --text {sd15} --model mini --content-patch 3", "choose another"),
    ("sample.py --run-dir {run}", "say what to draw with --prompt or --prompts"),
    ("sample.py --run-dir {run} --label 3", "is conditioned on text: say what to draw with --prompt"),
    ("sample.py --run-dir {run} --prompt x --prompts {files}/prompts.txt", "only one of --prompt and --prompts"),
    ("sample.py --run-dir {run} --prompts {files}/page.ckpt --image {csv}", "cannot be read as a picture"),
]


def everything_in(folder):
    return sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names
                  if not name.endswith(".lock"))


@pytest.mark.parametrize("command, words", MISTAKES)
def test_a_mistake_is_one_clear_line_and_leaves_nothing_behind(files, runs, call, tmp_path, command, words):
    run, encoded = runs["webvid_sd15"]
    before = everything_in(run), everything_in(encoded)
    name, *flags = command.format(files=files, csv=files / "webvid.csv", sd15=files / "v1-5-pruned.ckpt", run=run,
                                  encoded=encoded, new=tmp_path / "new").split()
    with pytest.raises(InputError) as caught:
        call(sys.modules[name[:-3]], *flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists() and before == (everything_in(run), everything_in(encoded))


@pytest.mark.parametrize("command, line", [
    ("autoencoder.py --preset webvid_sd21 --data {files}/webvid.csv --sd {files}/page.ckpt --run-dir {new}",
     "autoencoder.py: {files}/page.ckpt is damaged, or not a file of weights: it starts with"),
    ("sample.py --run-dir {run} --prompts {files}/page0", "sample.py: [Errno 21] Is a directory: '{files}/page0'"),
    ("sample.py --run-dir {run} --prompts {files}/red.png", "sample.py: {files}/red.png is not a text file in UTF-8")])
def test_a_mistake_in_a_process_is_that_line_and_no_traceback(script, files, runs, tmp_path, command, line):
    places = dict(files=files, new=tmp_path / "new", run=runs["webvid_sd15"][0])
    done = script(*command.format(**places).split())
    assert done.returncode == 1 and not (tmp_path / "new").exists()
    assert done.stderr.startswith(line.format(**places)) and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# A picture through both autoencoders


@pytest.mark.slow
def test_a_picture_with_the_motion_of_a_still_clip_comes_back_as_the_image_autoencoder_alone_returns_it(tmp_path):
    """Trains a small image autoencoder, then stage 1 on its latents of still and moving clips, half a minute in all.

    Measured on six pictures of 32x32: the whole path's are 46 to 49 dB from the image autoencoder's own, and at most
    0.15 dB further from the original (which that one, so briefly trained, returns at 19 to 22 dB). With the motion
    of another clip they are 26 to 32 dB from it.
    """
    torch.manual_seed(0)
    frames, batch = 4, 8
    shapes, test = MovingShapes(frames, 32, seed=1), MovingShapes(frames, 32, seed=1, split="test")
    clips = torch.stack([shapes[i]["video"] for i in range(480)])
    image = ImageAutoencoder(channels=32, multipliers=(1, 1), blocks=1)  # halves each side
    model = Autoencoder(channels=4, frames=frames, size=16, patch=2, width=64, depth=2, heads=4)

    def train(module, steps, loss_of):
        optimizer = torch.optim.Adam(module.parameters(), betas=(0.9, 0.99))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
            loss_of().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        module.requires_grad_(False).eval()

    def image_loss():
        pictures = clips[torch.randint(len(clips), (batch,)), :, torch.randint(frames, (batch,))]
        return (image.decode(image.encode(pictures)) - pictures).square().mean()

    train(image, 100, image_loss)
    latents = torch.cat([to_frames(part, image) for part in clips.split(16)])
    image.scale /= latents.std().item()  # to unit variance, as Stable Diffusion's 0.18215 does
    latents /= latents.std()

    def video_loss():
        moving, still = latents[torch.randint(len(latents), (4,))].split(2)
        video = torch.cat([moving, still[:, :, :1].expand_as(still)])
        return (model(video) - video).square().mean()

    train(model, 300, video_loss)
    for i in range(6):
        picture = test[i]["video"].permute(1, 2, 3, 0)[0]
        Image.fromarray((picture.numpy() * 127.5 + 128).astype(np.uint8)).save(tmp_path / f"{i}.png")
        picture = sample.read_image(tmp_path / f"{i}.png", (32, 32))  # (1, 3, 1, 32, 32)
        latent = to_frames(picture, image)
        content, motion = model.encode(latent.expand(-1, -1, frames, -1, -1))
        assert torch.allclose(content, latent[:, :, 0], atol=1e-5)  # the content frame is the picture's own latent
        alone = to_pixels(latent, image).expand(-1, -1, frames, -1, -1)
        whole, other = (to_pixels(model.decode(latent[:, :, 0], z), image)
                        for z in (motion, model.encode(latents[i : i + 1])[1]))
        assert psnr(whole, alone) > 42 and psnr(other, alone) < 36
        assert psnr(whole, picture.expand_as(whole)) > psnr(alone, picture.expand_as(whole)) - 0.3
