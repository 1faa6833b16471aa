"""What of the model a contribution changes: said of the delta itself, not by its contributor."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from moshi_fl.errors import ConfigError
from moshi_fl.hubfile import HubConfig
from moshi_fl.models import task_of


def trained_parts(
    config: HubConfig, tokenizer: bytes, carried: Mapping[str, Collection[str]]
) -> dict[str, str]:
    """The part of the model and the number of tensors, such as ``lora: 64 of 900 tensors``.

    Args:
        config: The hub's settings.
        tokenizer: The hub's tokenizer file.
        carried: By contribution, the names of the tensors in its delta; where there are none,
            nothing is said of it.
    """
    carried = {name: tensors for name, tensors in carried.items() if tensors}
    if not carried:
        return {}
    from moshi_fl.models.common import trained_part

    try:
        task = task_of(config, tokenizer)
    except ConfigError:  # the family is not installed here, which is no reason not to judge
        return {name: f"{len(tensors):,} tensors" for name, tensors in carried.items()}
    find = trained_part(task)
    return {name: str(find(tensors)) for name, tensors in carried.items()}
