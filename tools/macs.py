"""Counts multiply-accumulates: of convolutions and linear layers, as the paper's tables do, and of attention."""

import copy

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


class CountAttention(TorchFunctionMode):
    """Counts the multiply-accumulates of attention instead of computing it: the result only has the right shape."""

    macs = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        query, key, _ = args
        self.macs += 2 * query.numel() * key.shape[-2]  # query times key, and that times value
        return torch.empty_like(query)


def macs(call):
    """Multiply-accumulates of call(): (of convolutions and linear layers, of attention). On the meta device nothing is
    computed."""
    layers, attention = FlopCounterMode(display=False), CountAttention()
    with torch.inference_mode(False), torch.no_grad(), layers, attention:
        call()
    return layers.get_total_flops() // 2, attention.macs  # a multiply-accumulate is two operations


def count_macs(module, *inputs, call=None):
    """Multiply-accumulates as the paper counts them, without attention, of module(*inputs), or of `call`(*inputs) for
    `module.encode` and the like."""
    return macs(lambda: (call or module)(*inputs))[0]


def sampling_macs(sampler):
    """{part: (as the paper counts, in full)}: multiply-accumulates of one clip that a sample.Sampler draws.

    The paper counts one branch of guidance, the whole autoencoder once, and no image decoder. In full: attention
    products, both branches and the image decoder too, but not the autoencoder's encoder, which sampling does not use.
    """
    def empty(*shape, dtype=sampler.dtype):
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    # Copies, because a module that was compiled in place does not show its operations; its copy is not compiled.
    args, autoencoder, image = sampler.args, copy.deepcopy(sampler.autoencoder).to("meta"), copy.deepcopy(sampler.image)
    frame, latent = autoencoder.content_shape, autoencoder.motion_shape
    parts = {}
    for name, stage, steps, scale, inputs in (
            ("content", sampler.content, args.steps, args.guidance, [empty(*frame), empty()]),
            ("motion", sampler.motion, args.motion_steps, args.motion_guidance,
             [empty(*latent), empty(), empty(*frame)])):
        condition = empty(dtype=torch.long)  # a label
        if stage.text:
            condition = empty(*([77] if name == "content" else []), stage.text.width)
        model = copy.deepcopy(stage.model).to("meta")
        layers, attention = macs(lambda: model(*inputs, condition))
        parts[name] = steps * layers, steps * (layers + attention) * (1 if scale == 1 else 2)
    encoder, _ = macs(lambda: autoencoder.encode(empty(frame[0], latent[1], *frame[1:], dtype=torch.float32)))
    decoder, attention = macs(lambda: autoencoder.decode(empty(*frame).float(), empty(*latent).float()))
    parts["autoencoder"] = encoder + decoder, decoder + attention
    if image:
        frames = empty(*frame).expand(latent[1], -1, -1, -1).to(image.quant_conv.weight.dtype)
        parts["image decoder"] = 0, sum(macs(lambda: image.to("meta").decode(frames)))
    return parts
