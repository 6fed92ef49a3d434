"""The fast code gives the same outputs and training steps as plain code, up to rounding (the plain versions are
tools/bench.py's), and by the profiler's counts it runs the intended kernels. The tools count and plan correctly."""

import unittest.mock
from types import SimpleNamespace

import bench
import pytest
import torch
from functorch.compile import make_boxed_func
from macs import count_macs, macs, sampling_macs
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile

import data
from autoencoder import Autoencoder, GroupNorm, ImageAutoencoder, LayerNorm, attention_in_parts
from content_diffusion import SAMPLERS, Diffusion, DiT, UNet, guided
from motion_diffusion import MotionDiT

SMALL = dict(
    autoencoder=lambda: Autoencoder(channels=3, frames=5, size=(8, 12), patch=2, width=16, motion_channels=3, depth=2,
                                    heads=2),
    content=lambda: DiT(channels=3, size=(8, 12), patch=2, width=32, depth=2, heads=2, classes=5),
    motion=lambda: MotionDiT(motion_channels=3, frames=5, columns=10, channels=3, size=(8, 12), content_patch=4,
                             width=32, depth=2, heads=2, classes=5),
    unet=lambda: UNet(width=32, context=8, heads=2, multipliers=(1, 2), blocks=1),
    unet_21=lambda: UNet(width=32, context=8, head_width=16, multipliers=(1, 2), blocks=1),
    image=lambda: ImageAutoencoder(channels=32, multipliers=(1, 2), blocks=1),
)


def small(name):
    """A small model with random weights everywhere, and inputs for it."""
    torch.manual_seed(0)
    model = SMALL[name]()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    t, labels = torch.tensor([3, 900]), torch.tensor([1, 5])
    inputs = dict(
        autoencoder=[torch.randn(2, 3, 5, 8, 12)], content=[torch.randn(2, 3, 8, 12), t, labels],
        motion=[torch.randn(2, 3, 5, 10), t, torch.randn(2, 3, 8, 12), labels],
        unet=[torch.randn(2, 4, 8, 12), t, torch.randn(2, 7, 8)], unet_21=[torch.randn(2, 4, 8, 12), t,
                                                                           torch.randn(2, 7, 8)],
        image=[torch.randn(2, 4, 4, 6)])
    return model, inputs[name]


def call_of(model):
    return model.decode if isinstance(model, ImageAutoencoder) else model


@pytest.mark.parametrize("name", SMALL)
def test_every_model_gives_what_attention_by_its_formula_gives(name):
    model, inputs = small(name)
    ours = call_of(model)(*inputs)
    with bench.plain():
        plain = call_of(model)(*inputs)
    assert torch.allclose(ours, plain, atol=1e-5, rtol=1e-4) and ours.std() > 0.01


@pytest.mark.parametrize("stage", ["autoencoder", "content", "motion"])
def test_a_training_step_changes_the_weights_as_the_plain_step_does(stage):
    after = []
    for ours in (True, False):
        model, inputs = small(stage)
        step = bench.training_step(stage, model, model, inputs, "ours" if ours else "plain")
        for n in range(3):
            torch.manual_seed(n)
            step() if ours else bench.plain()(step)()
        after.append([weight.detach() for weight in model.parameters()])
    for quick, plain in zip(*after):
        assert torch.allclose(quick, plain, atol=2e-5)
    before = [weight.detach() for weight in small(stage)[0].parameters()]
    assert max((a - b).abs().max() for a, b in zip(before, after[0])) > 2e-4  # 3 steps of 1e-4 each


def test_averaging_all_weights_at_once_is_averaging_each():
    averages, weights = ([torch.randn(3, n) for n in range(1, 9)] for _ in range(2))
    each = [0.9 * average + 0.1 * weight for average, weight in zip(averages, weights)]
    torch._foreach_lerp_(averages, weights, 0.1)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(averages, each))


def test_sampling_gives_what_one_branch_at_a_time_gives():
    torch.manual_seed(0)
    sampler = bench.make_sampler("shapes", torch.device("cpu"), steps=3, motion_steps=3)
    clips = []
    for plain in (False, True):
        with bench.plain() if plain else torch.inference_mode(), torch.inference_mode():
            content = sampler.draw_content([0, 5], [0, 1])
            clips.append(sampler.decode(content, sampler.draw_motion(content, [0, 5], [0, 1])))
    assert torch.allclose(*clips, atol=1e-4) and clips[0].std() > 0.01


