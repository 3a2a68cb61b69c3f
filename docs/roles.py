"""A griffe extension: references of Sphinx's form in docstrings become links."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

_REFERENCE = re.compile(r":(?:class|data|func|meth|mod|attr):`~?\.?([\w.]+)`")


class Roles(griffe.Extension):
    """Links of references such as :class:`.Selection`, where the site has their target."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of a package."""
        objects = list(_objects(pkg))
        paths: dict[str, list[str]] = {}
        for found in objects:
            paths.setdefault(found.name, []).append(found.path)
        for found in objects:
            if found.docstring is not None:
                found.docstring.value = _REFERENCE.sub(
                    lambda match, own=found: _link(match[1], own, paths),
                    found.docstring.value,
                )


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _link(target: str, own: griffe.Object, paths: dict[str, list[str]]) -> str:
    name = target.rpartition(".")[2]
    ends = [p for p in paths.get(name, ()) if f".{p}".endswith(f".{target}")]
    # Of several, the one nearest to the docstring.
    path = max(ends, key=lambda p: _shared(p, own.path), default=target)
    return f'<autoref identifier="{path}" optional><code>{target}</code></autoref>'


def _shared(path: str, other: str) -> int:
    """Number of leading parts that two dotted paths share."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(path))
