"""Faster kernels for the same functions, while a model is measured in float32 on a CPU.

oneDNN multiplies faster than torch's linear layers (MKL) on AMD processors, and applies GELU while a product is still
in the cache: together a fifth of the time (benchmarks/LOG.md, 2026-11-30). The choice depends on the model alone, so a
measurement repeats bit for bit; results agree with torch's up to rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator

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
        for module in linears:
            product = functools.partial(
                torch.ops.mkldnn._linear_pointwise,
                W=module.weight.detach(),
                B=None if module.bias is None else module.bias.detach(),
                attr="gelu" if module in fused else "none",
                scalars=[],
                algorithm="tanh" if module in fused else "",
            )
            self.forwards.append((module, product))
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


GELUS = (NewGELUActivation, GELUTanh)
"""Activations that are GELU in its tanh form (Hendrycks & Gimpel 2016)."""


def _before_gelu(network: PreTrainedModel, linears: list[nn.Linear]) -> dict[nn.Module, nn.Module]:
    """Those linear layers whose output goes into one GELU and nowhere else, with it; found by running the network."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def remember(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output)] = (module, output)

    def look_up(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maker, _ = made.get(id(inputs[0]), (module, None))
        pairs.append((maker, module))

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for linear in linears:
            hooks.callback(linear.register_forward_hook(remember).remove)
        for module in network.modules():
            if type(module) in GELUS:
                hooks.callback(module.register_forward_pre_hook(look_up).remove)
        network(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    used = Counter(module for pair in pairs for module in set(pair))
    return {maker: gelu for maker, gelu in pairs if maker is not gelu and used[maker] == used[gelu] == 1}


def trim() -> None:
    """Return freed memory to the system: passes of changing lengths leave holes that nothing fits into."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's
        malloc_trim(0)
