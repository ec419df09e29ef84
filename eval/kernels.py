"""Faster kernels for the same functions, while a model is measured in float32 on a CPU.

oneDNN, which ships with torch, multiplies faster than torch's linear layers (MKL) on AMD processors, and as fast on
Intel. It also applies GELU to a product while that is still in the cache: torch's own GELU takes a quarter of the time
of the product, and transformers' GPT-2 GELU makes eight passes over memory. Together a fifth of the time of an
evaluation (benchmarks/LOG.md, 2026-11-30). The choice of kernel depends on the model only, never on timings, so a
measurement repeats bit for bit. Results agree with torch's up to rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
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
        onednn = torch.backends.mkldnn.is_available()
        fused = _before_gelu(network) if onednn else {}
        fused = {linear: gelu for linear, gelu in fused.items() if type(linear.weight.data) is Tensor}
        for module in network.modules():
            # Quantized weights are tensors of a class of their own, which multiply in their own way.
            if type(module) is nn.Linear and onednn and type(module.weight.data) is Tensor:
                product = functools.partial(
                    torch.ops.mkldnn._linear_pointwise,
                    W=module.weight.detach(),
                    B=None if module.bias is None else module.bias.detach(),
                    attr="gelu" if module in fused else "none",
                    scalars=[],
                    algorithm="tanh" if module in fused else "",
                )
                self.forwards.append((module, product))
            elif type(module) in GELUS:
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


def _before_gelu(network: PreTrainedModel) -> dict[nn.Module, nn.Module]:
    """Linear layers whose output goes into one GELU and nowhere else, with that GELU; found by running the network."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def remember(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output)] = (module, output)

    def look_up(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maker = made.get(id(inputs[0]))
        pairs.append((maker[0] if maker else module, module))

    handles = [module.register_forward_hook(remember) for module in network.modules() if type(module) is nn.Linear]
    handles += [module.register_forward_pre_hook(look_up) for module in network.modules() if type(module) in GELUS]
    try:
        with torch.inference_mode():
            network(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    makers, gelus = [maker for maker, _ in pairs], [gelu for _, gelu in pairs]
    return {
        maker: gelu
        for maker, gelu in pairs
        if maker is not gelu and makers.count(maker) == 1 and gelus.count(gelu) == 1
    }


def trim() -> None:
    """Return freed memory to the system: passes of changing lengths leave holes that nothing fits into."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's
        malloc_trim(0)
