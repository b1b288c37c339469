# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""HTTP server with OpenAI's API for completions and chat completions."""
