"""The memory model of `estimate`: bytes at the height of a training step and of an evaluation."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.recipe import Training
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training.budget import parameter_count
from nanophi.training.loss import CPU_BLOCKS, LOSS_CHUNK, use_chunked_loss


def layer_matrices(config: NanoPhiConfig) -> int:
    """Number of weights in the matrices of all layers."""
    hidden = config.hidden_size
    key_value = config.num_key_value_heads * (hidden // config.num_attention_heads)
    return config.num_hidden_layers * (
        2 * hidden * hidden + 2 * hidden * key_value + 2 * hidden * config.intermediate_size
    )


def state_bytes(config: NanoPhiConfig, training: Training) -> int:
    """Bytes that are always held: float32 weights and optimizer state.

    AdamW keeps two float32 moments per parameter, Muon one per parameter of the matrices between the layers.
    """
    moments = 8 * parameter_count(config) - (4 * layer_matrices(config) if training.optimizer == "muon" else 0)
    return 4 * parameter_count(config) + moments


def row_bytes(config: NanoPhiConfig, training: Training) -> int:
    """Bytes that the backward pass keeps per row, counted in forward passes of a small model of the same layers.

    Counts each storage that autograd saves once. They are a constant, plus for each row a constant and as much again
    for each layer, so four small counts suffice for any depth. Fused attention saves the same tensors on a GPU.
    """
    shape = tuple(getattr(config, name) for name in _SHAPE)
    one, two = (
        _saved_bytes(shape, layers, 2, training.precision != "fp32")
        - _saved_bytes(shape, layers, 1, training.precision != "fp32")
        for layers in (1, 2)
    )
    return one + (two - one) * (config.num_hidden_layers - 1)


_SHAPE = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("hidden_act", "qk_layernorm", "resid_pdrop", "embd_pdrop", "attention_dropout"),
)


@functools.cache
def _saved_bytes(shape: tuple[Any, ...], layers: int, rows: int, bf16: bool) -> int:
    """Bytes that autograd saves in a forward pass; the head saves the same for any vocabulary and number of rows."""
    fields: dict[str, Any] = dict(zip(_SHAPE, shape, strict=True))
    fields |= {"num_hidden_layers": layers, "vocab_size": 64, "eos_token_id": 0, "bos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        model = NanoPhiForCausalLM(NanoPhiConfig(**fields)).train()
    use_chunked_loss(model)
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Returned and thus kept, so that no address is taken twice.
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(rows, model.config.max_position_embeddings, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(sizes.values())


def training_bytes(config: NanoPhiConfig, training: Training, rows: int, device: str = "cuda") -> int:
    """Bytes at the height of a training step with a micro-batch of `rows`.

    That is the loss, which holds the head's gradient and `LOSS_CHUNK` rows of logits on top of all activations; or the
    start of the backward pass, when the head's gradient is there twice; or its end, when all gradients are there.

    Args:
        device: "cuda", or "cpu", where the loss converts blocks of the logits instead of whole chunks.
    """
    width, parameters = (4 if training.precision == "fp32" else 2), parameter_count(config)
    head = config.vocab_size * config.hidden_size
    logits = min(LOSS_CHUNK, rows * config.max_position_embeddings) * config.vocab_size
    # Autocast saves a converted copy of each layer's matrices; the loss converts the head for itself.
    copies, head_copy = (0, 0) if width == 4 else (width * layer_matrices(config), width * head)
    softmax = 4 * (logits if device == "cuda" else 3 * CPU_BLOCKS[0] * config.vocab_size)
    activations = copies + rows * row_bytes(config, training)
    accumulated = 4 * parameters if rows < training.batch_size else 0
    loss = activations + 4 * head + head_copy + width * logits + softmax
    backward = activations + 8 * head
    return state_bytes(config, training) + max(accumulated + loss, accumulated + backward, 4 * parameters)


def evaluation_bytes(config: NanoPhiConfig, training: Training, rows: int, device: str = "cuda") -> int:
    """Bytes at the height of an evaluation with a batch of `rows`: nothing is kept for a backward pass.

    That is the widest point of a layer, or the logits of a quarter of `LOSS_CHUNK` rows.
    """
    width, tokens = (4 if training.precision == "fp32" else 2), rows * config.max_position_embeddings
    copies = 0 if width == 4 else width * (layer_matrices(config) + config.vocab_size * config.hidden_size)
    layer = tokens * (3 * 4 * config.hidden_size + 2 * width * config.intermediate_size)
    logits = min(LOSS_CHUNK // 4, tokens) * config.vocab_size
    loss = 8 * logits if device == "cuda" else width * logits + 12 * CPU_BLOCKS[0] * config.vocab_size
    return state_bytes(config, training) + copies + max(layer, loss + 4 * tokens * config.hidden_size)


def peak_bytes(config: NanoPhiConfig, training: Training, rows: int, device: str = "cuda") -> int:
    """Bytes at the height of training with evaluations, with micro-batches of `rows`."""
    return max(training_bytes(config, training, rows, device), evaluation_bytes(config, training, rows, device))
