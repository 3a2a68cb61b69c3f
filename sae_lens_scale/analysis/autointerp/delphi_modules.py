"""Import of delphi without the large packages that nothing here uses."""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Packages of hundreds of megabytes that every part of delphi imports: for its client for local
# models (vllm) and for non-activating passages that resemble activating ones.
_UNUSED = {
    "vllm": ["distributed", "distributed.parallel_state", "inputs"],
    "faiss": [],
    "sentence_transformers": [],
}


class _StandIn(ModuleType):
    """Stand-in for a module that is not installed: its names can be imported, not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> None:
            raise ImportError(f"{name} needs {self.__name__}, which is not installed")

        return type(name, (), {"__init__": refuse})


@cache
def load_delphi() -> ModuleType:
    """
    Import delphi, with or without the large packages that nothing here needs.

    Raises:
        ImportError: If delphi, or a package that it needs here, is not installed.
    """
    stand_ins = {
        name: _StandIn(name)
        for package, modules in _UNUSED.items()
        if find_spec(package) is None
        for name in (package, *(f"{package}.{module}" for module in modules))
    }
    sys.modules.update(stand_ins)
    try:
        for name in ("clients", "config", "explainers", "latents", "scorers"):
            import_module(f"delphi.{name}")
        return sys.modules["delphi"]
    except ImportError as error:
        raise ImportError(
            f"Automated interpretability needs delphi ({error}): pip install "
            "'.[autointerp]' in a checkout of sae-lens-scale, and then "
            "pip install --no-deps eai-delphi==0.1.3"
        ) from error
    finally:
        # Other code must not take them for the packages.
        for name in stand_ins:
            del sys.modules[name]
