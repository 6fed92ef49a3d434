"""Proves that the parts of Stable Diffusion equal diffusers', transformers' and open_clip's on random weights
(converted by their converters), have the real files' names, shapes and cost at full size, and that raw files are read
safely."""

import os
import pathlib
import pickle
import re
import struct
import sys
import types
import warnings
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from macs import count_macs

os.environ["HF_HUB_OFFLINE"] = "1"
from autoencoder import ImageAutoencoder, load_image_autoencoder, load_weights, open_image_autoencoder, read_checkpoint
from content_diffusion import (
    DiT,
    TextEncoder,
    UNet,
    build_text_encoder,
    load_dit,
    load_stable_diffusion,
    load_text_encoder,
    sincos_positions,
    tokenize,
)
from data import InputError

diffusers = pytest.importorskip("diffusers")
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
from diffusers.loaders import single_file_utils as convert  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

UNETS = {"1.5": dict(width=32, context=64), "2.1": dict(width=64, context=128, head_width=64)}


def randomised(module, seed=0):
    """Every parameter moved away from its initial value: norms of 1 and 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.add_(noise * (0.2 if parameter.ndim == 1 else 0.02))
    return module.eval()


def close(ours, reference):
    """Maximum difference under 1e-4 of the output's scale."""
    assert ours.shape == reference.shape and reference.abs().max() > 1e-2
    return (ours - reference).abs().max() < 1e-4 * reference.abs().max()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def reference_unet(width, context, head_width=None, heads=8):
    widths = [width * m for m in (1, 2, 4, 4)]
    return diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, layers_per_block=2, cross_attention_dim=context,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        attention_head_dim=[w // head_width for w in widths] if head_width else heads,
        norm_num_groups=min(32, width // 4),  # 32 in the real files
        use_linear_projection=head_width is not None).eval()


def reference_autoencoder(channels=128, multipliers=(1, 2, 4, 4), blocks=2):
    levels = len(multipliers)
    return diffusers.AutoencoderKL(
        block_out_channels=[channels * m for m in multipliers], layers_per_block=blocks, latent_channels=4,
        norm_num_groups=min(32, channels // 4), down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels).eval()


def clip_config(width=768, layers=12, heads=12, act="quick_gelu"):
    return transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=act, projection_dim=width)


def openclip_text(width=1024, layers=24, heads=16):
    return open_clip.transformer.TextTransformer(width=width, layers=layers, heads=heads, output_dim=width)


# ---------------------------------------------------------------------------------------------------------------------
# The parts against their references


@pytest.mark.parametrize("version", UNETS)
@pytest.mark.parametrize("size", [(8, 16), (9, 13)])
def test_unet_equals_diffusers(version, size):
    unet, reference = randomised(UNet(**UNETS[version])), reference_unet(**UNETS[version])
    state = prefixed("model.diffusion_model.", unet.state_dict())
    reference.load_state_dict(convert.convert_ldm_unet_checkpoint(state, reference.config))
    x, t = torch.randn(2, 4, *size), torch.tensor([7, 981])
    context = torch.randn(2, 77, UNETS[version]["context"])
    with torch.no_grad():
        ours, theirs = unet(x, t, context), reference(x, t, context).sample
    assert close(ours, theirs)


def test_unet_checkpointing_changes_nothing_and_bfloat16_little():
    unet = randomised(UNet(**UNETS["1.5"])).to(memory_format=torch.channels_last).train()
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 77, 64)
    plain = unet(x, t, context)
    plain.square().mean().backward()
    gradients = [p.grad.clone() for p in unet.parameters()]
    unet.zero_grad()
    unet.checkpointing = True
    again = unet(x, t, context)
    again.square().mean().backward()
    assert torch.allclose(plain, again, atol=1e-6)
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(unet.parameters(), gradients))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (unet(x, t, context) - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("sizes", [dict(channels=32), dict(channels=32, multipliers=(1, 2, 2), blocks=1),
                                   dict(channels=48, multipliers=(1, 3), blocks=3)])
def test_image_autoencoder_equals_diffusers_in_any_chunks_and_its_sizes_are_read_from_the_tensors(sizes):
    ours, reference = randomised(ImageAutoencoder(**sizes)), reference_autoencoder(**sizes)
    state = prefixed("first_stage_model.", ours.state_dict())
    reference.load_state_dict(convert.convert_ldm_vae_checkpoint(state, reference.config))
    ours, factor = open_image_autoencoder(ours.state_dict(), torch.device("cpu")), ours.factor
    images, latents = torch.rand(3, 3, 32, 48) * 2 - 1, torch.randn(3, 4, 32 // factor, 48 // factor)
    with torch.no_grad():
        assert close(ours.encode(images, chunk=2), 0.18215 * reference.encode(images).latent_dist.mean)
        assert close(ours.decode(latents, chunk=2), reference.decode(latents / 0.18215).sample)
        assert torch.allclose(ours.decode(latents, chunk=1), ours.decode(latents, chunk=3), atol=1e-5)


def test_image_autoencoder_takes_chunks_one_after_another():
    ours, seen = ImageAutoencoder(channels=32), []
    ours.decoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        ours.decode(torch.randn(5, 4, 2, 2), chunk=2)
    assert seen == [2, 2, 1]


def test_no_part_holds_a_whole_attention_matrix():
    """It would be 8192 x 8192 at 512x1024. Only the fused kernels avoid it, and they require certain strides."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    image, unet, text = ImageAutoencoder(channels=32), UNet(**UNETS["1.5"]), TextEncoder(64, 1, 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot
        image.decode(image.encode(torch.randn(1, 3, 16, 16)))
        image.to(memory_format=torch.channels_last).encode(torch.randn(1, 3, 16, 16))
        unet(torch.randn(1, 4, 8, 8), torch.tensor([3]), text.encode(["a cat"]))


CAPTIONS = ["a red circle moving left", "", "Two DOGS, playing; in the snow!"]


@pytest.mark.parametrize("pad", [49407, 0])
@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", ""])
def test_clip_text_encoder_equals_transformers(tmp_path, pad, prefix):
    reference = randomised(transformers.CLIPTextModel(clip_config(128, 2, 2)), seed=1)
    state = {name.removeprefix("text_model."): tensor for name, tensor in reference.state_dict().items()}
    state["embeddings.position_ids"] = torch.arange(77)[None]  # in the real file
    save_file(prefixed(prefix, state) | {"vision_model.a": torch.zeros(1)}, tmp_path / "clip.safetensors")
    encoder = load_text_encoder(tmp_path / "clip.safetensors")
    assert encoder.pad == 49407 and not any(p.requires_grad for p in encoder.parameters())
    tokens = tokenize(CAPTIONS, pad)
    with torch.no_grad():
        assert close(encoder(tokens), reference(tokens).last_hidden_state)
        if pad == encoder.pad:
            assert torch.equal(encoder.encode(CAPTIONS), encoder(tokens))


@pytest.mark.parametrize("pad", [49407, 0])
@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", ""])
def test_openclip_text_encoder_equals_open_clip_up_to_its_last_but_one_layer(tmp_path, pad, prefix):
    reference = randomised(openclip_text(128, 3, 2), seed=1)
    unused = {"attn_mask": torch.zeros(77, 77), "logit_scale": torch.ones(())}  # in the real file
    state = prefixed(prefix, reference.state_dict() | unused)
    torch.save(state | {"visual.conv1.weight": torch.zeros(2, 2)}, tmp_path / "openclip.bin")
    encoder = load_text_encoder(tmp_path / "openclip.bin")
    assert encoder.pad == 0 and len(encoder.encoder["layers"]) == 2
    tokens = tokenize(CAPTIONS, pad)
    with torch.no_grad():
        x, mask = reference._embeds(tokens)
        for block in list(reference.transformer.resblocks)[:-1]:
            x = block(x, attn_mask=mask)
        assert close(encoder(tokens), reference.ln_final(x))


def test_captions_are_tokenised_as_open_clip_does_and_padded_both_ways():
    expected = open_clip.get_tokenizer("ViT-H-14")(CAPTIONS)
    assert torch.equal(tokenize(CAPTIONS, 0), expected)
    ended = tokenize(CAPTIONS, 49407)
    for ours, theirs in zip(ended, expected):
        end = theirs.argmax() + 1
        assert torch.equal(ours[:end], theirs[:end]) and (ours[end:] == 49407).all() and (theirs[end:] == 0).all()
    assert expected[1].tolist() == [49406, 49407] + [0] * 75


def test_words_beyond_77_tokens_are_named_in_one_warning_and_the_end_token_stays():
    long = " ".join(["cat"] * 75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = tokenize([long], 0)
    assert exact[0, -1] == 49407 and exact[0, -2] != 49407
    with pytest.warns(UserWarning) as caught:
        tokens = tokenize([long + " purple giraffe", "a dog", long + " zebra"], 0)
    assert len(caught) == 1
    assert "'purple giraffe'" in str(caught[0].message) and "1 more" in str(caught[0].message)
    assert torch.equal(tokens[0], exact[0]) and torch.equal(tokens[2], exact[0])


# ---------------------------------------------------------------------------------------------------------------------
# Full size, on the meta device: names, shapes, parameters, cost


def same_names_and_shapes(converted, reference, count):
    """Their converter maps our names one to one onto their model's; `count` is the real file's number of tensors."""
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert len(converted) == count


@pytest.mark.parametrize("sizes, parameters", [
    (dict(), 859_520_964), (dict(context=1024, head_width=64), 865_910_724)], ids=["1.5", "2.1"])
def test_full_size_unet_has_the_real_file_s_tensors_and_cost(sizes, parameters):
    with torch.device("meta"):
        unet, reference = UNet(**sizes), reference_unet(**dict(width=320, context=768) | sizes)
        inputs = torch.randn(1, 4, 64, 64), torch.zeros(1), torch.randn(1, 77, sizes.get("context", 768))
    state = unet.state_dict()
    same_names_and_shapes(convert.convert_ldm_unet_checkpoint(
        prefixed("model.diffusion_model.", state), reference.config), reference, 686)
    assert len(state) == 686 and sum(p.numel() for p in unet.parameters()) == parameters
    for name in ("input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias", "input_blocks.3.0.op.weight",
                 "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "middle_block.1.norm.weight",
                 "input_blocks.4.0.skip_connection.weight", "output_blocks.11.1.transformer_blocks.0.ff.net.2.bias"):
        assert name in state  # a few of the real names, by heart, in case the converter is wrong in the same way
    assert {layer.num_groups for layer in unet.modules() if isinstance(layer, torch.nn.GroupNorm)} == {32}
    assert count_macs(unet, *inputs) == pytest.approx(0.339e12, rel=0.02)  # tables 8 and 9; both versions match


def test_full_size_image_autoencoder_has_the_real_file_s_tensors_and_cost():
    with torch.device("meta"):
        ours, reference = ImageAutoencoder(), reference_autoencoder()
        images, latents = torch.randn(16, 3, 512, 1024), torch.randn(16, 4, 64, 128)
    state = ours.state_dict()
    converted = convert.convert_ldm_vae_checkpoint(prefixed("first_stage_model.", state), reference.config)
    same_names_and_shapes(converted, reference, 248)
    assert {layer.num_groups for layer in ours.modules() if isinstance(layer, torch.nn.GroupNorm)} == {32}
    assert len(state) == 248 and state["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert "decoder.up.3.upsample.conv.weight" in state and "encoder.down.0.downsample.conv.bias" in state
    assert count_macs(ours, images, call=ours.encode) == pytest.approx(17.3e12, rel=0.02)
    assert count_macs(ours, latents, call=ours.decode) == pytest.approx(39.7e12, rel=0.02)


def test_full_size_text_encoders_have_the_real_files_tensors():
    with torch.device("meta"):
        small, reference = TextEncoder(), transformers.CLIPTextModel(clip_config())
        large, openclip = TextEncoder(1024, 23, 16, quick_gelu=False, pad=0), openclip_text()
    assert {name.removeprefix("text_model."): tensor.shape for name, tensor in reference.state_dict().items()} == {
        name: tensor.shape for name, tensor in small.state_dict().items()}
    assert len(small.state_dict()) == 196 and sum(p.numel() for p in small.parameters()) == 123_060_480
    state = openclip.state_dict()
    assert len(state) == 5 + 24 * 12  # and text_projection, logit_scale and attn_mask in the real file
    encoder = build_text_encoder(state, "the file")
    assert encoder.config == large.config
    assert {name: tensor.shape for name, tensor in encoder.state_dict().items()} == {
        name: tensor.shape for name, tensor in large.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Raw Stable Diffusion files


@pytest.fixture(scope="module")
def states():
    """Small files of both versions, with every part that the real ones have."""
    both = {}
    for version, sizes in UNETS.items():
        text = transformers.CLIPTextModel(clip_config(64, 2, 1)) if version == "1.5" else openclip_text(128, 3, 2)
        prefix = "cond_stage_model.transformer.text_model." if version == "1.5" else "cond_stage_model.model."
        unet = randomised(UNet(**sizes))
        both[version] = (
            prefixed("model.diffusion_model.", unet.state_dict()) | prefixed(prefix, text.state_dict())
            | prefixed("first_stage_model.", randomised(ImageAutoencoder(channels=32)).state_dict())
            | {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(()),
               "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
               "first_stage_model.loss.logvar": torch.zeros(())})
        both[version] = {name.replace("text_model.text_model", "text_model"): tensor.contiguous()
                         for name, tensor in both[version].items()}
    return both


def load_quietly(path):
    with pytest.warns(UserWarning, match="not a trained one"):  # random weights do not predict the noise
        return load_stable_diffusion(path)


@pytest.mark.parametrize("version, pad", [("1.5", 49407), ("2.1", 0)])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "half", "legacy"])
def test_both_versions_load_from_every_kind_of_file(states, tmp_path, version, pad, kind):
    state = states[version]
    if kind == "safetensors":
        save_file(state, path := tmp_path / "sd.safetensors")
    else:
        path = tmp_path / "sd.ckpt"
        state = {name: tensor.half() for name, tensor in state.items()} if kind == "half" else state
        torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: torch.zeros(2)}}]}, path,
                   _use_new_zipfile_serialization=kind != "legacy")
    unet, encoder = load_quietly(path)
    os.remove(path)  # nothing may still be read from the file
    assert (encoder.pad, unet.context) == (pad, encoder.width)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in (*unet.parameters(), *encoder.parameters()))
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, state["model.diffusion_model." + name].float())
    assert unet.output_blocks[3][1].transformer_blocks[0].attn1.heads == (8 if version == "1.5" else 4)
    assert unet(torch.randn(1, 4, 8, 8), torch.tensor([3]), encoder.encode(["a cat"])).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_image_autoencoder_loads_from_full_and_bare_files_also_with_linear_attention(tmp_path, prefix):
    model = randomised(ImageAutoencoder(channels=32))
    state = {name: tensor[..., 0, 0] if ".attn_1." in name and tensor.ndim == 4 else tensor
             for name, tensor in model.state_dict().items()}
    extra = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    torch.save({"state_dict": prefixed(prefix, state) | extra}, tmp_path / "vae.ckpt")
    loaded = load_image_autoencoder(tmp_path / "vae.ckpt")
    images = torch.randn(1, 3, 16, 16)
    assert close(loaded.encode(images), model.encode(images)) and not next(loaded.parameters()).requires_grad


def changed(state, drop=(), add=None):
    return {name: t for name, t in state.items() if not name.startswith(tuple(drop) or ("\0",))} | (add or {})


U, C = "model.diffusion_model.", "cond_stage_model."
WRONG_FILES = {
    "inpainting": (lambda s: changed(s, add={U + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}),
                   "this U-Net has 9 input channels"),
    "no text encoder": (lambda s: changed(s, drop=[C]), "this file has no text encoder"),
    "missing tensor": (lambda s: changed(s, drop=[U + "out.2.bias"]), r'U-Net: .*Missing.*"out\.2\.bias"'),
    "extra tensor": (lambda s: changed(s, add={U + "pet.bias": torch.zeros(2)}), r'U-Net: .*Unexpected.*"pet\.bias"'),
    "misshaped tensor": (lambda s: changed(s, add={U + "out.2.bias": torch.zeros(7)}),
                         r"U-Net: .*size mismatch for out\.2\.bias.*\[7\].*\[4\]"),
    "misshaped text": (lambda s: changed(s, add={C + "transformer.text_model.final_layer_norm.bias": torch.zeros(7)}),
                       r"text encoder: .*size mismatch for final_layer_norm\.bias"),
    "SDXL": (lambda s: changed(s, drop=[C], add={"conditioner.embedders.0.a": torch.zeros(1),
                                                 U + "label_emb.0.0.weight": torch.zeros(1)}), "SDXL"),
    "LoRA": (lambda s: {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)},
             "is not a Stable Diffusion 1.5 or 2.1 file: it holds 1 tensors, the first named lora_unet_down_blocks_0"),
    "only the autoencoder": (lambda s: changed(s, drop=[U, C]), "first_stage_model.encoder.conv_in.weight"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_s_error_says_what_the_file_is(states, tmp_path, kind):
    change, message = WRONG_FILES[kind]
    torch.save(change(states["1.5"]), tmp_path / "sd.ckpt")
    with pytest.raises(InputError, match=message) as caught:
        load_stable_diffusion(tmp_path / "sd.ckpt")
    assert "\n" not in str(caught.value)


def test_noise_agreement_tells_a_model_that_returns_its_input(states):
    from content_diffusion import noise_agreement
    encoder = TextEncoder(64, 1, 1)
    unet = randomised(UNet(**UNETS["1.5"]))
    assert abs(noise_agreement(unet, encoder)) < 0.5
    unet.forward = lambda x, t, context: 0.9 * x + 0.1 * unet.out(torch.randn(1, 32, *x.shape[2:])) * (t == 999)
    assert noise_agreement(unet, encoder) > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Reading files: safe, and clear about what is wrong


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {"a": torch.randn(3, 5), "half": torch.randn(7).half(), "b16": torch.randn(2, 2).bfloat16(),
            "long": torch.arange(5), "bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5),
            "view": base[1:3, ::2], "transposed": base.T, "shared": base, "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.randn(2))}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t}, lambda t: {"model": t, "step": 1},
                                  lambda t: {"ema": t, "model": {"a": torch.zeros(1)}, "args": [1.5, None, "x", {2}]},
                                  lambda t: {"module": OrderedDict(("module." + k, v) for k, v in t.items())}])
def test_every_tensor_comes_back_as_it_was(tensors, tmp_path, new, wrap):
    torch.save(wrap(tensors), tmp_path / "x.anything", _use_new_zipfile_serialization=new)
    read = read_checkpoint(tmp_path / "x.anything")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) and not read[name].requires_grad


def test_safetensors_are_recognised_by_content(tmp_path):
    save_file({"a": torch.ones(2, 3).half()}, tmp_path / "x.ckpt", {"who": "me"})
    assert torch.equal(read_checkpoint(tmp_path / "x.ckpt")["a"], torch.ones(2, 3).half())


@pytest.fixture
def lightning_file(tmp_path):
    """lightning_file(new format?) writes a checkpoint with objects of a module that no longer exists, and returns its
    path."""
    import numpy as np

    module = types.ModuleType("lightning_fake")
    exec("class ModelCheckpoint:\n    def __init__(self, best=None): self.best = best\n"
         "class Config(dict):\n    pass\n"
         "class Stack(list):\n    pass\n"
         "class Slots:\n    __slots__ = ['a']\n"
         "def build(*args): raise AssertionError('code of the file was executed')\n"
         "class Built:\n    def __reduce__(self): return build, (1, 2), {'state': 3}\n", module.__dict__)
    for name in ("ModelCheckpoint", "Config", "Stack", "Slots", "build", "Built"):
        module.__dict__[name].__module__ = module.__name__
    items = [1, 2] if torch.__version__ >= (2, 14) else []  # torch 2.6 refuses lists of unknown classes with items
    config, stack, slots = module.Config(parameterization="v", lr=[1, 2]), module.Stack(items), module.Slots()
    config.note = stack.note = slots.a = "an attribute"
    state = {"state_dict": {"w": torch.ones(2)}, "built": module.Built(), "slots": slots, "list": stack,
             "one": module.Config(x=1), "append": module.Stack(items[:1]),
             "callbacks": {module.ModelCheckpoint: {"best": module.ModelCheckpoint(1)}, module.Config: 2},
             "keys": {module.ModelCheckpoint(2): 1, module.ModelCheckpoint(3): 2}, "hyper_parameters": config,
             "score": np.float64(3.0), "array": np.arange(3), "sets": [{1, 2}, frozenset("ab"), {module.Config}],
             "counts": Counter("aab"), "namespace": types.SimpleNamespace(a=1), "path": pathlib.PurePosixPath("a/b"),
             "device": torch.device("cpu"), "dtype": torch.float16,
             "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])}

    def write(new):
        sys.modules[module.__name__] = module
        try:
            torch.save(state, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new)
        finally:
            del sys.modules[module.__name__]
        return tmp_path / "x.ckpt"

    return write


def test_objects_of_unknown_classes_are_read_as_inert(lightning_file):
    read = read_checkpoint(lightning_file(new=True))
    assert list(read) == ["w"] and torch.equal(read["w"], torch.ones(2)) and "lightning_fake" not in sys.modules


def test_in_the_old_format_they_are_refused_in_one_line(lightning_file):
    with pytest.raises(InputError, match="Unsupported global: GLOBAL lightning_fake") as caught:
        read_checkpoint(lightning_file(new=False))
    assert "\n" not in str(caught.value)


class Attack:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def attacks(target):
    import importlib
    import runpy
    import shutil
    import subprocess
    touch = f"open({str(target)!r}, 'w')"
    return {"posix.system": Attack(os.system, f"touch {target}"), "builtins.eval": Attack(eval, touch),
            "builtins.exec": Attack(exec, touch), "io.open": Attack(open, str(target), "w"),
            "builtins.getattr": Attack(getattr, "x", "upper"), "builtins.__import__": Attack(__import__, "antigravity"),
            "subprocess.Popen": Attack(subprocess.Popen, ["touch", str(target)]),
            "subprocess.check_call": Attack(subprocess.check_call, ["touch", str(target)]),
            "runpy._run_code": Attack(runpy._run_code, touch, {}),
            "shutil.copyfile": Attack(shutil.copyfile, __file__, str(target)),
            "importlib.import_module": Attack(importlib.import_module, "antigravity"),
            "pickle.loads": Attack(pickle.loads, b"N.")}


def refused(path, words):
    with pytest.raises(InputError, match=words) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", attacks("x"))
def test_a_file_that_tries_to_run_code_is_refused_in_one_line_and_nothing_runs(tmp_path, name):
    target, path, function = tmp_path / "owned", tmp_path / "x.ckpt", name.split(".")[-1]
    for attack in attacks(target)[name], {attacks(target)[name]: 1}:
        torch.save({"state_dict": {"w": torch.ones(2)}, "x": attack}, path)
        refused(path, f"is refused: .*{function}")
        torch.save({"state_dict": {"w": torch.ones(2)}, "x": attack}, path, _use_new_zipfile_serialization=False)
        refused(path, f"is damaged, or not a file of weights.*{function}")
        path.write_bytes(pickle.dumps(attack))
        refused(path, "is damaged, or not a file of weights")
    assert not target.exists() and "antigravity" not in sys.modules


def test_a_function_that_is_not_python_s_own_is_not_called_either(tmp_path):
    target = tmp_path / "owned"
    calls = Attack(torch.save, 1, str(target)), Attack(torch.hub.load, "a/b", "c"), Attack(save_file, {}, str(target))
    torch.save({"w": torch.ones(2), "x": calls}, tmp_path / "x.ckpt")
    assert list(read_checkpoint(tmp_path / "x.ckpt")) == ["w"] and not target.exists()


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "compressed one, as TorchScript is")


def broken_files(folder):
    weights = {"w": torch.randn(300, 300), "v": torch.randn(300, 300)}
    save_file(weights, folder / "good.safetensors")
    torch.save(weights, folder / "good.ckpt")
    torch.save(weights, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    damaged = "is damaged, or not a file of weights: it starts with "
    files = {"page": b"\n<!DOCTYPE html><html>...", "empty": b"", "pickle": pickle.dumps({"a": 1}),
             "pointer": b"version https://git-lfs.github.com/spec/v1\noid", "gif": b"GIF89a........................",
             "length.safetensors": struct.pack("<Q", 10**15) + b'{"a": 1}'}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        yield name, damaged + re.escape(str(content[:16]))
    for name in ("good.safetensors", "good.ckpt", "old.ckpt"):
        content = (folder / name).read_bytes()
        for part in (0.1, 0.5, 0.98):
            (folder / f"{part}{name}").write_bytes(content[:int(part * len(content))])
            yield f"{part}{name}", damaged
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("photo.txt", "hello")
    yield "photos.zip", damaged
    torch.save([1, 2], folder / "list.pt")
    yield "list.pt", "holds no tensors"
    (folder / "folder.ckpt").mkdir()
    yield "folder.ckpt", "is a folder"
    yield "nowhere.ckpt", "no such file"


def test_each_broken_file_is_one_clear_line(tmp_path):
    for name, words in broken_files(tmp_path):
        refused(tmp_path / name, words)


def test_load_weights_casts_and_copies_into_meta_modules_and_names_what_does_not_fit():
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 3)
    weights = {"weight": torch.randn(3, 2), "bias": torch.randn(3).half()}
    load_weights(layer, weights, "x")
    assert layer.bias.dtype == torch.float32 and layer.weight.data_ptr() != weights["weight"].data_ptr()
    assert torch.equal(layer.weight, weights["weight"])
    message = r'^x: Error.* Missing key.*"bias".* Unexpected key.*"a", "b", "c", "d", "e"'
    with pytest.raises(InputError, match=message):
        load_weights(layer, {"weight": torch.zeros(3, 2)} | {name: torch.zeros(1) for name in "abcde"}, "x")


# ---------------------------------------------------------------------------------------------------------------------
# DiT's ImageNet weights


SMALL = dict(width=32, depth=2, heads=2)


@pytest.fixture
def dit_file(tmp_path):
    """A small file as DiT-XL-2-256x256.pt is: sigma in the output, positions stored, 1000 classes."""
    source = randomised(DiT(channels=4, size=8, patch=2, classes=1000, **SMALL), seed=3)
    state = source.state_dict() | {"pos_embed": sincos_positions(4, 4, 32)[None]}
    for kind in ("weight", "bias"):  # (p, q, channel): behind each pixel's 4 channels come its 4 sigmas
        rows = state[f"final_layer.linear.{kind}"].unflatten(0, (2, 2, 4))
        state[f"final_layer.linear.{kind}"] = torch.cat([rows, torch.full_like(rows, 9)], 2).flatten(0, 2)
    torch.save(state, tmp_path / "dit.pt")
    return source, tmp_path / "dit.pt"


def test_dit_loads_without_sigma_and_with_new_classes(dit_file):
    source, path = dit_file
    dit = DiT(channels=4, size=8, patch=2, classes=101, **SMALL)
    before = dit.y_embedder.embedding_table.weight.clone()
    assert load_dit(path, dit) == f"{path}: not used are its 1000 classes"
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():  # without a class both are the same function
        assert torch.allclose(dit(x, t, torch.tensor([101, 101])), source(x, t, torch.tensor([1000, 1000])), atol=1e-5)
    assert torch.equal(dit.y_embedder.embedding_table.weight[:-1], 0.02 * before[:-1])  # the scale of the file's own
    assert all(p.requires_grad for p in dit.parameters())


def test_dit_adapts_to_another_grid_patch_and_channels(dit_file):
    source, path = dit_file
    wide = DiT(channels=4, size=(8, 16), patch=2, classes=3, **SMALL)
    assert load_dit(path, wide) == f"{path}: not used are its 1000 classes"
    assert torch.equal(wide.pos_embed[0], sincos_positions(4, 8, 32))
    for dit in (DiT(channels=4, size=16, patch=4, classes=3, **SMALL), DiT(channels=3, size=8, patch=2, **SMALL)):
        before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
        assert load_dit(path, dit).endswith("its 1000 classes, its first and last layer (4 channels, patch 2)")
        for name, tensor in dit.state_dict().items():
            fresh = name.startswith(("x_embedder.", "final_layer.linear."))
            if name != "y_embedder.embedding_table.weight":
                assert torch.equal(tensor, before[name] if fresh else source.state_dict()[name]), name


def test_another_width_depth_or_kind_of_file_is_an_error(dit_file, tmp_path):
    with pytest.raises(InputError, match=r"size mismatch.*\b32\b.*\b64\b"):
        load_dit(dit_file[1], DiT(channels=4, size=8, width=64, depth=2, heads=2))
    with pytest.raises(InputError, match=r"Unexpected key.*blocks\.1"):
        load_dit(dit_file[1], DiT(channels=4, size=8, width=32, depth=1, heads=2))
    torch.save({"lora_a": torch.zeros(1)}, tmp_path / "lora.pt")
    with pytest.raises(InputError, match="is not a DiT checkpoint: it holds 1 tensors, the first named lora_a"):
        load_dit(tmp_path / "lora.pt", DiT(channels=4, size=8, **SMALL))
