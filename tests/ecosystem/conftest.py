"""Tests with tools of others: `make test-ecosystem` installs them."""

from importlib.util import find_spec

collect_ignore = [
    f"test_{tool}.py"
    for tool in ("nnsight", "sae_dashboard", "sae_bench")
    if find_spec(tool) is None
]
