"""The loss that training and validation use: hidden states in, loss out, without holding the full logits.

At 50,295 tokens of vocabulary these are several times the activations of a small model.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from nanophi.modeling_nanophi import NanoPhiForCausalLM

LOSS_CHUNK = 1024  # rows of logits alive at a time
CPU_BLOCKS = (16, 1024)  # rows, and classes, of a chunk that fit a CPU's caches
ALIGNMENT = 64  # the vocabulary is padded to a multiple of this: matrix kernels are faster there than at 50,295
IGNORED = -100  # label of a position that has no loss


def use_chunked_loss(model: NanoPhiForCausalLM) -> None:
    """Let `model(input_ids=..., labels=...)` compute its loss in chunks; it then returns no logits.

    `num_items_in_batch` divides the summed loss (default: the number of labels that count); `reduction` "none" gives
    the losses of the positions [batch, tokens] without gradients. Nothing of this is saved. It replaces `forward`, not
    `compute_loss`, because DDP and FSDP need the head's weights to be used inside the wrapped model's call.
    """
    plain = model.forward

    def forward(
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        reduction: str = "mean",
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain(input_ids=input_ids, **kwargs)
        hidden_states = model.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        if reduction == "none":
            return CausalLMOutput(loss=token_losses(hidden_states, model.lm_head, targets))
        return CausalLMOutput(loss=chunked_loss(hidden_states, model.lm_head, targets, num_items_in_batch))

    model.forward = forward


def chunked_loss(
    hidden_states: torch.Tensor, head: nn.Linear, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Cross entropy of `head(hidden_states)` as a float32 scalar, differentiable in the hidden states and the head.

    hidden_states [..., hidden_size]; targets [...] int64. Under autocast the products run in autocast's dtype.
    """
    targets = targets.flatten().to(hidden_states.device)
    dtype = _product_dtype(hidden_states, head)
    with torch.autocast(hidden_states.device.type, enabled=False):
        total = LinearCrossEntropy.apply(hidden_states.flatten(0, -2), head.weight, head.bias, targets, dtype)
    return total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def token_losses(hidden_states: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every token: [..., hidden_size] and targets [...] -> float32 [...], 0 where ignored."""
    dtype, on_cpu, losses = _product_dtype(hidden_states, head), hidden_states.device.type == "cpu", []
    size = LOSS_CHUNK // 4  # of training's chunk a quarter: cross entropy holds the logits in float32 twice
    pairs = zip(hidden_states.flatten(0, -2).split(size), targets.flatten().split(size), strict=True)
    with torch.autocast(hidden_states.device.type, enabled=False):
        weight, bias = head.weight.to(dtype), head.bias.to(dtype)
        for rows, classes in pairs:
            logits, block = nn.functional.linear(rows.to(dtype), weight, bias), CPU_BLOCKS[0] if on_cpu else size
            for scores, wanted in zip(logits.split(block), classes.split(block), strict=True):
                part = nn.functional.cross_entropy(scores.float(), wanted, reduction="none", ignore_index=IGNORED)
                losses.append(part)
    return torch.cat(losses).view(targets.shape)


def _product_dtype(hidden_states: torch.Tensor, head: nn.Linear) -> torch.dtype:
    device_type = hidden_states.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else head.weight.dtype


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of a linear layer's logits, of which `LOSS_CHUNK` rows exist at a time.

    The forward pass also computes the gradients, chunk by chunk, while the logits exist; nothing is computed twice
    (the idea of Liger-Kernel's fused linear cross entropy, Hsu et al. 2024).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """[rows, hidden_size], [vocab_size, hidden_size], [vocab_size], [rows] -> float32 scalar.

        Matrix products run in `dtype`; softmax, loss and the weight's gradient in float32.
        """
        device, vocab_size = hidden_states.device, len(weight)
        # On a CPU, everything except the matrix products runs in blocks that stay in its caches, the bias included.
        on_cpu = device.type == "cpu"
        # There a padded copy of the weight costs more than it saves, unless the weight is converted anyway.
        padding = 0 if on_cpu and dtype == weight.dtype else -vocab_size % ALIGNMENT
        matrix = nn.functional.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)
        row_block, class_block = CPU_BLOCKS if on_cpu else (LOSS_CHUNK, len(matrix))
        # Padded classes have probability zero, in the loss and in every gradient.
        offset = nn.functional.pad(bias.to(torch.float32 if on_cpu else dtype), (0, padding), value=-torch.inf)
        keep = targets != IGNORED
        classes = targets.where(keep, 0)[:, None]
        loss = torch.zeros((), dtype=torch.float32, device=device)
        grad_hidden = torch.empty_like(hidden_states)
        grad_weight = torch.zeros(matrix.shape, dtype=torch.float32, device=device)
        grad_bias = torch.zeros(offset.shape, dtype=torch.float32, device=device)
        for start in range(0, len(targets), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            chunk, kept = hidden_states[rows].to(dtype), keep[rows, None]
            logits = nn.functional.linear(chunk, matrix, None if on_cpu else offset)
            for block, block_kept, block_classes in zip(
                logits.split(row_block), kept.split(row_block), classes[rows].split(row_block), strict=True
            ):
                grad = nn.functional.log_softmax(block + offset if on_cpu else block, dim=-1, dtype=torch.float32)
                loss -= (grad.gather(1, block_classes) * block_kept).sum()
                grad.exp_().scatter_add_(1, block_classes, -torch.ones_like(block_classes, dtype=torch.float32))
                # Ignored rows: zero the small factor of each product, not the large one.
                grad_bias += grad.t().mv(block_kept[:, 0].float())
                block.copy_(grad)  # the logits' gradient takes their place
            grad_hidden[rows] = (logits @ matrix) * kept
            chunk = chunk * kept
            for part, columns in zip(grad_weight.split(class_block), logits.split(class_block, dim=1), strict=True):
                if dtype == torch.float32:
                    part.addmm_(columns.t(), chunk)
                else:
                    part += columns.t() @ chunk
            del logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.vocab_size, ctx.dtypes = vocab_size, (weight.dtype, bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *of_head = ctx.saved_tensors
        pairs = zip(of_head, ctx.dtypes, strict=True)
        scaled = ((grad[: ctx.vocab_size] * grad_loss).to(dtype) for grad, dtype in pairs)
        return grad_hidden * grad_loss.to(grad_hidden.dtype), *scaled, None, None