@pytest.mark.parametrize("versions", [["ours"], ["ours", "bfloat16", "plain"]])
def test_the_table_of_sampling_has_a_row_for_each_version(versions, capsys):
    args = SimpleNamespace(rounds=1, device=torch.device("cpu"), machine_rate=1e11)
    bench.bench_sampling(args, "shapes", 1, versions, None, steps=3, motion_steps=3)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == versions and len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("axis, heads, scratch, calls", [(0, 99, 10**9, 1), (1, 2, 10**9, 3), (0, 99, 6 * 128 * 32, 4)])
def test_attention_in_parts_is_attention(axis, heads, scratch, calls):
    q, k, v = torch.randn(3, 4, 6, 10, 8)  # 4 batches, 6 heads
    results = []
    seen = counts(lambda: results.append(attention_in_parts(q, k, v, axis, heads, scratch)))
    assert torch.allclose(results[0], torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-6)
    assert seen["aten::scaled_dot_product_attention"] == calls


def test_one_part_of_attention_is_not_copied():
    """Neither in the backward pass, as split() of one part would be."""
    q, k, v = (torch.randn(4, 6, 10, 8, requires_grad=True) for _ in range(3))
    assert "aten::cat" not in counts(lambda: attention_in_parts(q, k, v, 1).sum().backward())


def test_all_places_in_one_sequence_attend_as_each_alone():
    q, k, v = torch.randn(3, 2, 5 * 4, 6, 8)  # 5 places, 4 heads, 6 frames
    packed = bench.packed(flex_attention, 4, 6)(q, k, v)
    assert torch.allclose(packed, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)


def test_the_dit_keeps_its_tokens_in_order_so_that_norms_copy_nothing():
    model, inputs = small("content")
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    model(*inputs)
    assert seen == [True]


def test_nothing_is_read_back_between_steps():
    """On a GPU each such read would wait for all that came before. On the meta device it is an error."""
    for name, draw in SAMPLERS.items():
        diffusion = Diffusion("linear")
        if name == "ddim":  # dpm++ reads abar to choose its steps, before the first
            diffusion.to("meta")
        denoise = guided(lambda x, t, c: x * 0.5, torch.zeros(2), torch.zeros(2), 3.0)
        x = torch.randn(2, 3, device="meta" if name == "ddim" else None)
        assert draw(denoise, x, diffusion, steps=5).shape == (2, 3)


def counts(call):
    """{operator: times} of a call, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    return {event.key: event.count for event in record.key_averages()}


ATTENTIONS = dict(autoencoder=8, content=2, motion=2, unet=8, unet_21=8, image=1)


@pytest.mark.parametrize("name", SMALL)
def test_the_profiler_sees_fused_attention_only(name):
    model, inputs = small(name)
    ours = counts(lambda: call_of(model)(*inputs))
    assert ours["aten::_scaled_dot_product_flash_attention_for_cpu"] == ATTENTIONS[name] and "aten::bmm" not in ours
    with bench.plain():  # with which the tests above compare
        plain = counts(lambda: call_of(model)(*inputs))
    assert "aten::scaled_dot_product_attention" not in plain and plain["aten::bmm"] == 2 * ATTENTIONS[name]


def test_the_profiler_sees_one_kernel_for_all_of_adam():
    model, inputs = small("content")
    step = bench.training_step("content", model, model, inputs, "ours")
    seen = counts(step)
    assert seen["aten::_fused_adam_"] == 1 and seen["aten::_foreach_lerp_"] == 1
    seen = counts(bench.training_step("content", model, model, inputs, "plain"))
    assert "aten::_fused_adam_" not in seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["unet", "unet_21", "image"])
def test_memory_layouts_give_the_same(name, layout):
    model, inputs = small(name)
    expected = call_of(model)(*inputs)
    model.to(memory_format=layout)
    inputs[0] = inputs[0].contiguous(memory_format=layout)
    assert torch.allclose(call_of(model)(*inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_every_model_compiles_whole(name):
    """fullgraph: a break in the graph is an error. The backend 'eager' runs the captured graph as it is."""
    model, inputs = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = call_of(model)(*inputs)
        torch._dynamo.reset()
        got = torch.compile(call_of(model), fullgraph=True, backend="eager")(*inputs)
    assert torch.allclose(got, expected, atol=1e-5)


def saved_on_fake_gpu(model, inputs):
    """Bytes that a forward pass under autocast keeps for the backward pass, by autograd's hooks, on a GPU."""
    kept, patch = {}, unittest.mock.patch.object
    with FakeTensorMode(allow_non_fake_inputs=True), patch(torch.nn.functional, "scaled_dot_product_attention",
                                                           bench.flash):
        own = {name: torch.nn.Parameter(torch.empty_like(tensor, device="cuda"))
               for name, tensor in model.state_dict().items()}
        own |= {name: torch.empty_like(tensor, device="cuda") for name, tensor in model.named_buffers()}
        weights = {tensor.untyped_storage()._cdata for tensor in own.values()}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        inputs = [torch.empty_like(x, device="cuda") for x in inputs]
        with (patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
              patch(torch.cuda, "is_bf16_supported", lambda: True), torch.autocast("cuda", torch.bfloat16),
              torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)):
            torch.func.functional_call(model, own, tuple(inputs))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


