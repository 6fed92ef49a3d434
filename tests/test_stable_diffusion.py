"""Proves that the parts of Stable Diffusion equal diffusers', transformers' and open_clip's on random weights, which
their converters convert; that at full size they have the real files' names, shapes and cost; and that they and DiT load
from every kind of raw file. A wrong file is named in one line; those that mean harm are in test_hostile.py."""

import functools
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from bench import macs
from safetensors.torch import save_file

import content_diffusion
from autoencoder import ImageAutoencoder, load_image_autoencoder, load_weights, open_image_autoencoder, read_checkpoint
from content_diffusion import DiT, TextEncoder, UNet, load_dit, load_stable_diffusion, load_text_encoder, tokenize

UNETS = {"1.5": dict(width=32, context=64), "2.1": dict(width=64, context=128, head_width=64)}
CAPTIONS = ["a red circle moving left", "", "Two DOGS, playing; in the snow!"]
SMALL = dict(width=32, depth=2, heads=2)


def randomised(module, seed=0):
    """Every parameter moved away from its initial value: norms of 1 and 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += noise * (0.2 if parameter.ndim == 1 else 0.02)
    return module.eval().requires_grad_(False)


def close(ours, reference):
    """Maximum difference under 1e-4 of the output's scale."""
    assert ours.shape == reference.shape and reference.abs().max() > 1e-2
    return (ours - reference).abs().max() < 1e-4 * reference.abs().max()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def shapes(state, remove=""):
    return {name.removeprefix(remove): tensor.shape for name, tensor in state.items()}


def as_diffusers(kind, ours, reference):
    """Our weights with diffusers' names. ours: a state_dict, kind: "unet" or "vae"."""
    from diffusers.loaders import single_file_utils
    prefix = dict(unet="model.diffusion_model.", vae="first_stage_model.")[kind]
    return getattr(single_file_utils, f"convert_ldm_{kind}_checkpoint")(prefixed(prefix, ours), reference.config)


