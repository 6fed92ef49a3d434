"""Proves that what saves time and memory changes no result: --compile, also where the compiler fails, --checkpointing,
bfloat16, and attention that never holds its whole matrix."""

import glob
import shutil
import signal

import pytest
import torch
from conftest import rows_of
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import autoencoder
import content_diffusion
import data
import motion_diffusion
import sample

T, LABELS = torch.tensor([3, 900]), torch.tensor([1, 5])
MODELS = dict(  # name: (a small model, its inputs, or their shapes)
    autoencoder=(lambda: autoencoder.Autoencoder(3, 5, (8, 12), 2, 16, 3, 2, 2), [(2, 3, 5, 8, 12)]),
    content=(lambda: content_diffusion.DiT(3, (8, 12), 2, 32, 2, 2, 5), [(2, 3, 8, 12), T, LABELS]),
    motion=(lambda: motion_diffusion.MotionDiT(3, 5, 10, 3, (8, 12), 2, 4, 32, 2, 2, 5),
            [(2, 3, 5, 10), T, (2, 3, 8, 12), LABELS]),
    unet=(lambda: content_diffusion.UNet(32, 8, 2, None, (1, 2), 1), [(2, 4, 8, 12), T, (2, 7, 8)]),
    unet_21=(lambda: content_diffusion.UNet(32, 8, 2, 16, (1, 2), 1), [(2, 4, 8, 12), T, (2, 7, 8)]),
    image=(lambda: autoencoder.ImageAutoencoder(32, (1, 2), 1).encoder, [(2, 3, 8, 12)]))


def small(name, checkpointing):
    """A small model with random weights everywhere, in training, and inputs for it."""
    torch.manual_seed(0)
    model, inputs = MODELS[name][0](), [torch.randn(x) if isinstance(x, tuple) else x for x in MODELS[name][1]]
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = checkpointing
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_attention_never_holds_its_whole_matrix_and_bfloat16_changes_little(name):
    """In the image autoencoder it would be 8192 x 8192 at 512x1024. An error where no fused kernel can be used."""
    model, inputs = small(name, False)
    expected = model(*inputs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(model(*inputs), expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < (model(*inputs) - expected).abs().max() < 0.1 * expected.abs().max()
    assert "bmm" not in str(counter.get_flop_counts())  # what attention by its formula would need


@pytest.mark.parametrize("name", ["unet_21", "image"])
def test_the_parts_of_stable_diffusion_compile_whole(name):
    """fullgraph: a break in the graph is an error. The backend "eager" runs the captured graph as it is."""
    model, inputs = small(name, True)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, fullgraph=True, backend="eager")(*inputs)
        torch.testing.assert_close(compiled, model(*inputs))


@pytest.mark.parametrize("name", ["autoencoder", "content", "motion", "unet", "unet_21"])
def test_checkpointing_keeps_less_for_the_backward_pass_and_changes_nothing(name):
    kept, gradients = {False: {}, True: {}}, {}
    for checkpointing, sizes in kept.items():
        model, inputs = small(name, checkpointing)
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(*inputs).square().mean()
        loss.backward()
        gradients[checkpointing] = [weight.grad for weight in model.parameters()]
        kept[checkpointing] = sum(size for where, size in sizes.items() if where not in own)
    assert kept[True] < 0.4 * kept[False]
    torch.testing.assert_close(gradients[True], gradients[False])


STAGES = dict(autoencoder=autoencoder, content=content_diffusion, motion=motion_diffusion, sample=sample)
FLAGS = dict(autoencoder="--size 16 --frames 4 --width 16 --depth 1 --heads 2 --clips 4", content="", motion="",
             sample="--num 2 --steps 3 --motion-steps 3 --lossless")
TRAINING = "--steps 3 --batch-size 4 --log-every 1 --workers 0"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """outcomes(stage, flags): what a stage logs in three steps, or the clips that it draws, with flags and without."""
    whole = tmp_path_factory.mktemp("runs") / "whole"

    def outcome(stage, run, flags):
        words = f"{stage} {FLAGS[stage]} {flags} --run-dir {run} "
        words += f"--out {run}/out" if stage == "sample" else TRAINING
        with pytest.MonkeyPatch.context() as patch:
            for module in content_diffusion, motion_diffusion:
                patch.setitem(module.DIT_SIZES, "mini", dict(width=32, depth=1, heads=2))
            patch.setattr("sys.argv", words.split())
            patch.setattr(signal, "signal", lambda *_: None)
            STAGES[stage].main()
        if stage == "sample":
            return torch.stack([torch.from_numpy(data.read_clip(path, 4)) / 255 for path in sorted(
                glob.glob(f"{run}/out/*.mkv"))])
        return torch.tensor([[float(row["loss"]), float(row["grad_norm"])] for row in rows_of(run, stage)])

    plain = {stage: outcome(stage, whole, "") for stage in STAGES}

    def both(stage, flags):
        run = tmp_path_factory.mktemp("runs") / "run"
        shutil.copytree(whole, run, ignore=shutil.ignore_patterns(f"{stage}.*", "out"))
        return outcome(stage, run, flags), plain[stage]

    return both


@pytest.fixture
def compiler(monkeypatch):
    """compiler(function) puts a function of a graph in the place of torch's compiler."""
    torch._dynamo.reset()
    with (torch._dynamo.config.patch(suppress_errors=False),
          torch._functorch.config.patch(force_non_lazy_backward_lowering=False)):  # a script sets both
        yield lambda function: monkeypatch.setattr("torch._inductor.compile_fx.compile_fx",
                                                   lambda graph, inputs, **_: function(graph, inputs))
    torch._dynamo.reset()


@pytest.mark.parametrize("stage, parts", [("autoencoder", 2), ("content", 1), ("motion", 1), ("sample", 1)])
def test_models_compile_whole_and_every_step_runs_what_the_first_one_compiled(stage, parts, outcomes, compiler):
    ran = []
    compiler(lambda graph, _: lambda *inputs: ran.append(graph) or graph(*inputs))
    torch.testing.assert_close(*outcomes(stage, "--compile" + " --checkpointing" * (stage != "sample")))
    assert ran[: 3 * parts] == ran[:parts] * 3 and ("checkpoint" in ran[0].code) == (stage != "sample")


@pytest.mark.parametrize("stage", STAGES)
def test_where_compiling_fails_the_stages_go_on_without(stage, outcomes, compiler):
    """Also where only the backward pass fails, which is shown in stage 2."""
    calls = []

    def broken(graph, _):
        calls.append(graph)
        raise OSError("no compiler here")

    forward = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=broken)
    compiler(forward if stage == "content" else broken)
    torch.testing.assert_close(*outcomes(stage, "--compile"))
    assert calls and (stage == "sample" or torch._functorch.config.force_non_lazy_backward_lowering)
