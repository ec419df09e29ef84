"""nanophi: pretrain small English language models and publish them on the Hugging Face Hub.

Importing the package is fast: torch and transformers are imported with the first of its classes. Importing a class,
from here or from its own module, registers NanoPhi with transformers' Auto classes, so that
`AutoModelForCausalLM.from_config(NanoPhiConfig())` works without remote code.
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

_MOVED = {name: f"nanophi.core.{name}" for name in ("files", "formatting", "inputs", "jobs", "recipe", "run")}
_MOVED |= {"model_card.shipped": "nanophi.model_card.records"}
"""Modules that had another place in 0.1; their old names still import."""


class _Moved:
    """Finds `nanophi.recipe` where it is now."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        loader: Any = _Moved()
        old = name.removeprefix("nanophi.")
        return importlib.util.spec_from_loader(name, loader, origin=_MOVED[old]) if old in _MOVED else None

    def create_module(self, spec: Any) -> ModuleType:
        module = importlib.import_module(spec.origin)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has replaced it by the old name's


def _register() -> None:
    import transformers

    from nanophi import modeling_nanophi
    from nanophi.configuration_nanophi import AUTO_MAP, NanoPhiConfig

    transformers.AutoConfig.register("nanophi", NanoPhiConfig)
    for auto_class, name in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling_nanophi, name.rpartition(".")[2])
            getattr(transformers, auto_class).register(NanoPhiConfig, model_class)


class _Package(ModuleType):
    """Registers the classes as soon as their modules have been imported, by whatever statement.

    Python sets each imported submodule as an attribute of its package. The files themselves cannot register, because
    copies of them are loaded as remote code beside the installed package.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # modeling_nanophi imports configuration_nanophi: the later of the two registers both.
        if name == "modeling_nanophi" or (
            name == "configuration_nanophi" and f"{self.__name__}.modeling_nanophi" not in sys.modules
        ):
            _register()

    def __getattr__(self, name: str) -> Any:
        if name in _MOVED:
            return importlib.import_module(_MOVED[name])
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from nanophi import configuration_nanophi, modeling_nanophi

        return getattr(configuration_nanophi if name == "NanoPhiConfig" else modeling_nanophi, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
if not any(isinstance(finder, type) and finder.__name__ == "_Moved" for finder in sys.meta_path):
    sys.meta_path.append(_Moved)
