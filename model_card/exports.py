"""What other programs compute of a model's configuration, and the form in which they read it.

The one table of field and program: `release.py` writes config.json by it, the card states the oldest transformers by
it, and `gguf.py` refuses by it what llama.cpp would leave out. A field that is not named here has one form everywhere.
"""

from typing import Any

FIRST = "4.37.2"  # the first transformers whose Phi is promised to compute a release
# Types of `rope_scaling` that every Phi computes; of the others versions before 5 compute something else.
OLD_SCALING = ("linear", "dynamic")
# Types that transformers' function for frequencies knows, but stock Phi, which rotates a part of a head, does not.
NOT_IN_PHI = ("proportional",)
# By the first version that is known to have them.
NEW_ACTIVATIONS = dict.fromkeys(("gelu_python_tanh", "prelu", "xielu"), "4.57")
NEW_ACTIVATIONS |= dict.fromkeys(("hardswish", "sqrtsoftplus"), "5.23")

# transformers' names of the one activation that llama.cpp's phi2 computes.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")


def scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE's type and the keys that are its own; empty for the default type. `rope` may hold other fields."""
    kind = rope.get("rope_type", "default")
    general = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
    return {} if kind == "default" else {"rope_type": kind, **{k: v for k, v in rope.items() if k not in general}}


def older_keys(rope: dict[str, Any]) -> dict[str, Any]:
    """The top-level keys from which transformers before 5 read `rope_parameters`."""
    keys: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaled = scaling(rope)
    if not scaled:
        return keys
    if _is_old(scaled):
        return {**keys, "rope_scaling": {"type": scaled["rope_type"], "factor": float(scaled["factor"])}}
    # They would compute something else, and stop without a base for the frequencies.
    return {**keys, "rope_theta": None}


def _is_old(scaled: dict[str, Any]) -> bool:
    return scaled["rope_type"] in OLD_SCALING and set(scaled) == {"rope_type", "factor"} and scaled["factor"] > 1


def oldest_transformers(config: dict[str, Any]) -> str:
    """The oldest transformers whose stock Phi computes a model: `config` as in the record `model.json`."""
    scaled = config.get("rope_scaling")
    wanted = [NEW_ACTIVATIONS.get(config["hidden_act"], FIRST), "4.48" if config["qk_layernorm"] else FIRST]
    wanted.append("5.4" if scaled and not _is_old(scaled) else FIRST)
    return max(wanted, key=lambda version: [int(part) for part in version.split(".")])


def beyond_llama_cpp(config: Any) -> str | None:
    """What of a `NanoPhiConfig` llama.cpp's phi2 would silently leave out, in words; None: it computes all of it."""
    scaled = scaling(config.rope_parameters)
    if config.qk_layernorm:
        return "llama.cpp's phi2 has no LayerNorm on queries and keys; qk_layernorm must be false"
    if config.hidden_act not in TANH_GELU:
        return f"llama.cpp's phi2 computes {TANH_GELU[0]}, not hidden_act {config.hidden_act!r}"
    if scaled and not (scaled["rope_type"] == "linear" and _is_old(scaled)):
        return f"llama.cpp's phi2 computes rope_type default and linear, not {scaled['rope_type']} of rope_parameters"
    if not isinstance(config.bos_token_id, int) or not isinstance(config.eos_token_id, int):
        return "a GGUF file needs one bos_token_id and one eos_token_id"
    return None