@pytest.mark.parametrize("stage", ["autoencoder", "content", "motion"])
def test_the_computed_memory_is_what_autograd_keeps_on_a_gpu(stage):
    """Computed (tools/bench.py --memory) on tensors that say CPU. Fake ones on a GPU have no backward pass."""
    with torch.device("meta"):
        model = bench.make_model(stage, "shapes")
        inputs = bench.make_inputs(stage, model, "shapes", 64)
    kept, peak = bench.activation_bytes(stage, "shapes", 64)
    assert kept == pytest.approx(saved_on_fake_gpu(model, inputs), rel=0.05) and kept < peak < 1.5 * kept
    less, peak_too = bench.activation_bytes(stage, "shapes", 64, checkpointing=True)
    assert less < 0.4 * kept and less < peak_too < 0.8 * peak


@pytest.mark.parametrize("stage, clips, limit", [("content", 8, 16), ("autoencoder", 3, 35)])
def test_norms_in_bfloat16_halve_what_they_keep(stage, clips, limit):
    """In GiB, of the paper's sizes for Stable Diffusion 2.1; with norms in float32 20.1 and 43.4."""
    assert 0.9 * limit < bench.activation_bytes(stage, "webvid_sd21", clips)[0] / 2**30 < limit


@pytest.mark.parametrize("norm, plain", [(LayerNorm(12), torch.nn.LayerNorm(12)),
                                         (LayerNorm(12, elementwise_affine=False), torch.nn.LayerNorm(12)),
                                         (GroupNorm(3, 12), torch.nn.GroupNorm(3, 12))])
