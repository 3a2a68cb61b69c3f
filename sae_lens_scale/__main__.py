"""The command line by ``python -m sae_lens_scale``."""

import sys

from .cli import main

sys.exit(main())
