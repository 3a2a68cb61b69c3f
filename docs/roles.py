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
        known = list(_objects(pkg))
        for own in known:
            if own.docstring is not None:
                own.docstring.value = _REFERENCE.sub(
                    lambda match, own=own: _link(match[1], own, known),
                    own.docstring.value,
                )


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _link(target: str, own: griffe.Object, known: list[griffe.Object]) -> str:
    name = f"<code>{target}</code>"
    found = [each for each in known if f".{each.path}".endswith(f".{target}")]
    if not found:
        return name
    # Of several, the one nearest to the docstring.
    nearest = max(found, key=lambda each: _shared(each.path, own.path))
    # A name without a docstring is not on the site, but its module may be.
    at = nearest if nearest.docstring or nearest.parent is None else nearest.parent
    return f'<autoref identifier="{at.path}" optional>{name}</autoref>'


def _shared(path: str, other: str) -> int:
    """Number of leading parts that two dotted paths share."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(path))
