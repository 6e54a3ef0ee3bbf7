# SPDX-License-Identifier: Apache-2.0
"""The demo: a GPT-OSS-architecture model learns to write Python, sinks included."""

from .run import main

__all__ = ["main"]
