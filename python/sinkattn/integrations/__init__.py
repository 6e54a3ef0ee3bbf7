# SPDX-License-Identifier: Apache-2.0
"""Adapters for the programs that call attention. They translate names and layouts only."""
