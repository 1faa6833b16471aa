"""``python -m moshi_sdk`` is ``moshi-fl``."""

import sys

from moshi_sdk.cli import main

sys.exit(main())
