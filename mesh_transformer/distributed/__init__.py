# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Multi-process runs: start-up, coordination, failure detection, stop requests and preemption notices."""
