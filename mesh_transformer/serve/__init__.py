# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A trained model behind HTTP: OpenAI's wire format, the original's /complete, numbers for Prometheus, and a page."""
