"""Devices, and what a model takes: parameters and FLOP."""

from __future__ import annotations

import dataclasses
import difflib

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.files import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        cuda_name: part of the name that CUDA gives it.
        bf16_flops: peak dense bf16 rate with float32 accumulation, FLOP/s; of a device without bf16 its float32 rate,
            since it trains in that.
        memory: bytes.
        watts: board power.
        dollars_per_hour: on-demand list price of one in a cloud.
        price_source: whose price, and when it was read.
    """

    cuda_name: str
    bf16_flops: float
    memory: float
    watts: float
    dollars_per_hour: float
    price_source: str


# Rates, memory and power: the makers' data sheets, of the SXM boards where there are several.
DEVICES = {
    "a100-40g": Device("A100-SXM4-40GB", 312e12, 40e9, 400, 1.99, "lambda.ai/pricing, 2026-11-16"),
    "a100-80g": Device("A100", 312e12, 80e9, 400, 1.79, "runpod.io/pricing, secure cloud, 2026-11-09"),
    "h100": Device("H100", 989e12, 80e9, 700, 3.99, "runpod.io/pricing, secure cloud, 2026-11-09"),
    "h200": Device("H200", 989e12, 141e9, 700, 4.59, "runpod.io/pricing, 2026-10-07"),
    "l40s": Device("L40S", 362e12, 48e9, 350, 1.95, "modal.com/pricing, 2026-05-07"),
    "l4": Device("L4", 121e12, 24e9, 72, 0.80, "modal.com/pricing, 2026-05-07"),
    "rtx-4090": Device("RTX 4090", 165e12, 24e9, 450, 0.29, "openrelay.inc, 2026-09-20"),
    "rtx-3090": Device("RTX 3090", 71e12, 24e9, 350, 0.18, "openrelay.inc, 2026-09-20"),
    "a10g": Device("A10G", 70e12, 24e9, 300, 1.01, "AWS g5.xlarge, us-east-1, 2026-06-17"),
    "t4": Device("T4", 8.1e12, 16e9, 70, 0.59, "modal.com/pricing, 2026-05-07"),
}


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
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * context_length
    return 6 * (parameter_count(config) - lookup) + attention


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device by the name that CUDA gives it; None if it is not in the table."""
    return next((device.bf16_flops for device in DEVICES.values() if device.cuda_name in device_name), None)


def find_device(name: str) -> Device:
    """A device of the table. Raises `UserError` with the nearest names."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(DEVICES)}"
    raise UserError(f"unknown device '{name}'; {hint}")