def test_norms_are_torchs_own_and_under_autocast_right_to_bfloat16s_rounding(norm, plain):
    if norm.state_dict():
        for weight in plain.parameters():
            torch.nn.init.normal_(weight, 1)
        norm.load_state_dict(plain.state_dict())
    x = 5 + torch.randn(4, 12)
    expected = plain(x)
    assert torch.equal(norm(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 2**-5 * expected.abs().max()  # x is near 5 deviations, rounded to 2**-9 of it


COMPILE = SimpleNamespace(compile=True)


def test_a_compiled_model_is_not_compiled_again_for_a_smaller_batch():
    """With the CPU's inductor."""
    model, (x, t, labels) = small("content")
    expected, graphs = model(x, t, labels), []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert data.compile_modules(COMPILE, "ucf101", torch.device("cpu"), model, None) == "compiled"
    for n in (2, 1, 2, 1):
        ran = counts(lambda: graphs.append(model(x[:n], t[:n], labels[:n])))
        assert torch.allclose(graphs[-1], expected[:n], atol=1e-5)
        assert any("Torch-Compiled Region" in name for name in ran) == (n == 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("stage", ["autoencoder", "content", "motion"])
def test_every_step_of_training_runs_what_the_first_one_compiled(stage):
    model, inputs = small(stage)
    ran = []

    def backend(graph, _):
        return lambda *inputs: ran.append(graph) or graph(*inputs)

    torch._dynamo.reset()
    parts = [model.encoder, model.decoder] if stage == "autoencoder" else [model]
    data.compile_modules(COMPILE, "ucf101", torch.device("cpu"), *parts, backend=backend)
    step = bench.training_step(stage, model, model, inputs, "bfloat16")
    for _ in range(3):
        step()
    assert len(ran) == 3 * len(parts) and len(set(ran)) == 1  # of one kind, encoder and decoder share what is compiled


@pytest.mark.parametrize("of", ["all", "the backward pass"])
def test_where_compiling_fails_the_models_go_on_as_they_are_with_one_line(capsys, of):
    model, inputs = small("content")
    other = torch.nn.Linear(3, 3)
    expected = model(*inputs)
    torch._dynamo.reset()

    def broken(graph, _):
        raise OSError("no compiler\nhere")

    backend = broken if of == "all" else aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=broken)
    data.compile_modules(COMPILE, "ucf101", torch.device("cpu"), model, other, backend=backend)
    for _ in range(3):
        output = model(*inputs)
        output.sum().backward()
        assert torch.equal(output, expected) and other(torch.zeros(3)).shape == (3,)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("goes on without torch.compile, which failed: ") and "no compiler here" in line


@pytest.mark.parametrize("flag, preset, device, triton, expected", [
    (None, "ucf101", "cuda", True, True), (None, "shapes", "cuda", True, False), (None, "ucf101", "cpu", True, False),
    (None, "ucf101", "cuda", False, False), (False, "ucf101", "cuda", True, False),
    (True, "shapes", "cpu", False, True), (None, "shapes_text", "cuda", True, False)])
def test_compiling_is_the_default_on_a_gpu_at_the_papers_sizes(monkeypatch, flag, preset, device, triton, expected):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: "found" if triton and name == "triton" else None)
    says = data.compile_modules(SimpleNamespace(compile=flag), preset, torch.device(device))
    assert says == ("compiled" if expected else "not compiled")


def macs_by_hooks(module, call, inputs):
    """Counts what count_macs counts, by the shapes of the layers inside `module` that call(*inputs) uses."""
    total = 0

    def count(layer, arguments, output):
        nonlocal total  # each value of the output is a sum of (inputs, *kernel) products
        total += output.numel() * layer.weight[0].numel()

    for layer in module.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            layer.register_forward_hook(count)
    call(*inputs)
    return total


@pytest.mark.parametrize("name", SMALL)
def test_two_ways_of_counting_agree(name):
    """The dispatcher's record of operators (tools/macs.py) and hooks on layers."""
    model, inputs = small(name)
    counted = count_macs(model, *inputs, call=call_of(model))
    _, attention = macs(lambda: call_of(model)(*inputs))
    assert counted == macs_by_hooks(model, call_of(model), inputs) > 0 and attention > 0


def test_sampling_macs_gives_the_papers_table_10():
    """46.8 and 92.1 TFLOPs for a clip of 16x512x1024 at 50 and 100 steps; in full, PAPER's second table of costs."""
    for steps, tera in ((50, 46.8), (100, 92.1)):
        parts = sampling_macs(bench.make_sampler("webvid_sd21", torch.device("meta"), steps=steps, motion_steps=steps))
        assert sum(paper for paper, _ in parts.values()) / 1e12 == pytest.approx(tera, rel=0.01)
        if steps == 50:
            full = {name: part[1] / 1e12 for name, part in parts.items()}
            assert full["content"] == pytest.approx(92.5, rel=0.02)
            assert full["motion"] == pytest.approx(24 / 2, rel=0.1)  # 24 is with guidance, which motion has not
            assert full["image decoder"] == pytest.approx(39.7, rel=0.05)


def test_the_loader_decodes_little_more_than_it_uses(tmp_path, capsys):
    bench.make_videos(str(tmp_path), "ucf101")
    args = SimpleNamespace(data=str(tmp_path), rounds=1, device=torch.device("cpu"))
    bench.bench_loader(args, "ucf101")
    decoded = float(capsys.readouterr().out.split(" frames decoded")[0].split()[-1])
    assert 1 <= decoded < 3  # a clip of 16 frames, key frames 12 apart


def test_the_plan_adds_up(capsys):
    bench.plan(1e15, dict.fromkeys(bench.STAGES, 0.5))
    out = capsys.readouterr().out
    hours = {line[:26].strip(): int(line[26:36].replace(",", "")) for line in out.splitlines()[3:9]}
    # Stable Diffusion's encoder (PAPER.md: 17.3, and 1.1 of attention) and half of the autoencoder (2.38 in all)
    clips, macs = 10_700_000, (17.3 + 1.1 + 2.38 / 2) * 1e12
    assert hours["encoding, once"] == pytest.approx(clips * 2 * macs / (1e15 * 0.5) / 3600, rel=0.01)
    assert hours["all"] == pytest.approx(sum(list(hours.values())[:4]), abs=3)
    assert "0.96 TB" in out  # 64 KiB of content and 24 KiB of motion a clip, PAPER.md
    bench.plan(312e12, dict.fromkeys(bench.STAGES, 0.4), "ucf101")
    assert "12.5 GB" in capsys.readouterr().out  # 9,537 videos, 32 clips each, of 24 KiB and 16 KiB
