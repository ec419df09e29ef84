"""The same functions by sooner kernels, while a model is measured in float32 on a CPU.

torch computes float32 linear layers with MKL, which uses half of what an AMD processor can do; oneDNN, which torch
also ships, uses AVX-512 on every processor that has it. And transformers writes GPT-2's GELU out in eight passes over
memory, for which torch has one kernel. Results agree to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation


class Kernels:
    """Sooner forwards for the modules of a network that have one.

    Holds a copy of the linear layers' weights, in oneDNN's layout, but for the LM head's: they are the largest, and
    the head sees few positions. `with kernels():` puts the forwards in place.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self.forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        parameter = next(network.parameters())
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            return
        for module in network.modules():
            if module is network.get_output_embeddings():
                continue
            if type(module) is nn.Linear and torch.backends.mkldnn.is_available():
                bias = None if module.bias is None else module.bias.detach().to_mkldnn()
                self.forwards.append((module, functools.partial(_linear, module.weight.detach().to_mkldnn(), bias)))
            elif type(module) is NewGELUActivation:
                self.forwards.append((module, functools.partial(nn.functional.gelu, approximate="tanh")))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Within this context the modules compute by them."""
        for module, forward in self.forwards:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in self.forwards:
                del module.forward


def _linear(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    return torch.ops.aten.mkldnn_linear(values.to_mkldnn(), weight, bias).to_dense()
