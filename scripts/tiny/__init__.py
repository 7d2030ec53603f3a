# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""`longllava-tiny`, the small checkpoint of the package: its data, its training and its evaluation."""