def reference_unet(width, context, head_width=None, heads=8):
    widths = [width * m for m in (1, 2, 4, 4)]
    return pytest.importorskip("diffusers").UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, layers_per_block=2, cross_attention_dim=context,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        attention_head_dim=[w // head_width for w in widths] if head_width else heads,
        norm_num_groups=min(32, width // 4),  # 32 in the real files
        use_linear_projection=head_width is not None).eval()


def reference_autoencoder(channels=128, multipliers=(1, 2, 4, 4), blocks=2):
    levels = len(multipliers)
    return pytest.importorskip("diffusers").AutoencoderKL(
        block_out_channels=[channels * m for m in multipliers], layers_per_block=blocks, latent_channels=4,
        norm_num_groups=min(32, channels // 4), down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels).eval()


def clip_text(width=768, layers=12, heads=12):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act="quick_gelu", projection_dim=width))


def openclip_text(width=1024, layers=24, heads=16):
    transformer = pytest.importorskip("open_clip").transformer
    return transformer.TextTransformer(width=width, layers=layers, heads=heads, output_dim=width)


@pytest.mark.parametrize("version", UNETS)
@pytest.mark.parametrize("size", [(8, 16), (9, 13)])
def test_unet_equals_diffusers(version, size):
    unet, reference = randomised(UNet(**UNETS[version])), reference_unet(**UNETS[version])
    reference.load_state_dict(as_diffusers("unet", unet.state_dict(), reference))
    x, t, context = torch.randn(2, 4, *size), torch.tensor([7, 981]), torch.randn(2, 77, unet.context)
    with torch.no_grad():
        assert close(unet(x, t, context), reference(x, t, context).sample)


@pytest.mark.parametrize("sizes", [dict(channels=32), dict(channels=32, multipliers=(1, 2, 2), blocks=1),
                                   dict(channels=48, multipliers=(1, 3), blocks=3)])
def test_image_autoencoder_equals_diffusers_in_any_chunks_and_its_sizes_are_read_from_the_tensors(sizes):
    ours, reference, seen = randomised(ImageAutoencoder(**sizes)), reference_autoencoder(**sizes), []
    reference.load_state_dict(as_diffusers("vae", ours.state_dict(), reference))
    ours, factor = open_image_autoencoder(ours.state_dict(), torch.device("cpu")), ours.factor
    images, latents = torch.rand(3, 3, 32, 48) * 2 - 1, torch.randn(3, 4, 32 // factor, 48 // factor)
    ours.decoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        assert close(ours.encode(images, chunk=2), 0.18215 * reference.encode(images).latent_dist.mean)
        assert close(ours.decode(latents, chunk=2), reference.decode(latents / 0.18215).sample)
    assert seen == [2, 1]


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", ""])
def test_clip_text_encoder_equals_transformers(tmp_path, prefix):
    reference = randomised(clip_text(128, 2, 2), seed=1)
    state = {name.removeprefix("text_model."): tensor for name, tensor in reference.state_dict().items()}
    state["embeddings.position_ids"] = torch.arange(77)[None]  # in the real file
    save_file(prefixed(prefix, state) | {"vision_model.a": torch.zeros(1)}, tmp_path / "clip.safetensors")
    encoder = load_text_encoder(tmp_path / "clip.safetensors")
    assert close(encoder(tokenize(CAPTIONS, 0)), reference(tokenize(CAPTIONS, 0)).last_hidden_state)
    assert close(encoder.encode(CAPTIONS), reference(tokenize(CAPTIONS, 49407)).last_hidden_state)


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", ""])
def test_openclip_text_encoder_equals_open_clip_up_to_its_last_but_one_layer(tmp_path, prefix):
    reference = randomised(openclip_text(128, 3, 2), seed=1)
    unused = {"attn_mask": torch.zeros(77, 77), "logit_scale": torch.ones(())}  # in the real file
    state = prefixed(prefix, reference.state_dict() | unused) | {"visual.conv1.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "openclip.bin")
    x, mask = reference._embeds(tokenize(CAPTIONS, 0))
    for block in list(reference.transformer.resblocks)[:-1]:
        x = block(x, attn_mask=mask)
    assert close(load_text_encoder(tmp_path / "openclip.bin").encode(CAPTIONS), reference.ln_final(x))


def test_captions_are_tokenised_as_open_clip_does_and_padded_both_ways():
    expected = pytest.importorskip("open_clip").get_tokenizer("ViT-H-14")(CAPTIONS)
    assert torch.equal(tokenize(CAPTIONS, 0), expected)
    after = expected.cumsum(1) == expected.sum(1, keepdim=True)  # the end token, and zeros
    assert torch.equal(tokenize(CAPTIONS, 49407), torch.where(after, 49407, expected))
    assert expected[1].tolist() == [49406, 49407] + [0] * 75


def test_a_prompt_of_more_than_77_tokens_is_cut_and_said_so_once():
    long, encoder = " ".join(["cat"] * 75), TextEncoder(64, 1, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        exact = tokenize([long], 0)
        assert not caught and exact[0, -1] == 49407 and exact[0, -2] != 49407
        for _ in range(3):
            encoder.encode([long + " purple giraffe", "a dog", long + " zebra"])
    assert len(caught) == 1 and "77 tokens" in str(caught[0].message)
    assert torch.equal(tokenize([long + " purple giraffe"], 0), exact)


@pytest.mark.parametrize("sizes, parameters", [
    (dict(), 859_520_964), (dict(context=1024, head_width=64), 865_910_724)], ids=["1.5", "2.1"])
def test_full_size_unet_has_the_real_file_s_tensors_and_cost(sizes, parameters):
    with torch.device("meta"):
        unet, reference = UNet(**sizes), reference_unet(**dict(width=320, context=768) | sizes)
        inputs = torch.randn(1, 4, 64, 64), torch.zeros(1), torch.randn(1, 77, sizes.get("context", 768))
    state = unet.state_dict()
    assert shapes(as_diffusers("unet", state, reference)) == shapes(reference.state_dict())
    assert len(state) == 686 and sum(p.numel() for p in unet.parameters()) == parameters
    for name in ("input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias", "input_blocks.3.0.op.weight",
                 "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "middle_block.1.norm.weight",
                 "input_blocks.4.0.skip_connection.weight", "output_blocks.11.1.transformer_blocks.0.ff.net.2.bias"):
        assert name in state  # a few of the real names, by heart, in case the converter is wrong in the same way
    assert {layer.num_groups for layer in unet.modules() if isinstance(layer, torch.nn.GroupNorm)} == {32}
    assert macs(lambda: unet(*inputs))[0] == pytest.approx(0.339e12, rel=0.01)  # tables 8 and 9; both versions match


def test_full_size_image_autoencoder_has_the_real_file_s_tensors_and_cost():
    with torch.device("meta"):
        ours, reference = ImageAutoencoder(), reference_autoencoder()
        images, latents = torch.randn(16, 3, 512, 1024), torch.randn(16, 4, 64, 128)
    state = ours.state_dict()
    assert shapes(as_diffusers("vae", state, reference)) == shapes(reference.state_dict())
    assert {layer.num_groups for layer in ours.modules() if isinstance(layer, torch.nn.GroupNorm)} == {32}
    assert len(state) == 248 and state["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert "decoder.up.3.upsample.conv.weight" in state and "encoder.down.0.downsample.conv.bias" in state
    assert macs(lambda: ours.encode(images))[0] == pytest.approx(17.3e12, rel=0.01)
    assert macs(lambda: ours.decode(latents))[0] == pytest.approx(39.7e12, rel=0.01)


def test_full_size_text_encoders_have_the_real_files_tensors():
    with torch.device("meta"):
        small, reference = TextEncoder(), clip_text()
        large, openclip = TextEncoder(1024, 23, 16, quick_gelu=False, pad=0), openclip_text()
    assert shapes(reference.state_dict(), remove="text_model.") == shapes(small.state_dict())
    assert len(small.state_dict()) == 196 and sum(p.numel() for p in small.parameters()) == 123_060_480
    assert len(openclip.state_dict()) == 5 + 24 * 12  # and logit_scale and attn_mask in the real file
    read = content_diffusion.from_openclip(openclip.state_dict())
    assert shapes(large.state_dict()) | {"text_projection": (1024, 1024)} == shapes(read)


@pytest.mark.parametrize("layers", [23, 24])
@pytest.mark.parametrize("named", ["OpenCLIP", "Hugging Face"])
def test_the_text_encoder_of_2_loses_its_last_layer_once_whatever_its_names(named, layers, monkeypatch):
    with torch.device("meta"):
        tensors = openclip_text(layers=layers).state_dict() if named == "OpenCLIP" else prefixed(
            "text_model.", TextEncoder(1024, layers, 16).state_dict())
    monkeypatch.setattr("content_diffusion.open_text_encoder", lambda config, own, what: (config, own))
    config, own = load_text_encoder("x", tensors)
    assert config == dict(width=1024, layers=23, heads=16, quick_gelu=False, pad=0)
    with torch.device("meta"):
        assert shapes(own) == shapes(TextEncoder(**config).state_dict())


@functools.cache
def raw_file(version):
    """The tensors of a small file, with every part that the real ones have. In that of 2.1 the image autoencoder's
    attention has linear layers, as in newer files."""
    unet, image = (randomised(part).state_dict() for part in (UNet(**UNETS[version]), ImageAutoencoder(32)))
    if version == "1.5":
        prefix, text = "cond_stage_model.transformer.text_model.", randomised(TextEncoder(64, 2, 1))
    else:
        prefix, text = "cond_stage_model.model.", openclip_text(128, 3, 2)
        image |= {name: tensor[..., 0, 0] for name, tensor in image.items() if tensor.ndim == 4 and ".attn_1." in name}
    image["loss.logvar"] = torch.zeros(())
    return prefixed(prefix, text.state_dict()) | prefixed("model.diffusion_model.", unet) | prefixed(
        "first_stage_model.", image) | {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}


@pytest.mark.parametrize("version, pad, heads, kind", [
    ("1.5", 49407, 8, "safetensors"), ("1.5", 49407, 8, "half"), ("1.5", 49407, 8, "legacy"), ("2.1", 0, 4, "ckpt")])
def test_both_versions_load_from_every_kind_of_file(tmp_path, version, pad, heads, kind):
    path, tensors = tmp_path / "sd.ckpt", raw_file(version)
    if kind == "half":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3, "optimizer_states": [{"state": {0: torch.zeros(2)}}]}, path,
                   _use_new_zipfile_serialization=kind != "legacy")
    unet, encoder = load_stable_diffusion(path, predict="v")
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in (*unet.parameters(), *encoder.parameters()))
    assert (encoder.pad, unet.context) == (pad, encoder.width)
    assert unet.output_blocks[3][1].transformer_blocks[0].attn1.heads == heads
    assert unet(torch.randn(1, 4, 8, 8), torch.tensor([3]), encoder.encode(["a cat"])).shape == (1, 4, 8, 8)
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items() if "first" in name}
    torch.save(bare, tmp_path / "vae.pt")
    for image in load_image_autoencoder(path), load_image_autoencoder(tmp_path / "vae.pt"):
        assert not any(p.requires_grad for p in (*image.parameters(), *encoder.parameters()))
        for prefix, part in (("model.diffusion_model.", unet), ("first_stage_model.", image)):
            for name, tensor in part.state_dict().items():
                assert torch.equal(tensor.flatten(), tensors[prefix + name].float().flatten())


def test_what_does_not_predict_the_noise_gives_one_warning_that_names_the_flag_and_none_with_it(tmp_path):
    save_file(raw_file("1.5"), tmp_path / "sd.safetensors")
    with pytest.warns(UserWarning, match="--predict v") as caught:
        load_stable_diffusion(tmp_path / "sd.safetensors")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_stable_diffusion(tmp_path / "sd.safetensors", predict="v")


XL = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
U, C, T = "model.diffusion_model.", "cond_stage_model.", "cond_stage_model.transformer.text_model."
WRONG_FILES = {  # (prefixes of the tensors that are left out, tensors in their place, what the line names)
    "inpainting": ([], {U + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "inpainting"),
    "SDXL": ([C], {XL: torch.zeros(1), U + "label_emb.0.0.weight": torch.zeros(1)}, "SDXL"),
    "LoRA": ([""], {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, "lora_unet_down"),
    "only the autoencoder": ([U, C], {}, "first_stage_model"), "no text encoder": ([C], {}, "text encoder"),
    "missing": ([U + "out.2.bias"], {}, r"Missing.*out\.2\.bias"),
    "unexpected": ([], {U + "pet.bias": torch.zeros(2)}, r"Unexpected.*pet\.bias"),
    "misshaped": ([], {U + "out.2.bias": torch.zeros(7)}, r"out\.2\.bias.*\[7\].*\[4\]"),
    "misshaped text": ([], {T + "final_layer_norm.bias": torch.zeros(7)}, r"final_layer_norm\.bias.*\[7\].*\[64\]"),
    "infinite": ([], {T + "final_layer_norm.bias": torch.full((64,), torch.inf)}, "layer_norm.bias .*not finite")}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, kind):
    out, more, words = WRONG_FILES[kind]
    tensors = {name: tensor for name, tensor in raw_file("1.5").items() if not name.startswith(tuple(out) or "\0")}
    save_file(tensors | more, path := tmp_path / "sd.safetensors")
    with pytest.raises(SystemExit, match=re.escape(str(path)) + ".*" + words) as caught:
        load_stable_diffusion(path)
    assert kind != "SDXL" or pytest.raises(SystemExit, load_image_autoencoder, path).match("XL")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [
    lambda t: t, lambda t: {"state_dict": t},
    lambda t: {"module": OrderedDict(("module." + name, tensor) for name, tensor in t.items())},
    lambda t: {"ema": t, "model": {"a": torch.zeros(1)}, "args": [1.5, None, "x", {2}]}])
def test_every_tensor_comes_back_as_it_was(tmp_path, new, wrap):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"half": torch.ones(7).half(), "b16": torch.ones(2, 2).bfloat16(), "long": torch.arange(5),
               "view": base[1:3, ::2], "transposed": base.T, "shared": base, "empty": torch.zeros(0, 3),
               "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(wrap(tensors), tmp_path / "x.anything", _use_new_zipfile_serialization=new)
    read = read_checkpoint(tmp_path / "x.anything")
    assert read.keys() == tensors.keys() and not any(tensor.requires_grad for tensor in read.values())
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in tensors.items())


