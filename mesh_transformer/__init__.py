# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Model-parallel language models in JAX: train, sample and reshard, from one file, on any mesh of devices."""
