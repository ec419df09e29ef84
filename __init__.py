"""nanophi: pretrain small English language models and publish them on the Hugging Face Hub.

Importing this package registers NanoPhi with transformers' Auto classes, so that
`AutoModelForCausalLM.from_config(NanoPhiConfig())` works without remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.modeling_nanophi import NanoPhiForCausalLM, NanoPhiModel
from nanophi.version import __version__

AutoConfig.register("nanophi", NanoPhiConfig)
AutoModel.register(NanoPhiConfig, NanoPhiModel)
AutoModelForCausalLM.register(NanoPhiConfig, NanoPhiForCausalLM)

__all__ = ["NanoPhiConfig", "NanoPhiForCausalLM", "NanoPhiModel", "__version__"]