def test_weights_are_copied_and_a_checkpoint_keeps_the_text_encoder_in_half_precision():
    weights = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    load_weights(layer := torch.nn.Linear(2, 3, device="meta"), weights, "x")
    assert torch.equal(layer.weight, weights["weight"]) and layer.weight.data_ptr() != weights["weight"].data_ptr()
    encoder = randomised(TextEncoder(64, 2, 1))
    state = encoder.state()
    assert state["weights"]["final_layer_norm.bias"].dtype == torch.float16
    assert (content_diffusion.open_text_encoder(**state).encode(CAPTIONS) - encoder.encode(CAPTIONS)).abs().max() < 0.01


@pytest.fixture
def dit_file(tmp_path):
    """(model, path) of a small file as DiT-XL-2-256x256.pt is: with sigma in the output, positions, 1000 classes."""
    source = randomised(DiT(channels=4, size=8, patch=2, classes=1000, **SMALL), seed=3)
    state = source.state_dict() | {"pos_embed": content_diffusion.sincos_positions(4, 4, 32)[None]}
    for kind in ("weight", "bias"):  # (p, q, channel): behind each pixel's 4 channels come its 4 sigmas
        rows = state[f"final_layer.linear.{kind}"].unflatten(0, (2, 2, 4))
        state[f"final_layer.linear.{kind}"] = torch.cat([rows, torch.full_like(rows, 9)], 2).flatten(0, 2)
    torch.save(state, tmp_path / "dit.pt")
    return source, tmp_path / "dit.pt"


