# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Multi-process runs: startup, coordination, failure detection, stop requests and preemption notices."""
