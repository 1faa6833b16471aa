"""``python -m moshi_sdk`` is ``moshi-fl``."""

import sys

from moshi_sdk.cli import main

if __name__ == "__main__":
    sys.exit(main())
