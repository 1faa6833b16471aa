"""Core of moshi-fl: formats, codecs, aggregation, models and training.

The core asks nothing, prints nothing and talks to no network but Git.
``moshi_sdk`` (contributors) and ``moshi_hub`` (maintainers) build on it.
"""

__version__ = "0.1.0"
