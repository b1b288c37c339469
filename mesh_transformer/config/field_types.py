# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Field types of the configuration schema that pydantic does not define, and rules for changes in a resumed run."""

import enum
from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # no unknown keys, conversions, nan or inf
FractionBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]  # in [0, 1)
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]  # in (0, 1]


class Resume(enum.Enum):
    """Marker in a field's annotation: the rule for a resumed run whose value differs from the one it was started with.

    A marked section applies to all of its fields; a marked field overrides its section. Unmarked fields are FIXED.
    `resume_rules.resume_rule` returns the rule of a field.
    """

    FIXED = "fixed"  # a different value is an error
    LOGGED = "logged"  # a different value is accepted, and the change is printed and logged
    FREE = "free"  # a different value is accepted without a note: it does not change the function that is trained
