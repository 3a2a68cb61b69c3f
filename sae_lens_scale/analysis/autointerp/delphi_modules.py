"""Import of delphi without the large packages that nothing here uses."""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

INSTALL = (
    'pip install "sae-lens-scale[autointerp]" and then '
    "pip install --no-deps eai-delphi==0.1.3"
)

# Packages of hundreds of megabytes that every part of delphi imports: for its client for local
# models (vllm) and for non-activating passages that resemble activating ones.
_UNUSED = {
    "vllm": ["distributed", "distributed.parallel_state", "inputs"],
    "faiss": [],
    "sentence_transformers": [],
}


class Delphi(NamedTuple):
    """The modules of delphi that are used. It may not be installed, so nothing is typed."""

    latents: Any
    samplers: Any
    config: Any
    explainers: Any
    scorers: Any
    client: Any


class _StandIn(ModuleType):
    """Stand-in for a module that is not installed: its names can be imported, not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> None:
            raise ImportError(f"{name} needs {self.__name__}, which is not installed")

        return type(name, (), {"__init__": refuse})


@cache
def load_delphi() -> Delphi:
    """
    Import delphi, with or without the large packages that nothing here needs.

    Returns:
        Its modules.

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
        return Delphi(
            latents=import_module("delphi.latents"),
            samplers=import_module("delphi.latents.samplers"),
            config=import_module("delphi.config"),
            explainers=import_module("delphi.explainers"),
            scorers=import_module("delphi.scorers"),
            client=import_module("delphi.clients.client"),
        )
    except ImportError as error:
        raise ImportError(
            f"Automated interpretability needs delphi ({error}): {INSTALL}"
        ) from error
    finally:
        # Other code must not take them for the packages.
        for name in stand_ins:
            del sys.modules[name]