def test_dit_loads_without_sigma_and_with_new_classes(dit_file, capsys):
    (source, path), dit = dit_file, DiT(channels=4, size=8, patch=2, classes=101, **SMALL)
    before, x, t = dit.y_embedder.embedding_table.weight.clone(), torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    load_dit(path, dit)
    assert re.search(re.escape(str(path)) + ".* 1000 classes$", capsys.readouterr().out.strip())
    # Without a class both are the same function.
    assert close(dit(x, t, torch.tensor([101, 101])), source(x, t, torch.tensor([1000, 1000])))
    assert torch.equal(dit.y_embedder.embedding_table.weight[:-1], 0.02 * before[:-1])  # the scale of the file's own
    assert all(p.requires_grad for p in dit.parameters())


@pytest.mark.parametrize("sizes, kept", [(dict(channels=4, size=(8, 16), patch=2), ("pos_embed",)),
                                         (dict(channels=4, size=16, patch=4), ("x_embedder.", "final_layer.linear.")),
                                         (dict(channels=3, size=8, patch=2), ("x_embedder.", "final_layer.linear."))])
def test_dit_keeps_its_own_layers_where_the_grid_the_patch_or_the_channels_differ(dit_file, capsys, sizes, kept):
    dit, theirs = DiT(**sizes, classes=3, **SMALL), dit_file[0].state_dict()
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    load_dit(dit_file[1], dit)
    assert ("first and last layer (4 channels, patch 2)" in capsys.readouterr().out) == ("x_embedder." in kept)
    for name, tensor in dit.state_dict().items():
        if name != "y_embedder.embedding_table.weight":
            assert torch.equal(tensor, before[name] if name.startswith(kept) else theirs[name]), name
