"""The fast code gives the same outputs and training steps as plain code, up to rounding (the plain versions are
tools/bench.py's), and by the profiler's counts it runs the intended kernels. The tools count and plan correctly."""

from types import SimpleNamespace

import bench
import pytest
import torch
from macs import count_macs, macs, sampling_macs
from torch.profiler import ProfilerActivity, profile

from autoencoder import Autoencoder, ImageAutoencoder, attention_in_parts
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
    expected = call_of(model)(*inputs)
    torch._dynamo.reset()
    got = torch.compile(call_of(model), fullgraph=True, backend="eager")(*inputs)
    assert torch.allclose(got, expected, atol=1e-5)


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
