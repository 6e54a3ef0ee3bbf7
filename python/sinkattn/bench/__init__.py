# SPDX-License-Identifier: Apache-2.0
"""Benchmark of sinkattn beside its peers: ``python -m sinkattn.bench --help``."""
