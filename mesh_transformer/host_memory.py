# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory that this process has freed, given back to the system."""

import ctypes


def trim_memory() -> None:
    """Have glibc give back what it keeps of freed memory; nothing happens with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
