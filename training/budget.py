"""What devices offer, and what training takes: parameters, FLOP and memory. Nothing heavy is imported here.

`estimate.py` turns both into hours and dollars.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
from typing import TYPE_CHECKING

from nanophi.core.errors import UserError, suggest
from nanophi.core.recipe import Training

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator. Rates are peaks in FLOP/s, dense; a device without bf16 or TF32 has its float32 rate there."""

    cuda_name: str  # part of the name that CUDA gives it
    bf16_flops: float  # with float32 accumulation
    fp32_flops: float  # outside the tensor cores, which is what torch computes in by default
    tf32_flops: float  # of float32 products in tensor cores (`uses_tf32`)
    memory: float  # bytes
    watts: float  # of the board
    dollars_per_hour: float  # on-demand list price of one in a cloud
    price_source: str  # whose price, and when it was read

    def precision(self, training: Training) -> str:
        """ "fp32" or "bf16": what a recipe trains in on this device, as `arguments.resolve_precision` decides on it."""
        if training.precision != "auto":
            return training.precision
        return "bf16" if self.bf16_flops > self.fp32_flops else "fp32"

    def peak(self, precision: str, tf32: bool) -> float:
        """FLOP/s at most in a precision; `tf32`: float32 products in tensor cores."""
        return self.bf16_flops if precision == "bf16" else self.tf32_flops if tf32 else self.fp32_flops


# Rates, memory and power: the makers' data sheets, of the SXM boards where there are several; the RTX boards' rates are
# those of NVIDIA's white papers on GA102 and Ada. Rates of a sheet "with sparsity" are halved.
DEVICES = {
    "a100-40g": Device("A100-SXM4-40GB", 312e12, 19.5e12, 156e12, 40e9, 400, 1.99, "lambda.ai/pricing, 2026-11-16"),
    "a100-80g": Device("A100", 312e12, 19.5e12, 156e12, 80e9, 400, 1.79, "runpod.io/pricing, secure cloud, 2026-11-09"),
    "h100": Device("H100", 989e12, 67e12, 494e12, 80e9, 700, 3.99, "runpod.io/pricing, secure cloud, 2026-11-09"),
    "h200": Device("H200", 989e12, 67e12, 494e12, 141e9, 700, 4.59, "runpod.io/pricing, 2026-10-07"),
    "l40s": Device("L40S", 362e12, 91.6e12, 183e12, 48e9, 350, 1.95, "modal.com/pricing, 2026-05-07"),
    "l4": Device("L4", 121e12, 30.3e12, 60e12, 24e9, 72, 0.80, "modal.com/pricing, 2026-05-07"),
    "rtx-4090": Device("RTX 4090", 165e12, 82.6e12, 82.6e12, 24e9, 450, 0.29, "openrelay.inc, 2026-09-20"),
    "rtx-3090": Device("RTX 3090", 71e12, 35.6e12, 35.6e12, 24e9, 350, 0.18, "openrelay.inc, 2026-09-20"),
    "a10g": Device("A10G", 70e12, 35e12, 35e12, 24e9, 300, 1.01, "AWS g5.xlarge, us-east-1, 2026-06-17"),
    "t4": Device("T4", 8.1e12, 8.1e12, 8.1e12, 16e9, 70, 0.59, "modal.com/pricing, 2026-05-07"),
}
USABLE_MEMORY = 0.92
"""Share of a device's memory that tensors get; the rest is the driver's context and the allocator's gaps."""
FAMILIES = {"a100": "a100-40g"}
"""Name of a family -> the device that it stands for: of the A100s, the one of the published run."""


def find_device(name: str) -> str:
    """A device's name in the table, from that or its family's. Raises `UserError` with the names that there are."""
    found = FAMILIES.get(name.lower(), name.lower())
    if found not in DEVICES:
        nearest = suggest(name, DEVICES, most=2)
        hint = "" if nearest.startswith("known:") else f"; {nearest}"
        raise UserError(f"unknown device '{name}'; there are {', '.join(DEVICES)}{hint}")
    return found


def peak_flops(device_name: str, precision: str = "bf16", tf32: bool = False) -> float | None:
    """Peak FLOP/s of a device by the name that CUDA gives it; None if it is not in the table."""
    found = (device for device in DEVICES.values() if re.search(rf"\b{device.cuda_name}\b", device_name))
    return next((device.peak(precision, tf32) for device in found), None)


def uses_tf32(training: Training) -> bool:
    """Whether float32 products are computed in TF32: if the recipe sets it, or as `Trainer` does when it compiles."""
    return bool(training.arguments.get("tf32", training.compile))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    words = ("out of memory", "can't allocate memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


def fitting_rows(config: NanoPhiConfig, training: Training, sizes: list[int]) -> int:
    """The largest of some micro-batches that fits the device at hand by `peak_bytes`; where none does, the smallest."""
    import torch

    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        memory = memory if limit == resource.RLIM_INFINITY else min(memory, limit)
    fits = [rows for rows in sizes if peak_bytes(config, training, rows) <= USABLE_MEMORY * memory]
    return max(fits, default=min(sizes, default=0))


def parameter_count(config: NanoPhiConfig) -> int:
    """Number of parameters of `NanoPhiForCausalLM(config)`."""
    hidden, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head = hidden // config.num_attention_heads
    key_value = config.num_key_value_heads * head
    attention = 2 * (hidden * hidden + hidden) + 2 * (hidden * key_value + key_value)
    layer = attention + (hidden * mlp + mlp) + (mlp * hidden + hidden) + 2 * hidden
    if config.qk_layernorm:
        layer += 4 * head
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2) + vocab
    return config.num_hidden_layers * layer + 2 * hidden + embeddings


def flops_per_token(config: NanoPhiConfig, context_length: int) -> float:
    """Training FLOP per token, forward and backward: 6 per parameter that multiplies, and attention's 12 L H T.

    The formula of PaLM (https://arxiv.org/abs/2204.02311, appendix B). The embedding table is a lookup and does not
    count; the output head does. Attention counts the full square, not the causal half.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * context_length
    return 6 * multiplying_parameters(config) + attention


def multiplying_parameters(config: NanoPhiConfig) -> int:
    """Parameters that multiply: all but a table of embeddings that is not the head too."""
    return parameter_count(config) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def peak_bytes(config: NanoPhiConfig, training: Training, rows: int) -> int:
    """Bytes at the height of training with micro-batches of `rows`; an evaluation takes less.

    Per parameter a weight, its gradient and two moments in float32 (Muon keeps fewer), and under autocast a bf16 copy
    of those that multiply; what the backward pass needs of each layer; and the logits that the loss holds at a time.
    It is 0.86 to 1.07 of the peaks in benchmarks/train_memory.json and train_speed.json.
    """
    from nanophi.training.loss import LOSS_CHUNK

    width, tokens = (4 if training.precision == "fp32" else 2), rows * config.max_position_embeddings
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # The residual stream and its norm in float32; queries, keys, values, attention and both sides of the activation.
    layer = 2 * 4 * hidden + width * (4 * hidden + 2 * config.intermediate_size)
    if training.arguments.get("gradient_checkpointing") or training.arguments.get("activation_checkpointing"):
        activations = tokens * (layers * 4 * hidden + layer)  # each layer's input, and one layer at a time
    else:
        activations = tokens * layers * layer
    state = 16 * parameter_count(config) + (0 if width == 4 else 2 * multiplying_parameters(config))
    return state + activations + width * min(LOSS_CHUNK, tokens) * config.vocab_size
