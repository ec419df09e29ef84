"""Faster kernels for the same functions, while a model is measured in float32 on a CPU.

oneDNN multiplies faster than torch's linear layers on AMD processors, and applies GELU while a product is in the cache:
together a fifth of the time (benchmarks/LOG.md, 2026-11-30). Results are torch's but for rounding.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation


class Kernels:
    """Faster forwards for the modules of a network that have one; in use within `with kernels():`."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        parameter = next(network.parameters())
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            return
        # Quantized weights are tensors of a class of their own, which multiply in their own way.
        linears = [x for x in network.modules() if type(x) is nn.Linear and type(x.weight.data) is Tensor]
        linears = linears if torch.backends.mkldnn.is_available() else []
        fused = _before_gelu(network, linears)
        for linear in linears:
            product = functools.partial(
                torch.ops.mkldnn._linear_pointwise,
                W=linear.weight.detach(),
                B=None if linear.bias is None else linear.bias.detach(),
                attr="gelu" if linear in fused else "none",
                scalars=[],
                algorithm="tanh" if linear in fused else "",
            )
            self.forwards.append((linear, product))
        for module in network.modules():
            if type(module) in GELUS:
                gelu = functools.partial(nn.functional.gelu, approximate="tanh")
                self.forwards.append((module, nn.Identity().forward if module in fused.values() else gelu))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Use the faster forwards within this context."""
        for module, forward in self.forwards:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in self.forwards:
                del module.forward


GELUS = (NewGELUActivation, GELUTanh)  # in its tanh form (Hendrycks & Gimpel 2016)


def _before_gelu(network: PreTrainedModel, linears: list[nn.Linear]) -> dict[nn.Module, nn.Module]:
    """Linear layers of an MLP with the GELU that their output goes into, by the names that transformers gives them.

    What these names do not tell is found out before anything is scored (probing.py).
    """
    names = (("fc1", "activation_fn"), ("dense_h_to_4h", "act"), ("c_fc", "act"), ("fc_in", "act"))
    pairs: list[tuple[Any, Any]] = [
        (getattr(block, linear, None), getattr(block, gelu, None))
        for block in network.modules()
        for linear, gelu in names
    ]
    return {linear: gelu for linear, gelu in pairs if linear in linears and type(gelu) in GELUS}


def trim() -> None:
    """Return freed memory to the system: passes of changing lengths leave holes that nothing fits into."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's
        malloc_trim(0)
