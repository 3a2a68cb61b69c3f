"""Packages that only a part of this one needs, and the extras that bring them."""

from importlib.util import find_spec


def require(package: str, extra: str) -> None:
    """
    Refuse to go on without a package.

    Args:
        package: The name by which it is imported.
        extra: The extra of this package that brings it.

    Raises:
        ImportError: If it is not installed; the text says what to type.
    """
    if find_spec(package) is None:
        raise ImportError(
            f"this needs the package {package}, which is not installed: "
            f"pip install '.[{extra}]' in a checkout of sae-lens-scale"
        )
