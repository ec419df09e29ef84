"""What devices offer, and what training takes: parameters, FLOP and memory. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from nanophi.core.errors import UserError, suggest
from nanophi.core.recipe import Training

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator. Rates are dense peaks in FLOP/s; a device without bf16 or TF32 has its float32 rate there."""

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


# Rates, memory and power: the makers' data sheets (SXM boards where there are several; for RTX boards NVIDIA's white
# papers on GA102 and Ada). Rates of a sheet "with sparsity" are halved.
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
FAMILIES = {"a100": "a100-40g"}  # name of a family -> the device that it stands for: the published run's
USABLE_MEMORY = 0.92  # of a device, for tensors; the rest is the driver's context and the allocator's gaps


def find_device(name: str) -> str:
    """A device's name in the table, from that or its family's. Raises `UserError`."""
    found = FAMILIES.get(name.lower(), name.lower())
    if found not in DEVICES:
        raise UserError(f"unknown device '{name}'; {suggest(name, DEVICES, most=2)}")
    return found


def device_named(name: str) -> Device | None:
    """The device of the table that has this name, as CUDA or the Hub give it."""
    return next((device for device in DEVICES.values() if re.search(rf"\b{device.cuda_name}\b", name)), None)


def uses_tf32(training: Training) -> bool:
    """Whether float32 products are computed in TF32: if the recipe sets it, or as `Trainer` does when it compiles."""
    return bool(training.arguments.get("tf32", training.compile))


def fitting_rows(config: NanoPhiConfig, training: Training, share: int, memory: float) -> int:
    """The largest micro-batch that divides `share` rows and fits into so many bytes of a device; 0: none does."""
    sizes = (rows for rows in range(1, share + 1) if share % rows == 0)
    return max((rows for rows in sizes if peak_bytes(config, training, rows) <= USABLE_MEMORY * memory), default=0)


def parameter_count(config: NanoPhiConfig) -> int:
    """Number of parameters of `NanoPhiForCausalLM(config)`."""
    hidden, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head = hidden // config.num_attention_heads
    key_value = config.num_key_value_heads * head
    attention = 2 * (hidden + 1) * hidden + 2 * (hidden + 1) * key_value + (4 * head if config.qk_layernorm else 0)
    layer = attention + (hidden + 1) * mlp + (mlp + 1) * hidden + 2 * hidden
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2) + vocab
    return config.num_hidden_layers * layer + 2 * hidden + embeddings


def flops_per_token(config: NanoPhiConfig, context_length: int) -> float:
    """Training FLOP per token, forward and backward: 6 per parameter that multiplies, and attention's 12 L H T.

    PaLM's formula (https://arxiv.org/abs/2204.02311, appendix B); attention counts the full square, not a causal half.
    """
    return 6 * multiplying_parameters(config) + 12 * config.num_hidden_layers * config.hidden_size * context_length


def multiplying_parameters(config: NanoPhiConfig) -> int:
    """Parameters that multiply: all but a table of embeddings that is not the head too."""
    return parameter_count(config) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def peak_bytes(config: NanoPhiConfig, training: Training, rows: int) -> int:
    """Bytes at the height of training with micro-batches of `rows`: 0.86 to 1.07 of those that benchmarks measured.

    Per parameter a weight, its gradient and two moments in float32 (Muon keeps fewer), and under autocast a bf16 copy
    of those that multiply; what the backward pass needs of each layer; and the logits that the loss holds at a time.
    """
    from nanophi.training.loss import LOSS_CHUNK

    width, tokens = (4 if training.precision == "fp32" else 2), rows * config.max_position_embeddings
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # The residual stream and its norm in float32; queries, keys, values, attention and both sides of the activation.
    layer = 2 * 4 * hidden + width * (4 * hidden + 2 * config.intermediate_size)
    activations = tokens * layers * layer
    if training.arguments.get("gradient_checkpointing") or training.arguments.get("activation_checkpointing"):
        activations = tokens * (layers * 4 * hidden + layer)  # each layer's input, and one layer at a time
    state = 16 * parameter_count(config) + (0 if width == 4 else 2 * multiplying_parameters(config))
    return state + activations + width * min(LOSS_CHUNK, tokens) * config.vocab_size
