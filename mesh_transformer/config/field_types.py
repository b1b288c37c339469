# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Field types of the configuration schema: ranges of values, strictness, and what a resumed run may change."""

import enum
from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]  # in [0, 1)
Share = Annotated[float, Field(gt=0.0, le=1.0)]  # in (0, 1]
Amount = Annotated[float, Field(ge=0.0)]
Rate = Annotated[float, Field(gt=0.0)]


class Resume(enum.Enum):
    """Marker in a field's annotation: whether a resumed run may have another value than the run was started with.

    A marked section applies to all of its fields; a marked field overrides its section. Unmarked fields are FIXED.
    `resume_rules.resume_rule` looks a field up.
    """

    FIXED = "fixed"  # another value is an error
    LOGGED = "logged"  # another value is accepted, and the change is printed and logged
    FREE = "free"  # another value is accepted; it does not change what is computed, or is meant to differ
