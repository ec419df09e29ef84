"""Floating-point operations per token, and the peak rates that model FLOP utilisation (MFU) is measured against."""

from __future__ import annotations

from nanophi.configuration_nanophi import NanoPhiConfig

PEAK_BF16_FLOPS = {
    # Dense bf16 with float32 accumulation, FLOP/s, from the makers' data sheets.
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
    "A10G": 70e12,
    "T4": 65e12,
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
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)
