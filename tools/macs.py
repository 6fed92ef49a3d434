"""Counts multiply-accumulates: of convolutions and linear layers, as the paper's tables do, and of attention."""

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
        query, key = args[:2]
        self.macs += 2 * query.numel() * key.shape[-2]  # query times key, and that times value
        return torch.empty_like(query)


def macs(call):
    """Multiply-accumulates of call(): (of convolutions and linear layers, of attention). On the meta device nothing is
    computed. Products of two batches of matrices count as attention: it may be written by its formula."""
    counter, attention = FlopCounterMode(display=False), CountAttention()
    with torch.inference_mode(False), torch.no_grad(), counter, attention:
        call()
    batched = sum(count for operator, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(operator))
    return (counter.get_total_flops() - batched) // 2, attention.macs + batched // 2  # two operations each


def count_macs(module, *inputs, call=None):
    """Multiply-accumulates as the paper counts them, without attention, of module(*inputs), or of `call`(*inputs) for
    `module.encode` and the like."""
    return macs(lambda: (call or module)(*inputs))[0]
