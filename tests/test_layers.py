"""Each layer of the package imports only what is below it."""

import ast
from pathlib import Path

import sae_lens_scale

ROOT = Path(sae_lens_scale.__file__).parent
# From the bottom up; modules of one layer may use each other.
LAYERS = [
    {"ops"},
    {"routing", "feature_scaling", "dead_latents", "initialization"},
    {"saes"},
    {"training"},
    {"loading"},
    {"analysis"},
    {"experiments"},
    {"cli", "sae_commands", "error_text"},
]


def layer_of(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at its top or inside."""
    package = ["sae_lens_scale", *path.relative_to(ROOT).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


def test_layers_import_only_what_is_below_them():
    checked = 0
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imports(path):
            if name.startswith("sae_lens_scale."):
                used = name.split(".")[1]
                assert layer_of(used) <= layer_of(parts[0]), f"{path} imports {name}"
                checked += 1
    assert checked > 20


def test_ops_and_functions_over_plain_tensors_do_not_know_SAELens():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",) and layer_of(parts[0]) <= 1:
            known = {name.split(".")[0] for name in imports(path)}
            assert not known & {"sae_lens", "transformer_lens"}, path


def test_the_oracle_calls_none_of_the_code_it_judges():
    used = {
        name
        for name in imports(ROOT / "ops" / "reference.py")
        if name.startswith("sae_lens_scale")
    }
    assert used == {"sae_lens_scale.ops.types"}
