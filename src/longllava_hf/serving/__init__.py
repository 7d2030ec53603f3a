# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Servers for LongLLaVA: Transformers' own, and vLLM."""
