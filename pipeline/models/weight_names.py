"""The names that a model's weights have in its files, and those that they have in memory.

transformers may keep weights otherwise than their files do: the experts of a layer as one tensor,
say, or a layer under a newer name. What is published is as in the files, which every engine loads:
transformers' `revert_weight_conversion` makes it so, and this module undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


def as_in_memory(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` from files by the names and in the shapes that `model` has in memory.

    What has such a name already stays as it is, and so does what `model` does not know.

    Raises:
        RuntimeError, ValueError: their shapes do not go together.
    """
    names = model.state_dict()
    if weights.keys() <= names.keys():
        return dict(weights)
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    collected: dict[str, WeightTransform] = {}
    for name in sorted(weights, key=dot_natural_key):  # expert 10 after expert 9
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, names
        )
        if renamed not in names:
            renamed, pattern = name, None
        if pattern is None:
            transform = WeightRenaming(name, renamed)
        else:
            transform = deepcopy(of_pattern[pattern])
        collected.setdefault(renamed, transform).add_tensor(
            renamed, name, pattern or name, weights[name]
        )
    converted: dict[str, Tensor] = {}
    for first, transform in collected.items():
        for name, found in transform.convert(first, model=model, config=model.config).items():
            converted[name] = found[0] if isinstance(found, list) else found
    return converted
