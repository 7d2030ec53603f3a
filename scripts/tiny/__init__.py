# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
`longllava-tiny`, the small checkpoint of the package: its data, its training and its evaluation.

| module      | what it is for                                                                                      |
|-------------|-----------------------------------------------------------------------------------------------------|
| `nouns`     | what the model names, and what the icon sets call it                                                |
| `assets`    | drawings, photographs and films from packages; their licences                                       |
| `pictures`  | objects and digits on footage                                                                       |
| `tasks`     | rows of the stages: `tiny.tasks:align`, `tiny.tasks:single_image`, `tiny.tasks:multi_image`         |
| `tower`     | the vision tower, which LongLLaVA takes ready-made                                                  |
| `model`     | tokenizer, configuration, processor                                                                 |
| `prototype` | the decoder, which LongLLaVA takes ready-made too; and the stages in a plain loop                   |
| `evaluate`  | the published numbers                                                                               |

With `scripts` on PYTHONPATH:

    python -m tiny.assets
    python -m tiny.tower --output tower
    python -m tiny.prototype text --tower tower --output decoder --muon-rate 0.02
"""
