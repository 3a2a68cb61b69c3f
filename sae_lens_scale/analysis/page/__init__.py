"""A page to explore an SAE with: one HTML file that needs no network."""

from .explorer import explorer

__all__ = ["explorer"]
