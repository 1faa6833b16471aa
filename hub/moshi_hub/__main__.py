"""``python -m moshi_hub`` is ``moshi-hub``."""

import sys

from moshi_hub.cli import main

sys.exit(main())
