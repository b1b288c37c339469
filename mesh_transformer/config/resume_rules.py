# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules for configuration fields that changed between the start of a run and its resumption."""

import dataclasses
import types
import typing
from typing import Any

from mesh_transformer.config.field_types import Resume
from mesh_transformer.config.schema import Config


def resume_rule(path: str) -> Resume:
    """Return the rule of the field at a dotted path, such as "train.batch_size".

    The marker of the field applies, or else that of the nearest section that contains it. Keys of a dictionary (names of
    datasets, mesh axes) and paths that the schema no longer has use the rule of the deepest field on the path.
    """
    rule, kind = Resume.FIXED, Config
    for part in path.split("."):
        if not dataclasses.is_dataclass(kind):
            kind = _value_type(kind)
            continue
        hint = typing.get_type_hints(kind, include_extras=True).get(part)
        if hint is None:
            break
        if typing.get_origin(hint) is typing.Annotated:
            rule = next((marker for marker in hint.__metadata__ if isinstance(marker, Resume)), rule)
            hint = typing.get_args(hint)[0]
        kind = _without_none(hint)
    return rule


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(item for item in typing.get_args(hint) if item is not types.NoneType)
    return hint


def _value_type(hint: Any) -> Any:
    """Return the type of a dictionary's values; any other type as it is."""
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
