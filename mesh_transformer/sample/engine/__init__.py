# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Generation engine: prefill, KV caches, continuous batching, decode programs and speculative decoding."""
