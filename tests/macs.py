"""Counts multiply-accumulates as the paper's tables do: convolutions and linear layers, no attention products."""

import torch
import torch.nn as nn


def count_macs(module, *inputs, call=None):
    """Multiply-accumulates of the Conv, ConvTranspose and Linear layers inside `module` in one `call(*inputs)`.

    `call` is the module itself by default; give another method for `module.encode` and the like. Use a module and
    inputs on the meta device: nothing is computed then. Modules that are called twice count twice.
    """
    total = 0

    def count(layer, arguments, output):
        nonlocal total
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            total += arguments[0].numel() * layer.weight[0].numel()  # each input value meets (out, *kernel) weights
        else:
            total += output.numel() * layer.weight[0].numel()  # each output value sums (in, *kernel) products

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    handles = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, layers)]
    try:
        with torch.no_grad():
            (call or module)(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total
