"""The verb `nanophi push`."""

from nanophi.core.options import Gguf
from nanophi.model_card.push import push

__all__ = ["Gguf", "push"]
