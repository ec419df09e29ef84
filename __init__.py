"""nanophi: pretrain small English language models and publish them on the Hugging Face Hub.

Importing the package is fast: torch and transformers are imported with the first of its classes, which also registers
NanoPhi with transformers' Auto classes: `AutoModelForCausalLM.from_config(NanoPhiConfig())` works without remote code.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nanophi.core.version import __version__

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig
    from nanophi.modeling_nanophi import NanoPhiForCausalLM, NanoPhiModel

__all__ = ["NanoPhiConfig", "NanoPhiForCausalLM", "NanoPhiModel", "__version__"]

_MOVED = {
    **{
        f"nanophi.{name}": f"nanophi.core.{name}" for name in ("files", "formatting", "inputs", "jobs", "recipe", "run")
    },
    "nanophi.model_card.shipped": "nanophi.model_card.records",
}


class _Moved:
    """Finds modules that had another place in 0.1, such as `nanophi.recipe`, where they are now."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        loader: Any = _Moved()
        return importlib.util.spec_from_loader(name, loader) if name in _MOVED else None

    def create_module(self, spec: Any) -> ModuleType:
        module = importlib.import_module(_MOVED[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has replaced it by the old name's


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'nanophi' has no attribute '{name}'")
    import transformers

    from nanophi import configuration_nanophi, modeling_nanophi

    classes = vars(configuration_nanophi) | vars(modeling_nanophi)
    transformers.AutoConfig.register("nanophi", classes["NanoPhiConfig"], exist_ok=True)
    for auto_class, path in list(configuration_nanophi.AUTO_MAP.items())[1:]:
        model_class = classes[path.rpartition(".")[2]]
        getattr(transformers, auto_class).register(classes["NanoPhiConfig"], model_class, exist_ok=True)
    return classes[name]
