# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Look up whether a resumed run may change a configuration field."""

import dataclasses
import types
import typing
from typing import Any

from mesh_transformer.config.field_types import Resume
from mesh_transformer.config.schema import Config


def resume_rule(path: str) -> Resume:
    """Return the rule of the field at a dotted path, such as "train.batch_size".

    The innermost marker on the way to the field decides. Keys below a dictionary (names of datasets, mesh axes) and
    paths that the schema no longer has take the rule of the last field that was found.
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
        return next(one for one in typing.get_args(hint) if one is not types.NoneType)
    return hint


def _value_type(hint: Any) -> Any:
    """Return the type of a dictionary's values; any other type as it is."""
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
