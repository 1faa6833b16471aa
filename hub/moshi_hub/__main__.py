"""``python -m moshi_hub`` is ``moshi-hub``."""

import sys

from moshi_hub.cli import main

if __name__ == "__main__":
    sys.exit(main())
