"""Loading: a language model to train autoencoders on, and the authors' checkpoints."""

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
