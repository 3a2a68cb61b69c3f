"""Training of one SAE by several processes, which share out its tokens and its experts."""

import os


def is_launched() -> bool:
    """Say whether this process is one of several that torchrun, or the like, has started."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
