# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory of the host: tuning of glibc's malloc, and how much is available.

malloc can retain freed memory for reuse, or return it to the system. There is no effect with another C library.
"""

import ctypes
import os
import sys
from pathlib import Path

# Parameters of mallopt, with the value that retains freed memory and glibc's default.
_RETAIN_OR_DEFAULT = {
    -4: (0, 65_536),  # M_MMAP_MAX: number of allocations that are mapped separately
    -1: (-1, 131_072),  # M_TRIM_THRESHOLD: free bytes at the top of the heap that are not returned; -1: unlimited
}
_ARENA_MAX = -8


def keep_freed_memory(keep: bool, *, one_arena: bool | None = None) -> None:
    """Configure malloc to retain freed memory, or restore the defaults and release it. Linux with glibc only.

    XLA's CPU client allocates the temporary buffers of a step again in every step. If malloc returns them to the kernel in
    between, every page is faulted in and zeroed again, which takes a third of the time of a training step with a few
    million parameters.

    `one_arena` (default: `keep`) limits malloc to the first arena, the only one that can grow without limit. It must be
    set before JAX starts its threads.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_ARENA_MAX, int(keep if one_arena is None else one_arena))
        for parameter, values in _RETAIN_OR_DEFAULT.items():
            libc.mallopt(parameter, values[0 if keep else 1])
        if not keep:
            trim_memory()


def available_memory() -> int:
    """Return the bytes available to a new process: the minimum over the host and its control group."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(1024 * int(sizes["MemAvailable"].split()[0]))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (group / "memory.max").read_text().strip() != "max":
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(limits), 0)


def trim_memory() -> None:
    """Return freed memory that glibc retains to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
