"""Each layer of the package imports only those below it, and nothing from outside it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "sae_lens_scale"

# From the bottom up, each named by its deepest module or folder. Modules of one layer may
# use each other.
LAYERS = [
    # The version, files, packages of extras, and sparse products.
    ["_version", "files", "extras", "ops"],
    # Functions over tensors.
    [
        "saes.mixture.routing",
        "saes.mixture.selection",
        "saes.mixture.dispatch",
        "saes.mixture.feature_scaling",
        "saes.mixture.dead_latents",
        "saes.mixture.initialization",
    ],
    # What of SAELens and TransformerLens may vanish.
    ["upstream"],
    # SAEs as SAELens knows them.
    ["saes"],
    [
        "recipes",
        "loading",
        "run_settings",
        "cache",
        "runner",
        "distributed",
        "analysis",
    ],
    ["cli", "__main__"],
    # The public names.
    [""],
]

# Folders of the repository and those whose code they may import beside their own.
MAY_IMPORT = {
    PACKAGE: set(),
    "reproduction": {PACKAGE},
    "examples": {PACKAGE},
    "benchmarks": {PACKAGE, "reproduction", "examples"},
}
# Tests are imported under the names of their modules.
TESTS = {"tests", *(path.stem for path in (ROOT / "tests").iterdir())}


def module_of(path: Path) -> str:
    """Name of a file's module in the package; a folder's for its ``__init__.py``."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at its top or inside."""
    folder = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else ()
            start = [*base, *([node.module] if node.module else [])]
            # "from .mixture import routing" imports a module, too.
            found |= {".".join([*start, alias.name]) for alias in node.names}
    return found


def layer_of(module: str) -> int:
    """Index of the layer that names the module or, failing that, a folder around it."""
    index = {name: i for i, names in enumerate(LAYERS) for name in names}
    while module not in index:
        module = module.rpartition(".")[0]
    return index[module]


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def package_files() -> list[Path]:
    return list((ROOT / PACKAGE).rglob("*.py"))


def test_every_module_has_its_layer_and_every_layer_its_modules():
    modules = {module_of(path) for path in package_files()}
    assert {name for names in LAYERS for name in names} <= modules
    # A new module at the package's root gets its place in LAYERS.
    unplaced = {name for name in modules if layer_of(name) == len(LAYERS) - 1}
    assert unplaced == {""}


def test_layers_import_only_those_below_them():
    checked = 0
    for path in package_files():
        for name in imports(path):
            if name.partition(".")[0] == PACKAGE:
                used = layer_of(name.removeprefix(PACKAGE).removeprefix("."))
                assert used <= layer_of(module_of(path)), f"{path} imports {name}"
                checked += 1
    assert checked > 50


def test_files_sparse_products_and_functions_over_tensors_do_not_know_SAELens():
    plain = [path for path in package_files() if layer_of(module_of(path)) <= 1]
    assert len(plain) > 10
    for path in plain:
        assert not top_level(imports(path)) & {"sae_lens", "transformer_lens"}, path


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_of_the_repository_import_only_what_they_may(folder: str):
    forbidden = (MAY_IMPORT.keys() | TESTS) - MAY_IMPORT[folder] - {folder}
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    # Scripts of one folder import each other by their bare names.
    forbidden -= {path.stem for path in paths}
    for path in paths:
        assert not top_level(imports(path)) & forbidden, path


def test_the_oracle_imports_none_of_the_code_it_judges():
    assert top_level(imports(ROOT / "tests" / "reference.py")) <= {
        "dataclasses",
        "torch",
        "jaxtyping",
    }
