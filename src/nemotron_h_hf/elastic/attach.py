"""Joins elastic to the model classes: `from_pretrained(..., budget=)`, and the checks of budgets and manifests.

This is outside of the model's folder, which is also pushed with the weights. Importing the package attaches it. Where a
checkpoint's code runs alone, the field `elastic` of a configuration is kept and not read.
"""

import os
from collections.abc import Mapping
from typing import Any

from ..manifest import NAME, check_manifest, find_manifest
from ..model import saving
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.configuration_nemotron_h_vl import NemotronHVLConfig
from ..model.modeling_nemotron_h import NemotronHPreTrainedModel
from .budgets import check_elastic
from .child_files import ChildFiles, find_child
from .resolve import Request
from .vision import VisionChildFiles, find_vision_child

plain_validate = NemotronHConfig.validate
plain_from_pretrained = NemotronHPreTrainedModel.from_pretrained.__func__


def attach() -> None:
    """Add budgets to the configuration and loading to the models; a save removes an older manifest."""
    NemotronHConfig.elastic, NemotronHConfig.fields_of_others = None, ("elastic",)
    NemotronHConfig.validate = validate
    NemotronHPreTrainedModel.from_pretrained = classmethod(from_pretrained)
    saving.DESCRIPTIONS.add(NAME)


def validate(self: NemotronHConfig) -> None:
    """Check every field, and the budgets."""
    plain_validate(self)
    if self.elastic is not None:
        check_elastic(self)


def from_pretrained(
    cls: type[NemotronHPreTrainedModel],
    pretrained_model_name_or_path: str | os.PathLike | None,
    *args,
    budget: Request | None = None,
    **kwargs,
) -> NemotronHPreTrainedModel:
    """As transformers', with every tensor in the dtype it is stored in unless `dtype` is given.

    Args:
        budget: of an elastic parent, load only this smaller model: a name ("6b"), a fraction (0.5, "50%"), a need
            ("7GiB@32Ki"), sizes (a mapping) or a `Budget`; see resolve.py. The parent is never built, and rows that are
            cut away are not read: `output_loading_info=True` tells `bytes_read` and `parent_bytes`.

    Raises:
        ValueError: for files that are cut short or changed after their manifest, weights that do not fit the config,
            NaN or infinity, pickled weights, or a budget that does not fit the parent.
    """
    path, reader = pretrained_model_name_or_path, None
    manifest = None if path is None else find_manifest(path, kwargs)
    if budget is not None:
        sees = issubclass(cls.config_class, NemotronHVLConfig)
        find, files_of = (find_vision_child, VisionChildFiles) if sees else (find_child, ChildFiles)
        child, kwargs = find(cls.config_class, path, budget, kwargs)
        reader = files_of(child)

    def read_weights(files: list[str]) -> Mapping[str, Any] | None:
        if manifest is not None:
            check_manifest(manifest, files)
        return None if reader is None else reader.tensors(files)

    with_info = kwargs.pop("output_loading_info", False)
    given = {**kwargs, "read_weights": read_weights, "output_loading_info": True}
    model, info = plain_from_pretrained(cls, path, *args, **given)
    if reader is not None:
        reader.report()
        info = {**info, "bytes_read": reader.bytes_read, "parent_bytes": reader.parent_bytes}
    return (model, info) if with_info else model
