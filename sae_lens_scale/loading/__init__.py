"""Loading of language models, texts, and checkpoints of the authors' code."""

from .authors import (
    authors_disk_loader,
    authors_huggingface_loader,
    convert_authors_checkpoint,
)

__all__ = [
    "authors_disk_loader",
    "authors_huggingface_loader",
    "convert_authors_checkpoint",
]
