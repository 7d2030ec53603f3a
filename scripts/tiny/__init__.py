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
| `decoder`   | the decoder, which LongLLaVA takes ready-made too                                                   |
| `evaluate`  | the published numbers                                                                               |
| `examples`  | the pictures and films in `examples`                                                                |
| `ablation`  | what pooling, the hybrid decoder, the stages and replay are worth                                   |

In a folder with room for them, with `scripts` on PYTHONPATH as `SCRIPTS`, two cores and about three hours:

    python -m tiny.assets
    python -m tiny.tower --output tower
    python -m tiny.decoder --tower tower --output decoder
    longllava train SCRIPTS/tiny/align.yaml
    longllava train SCRIPTS/tiny/single_image.yaml
    longllava train SCRIPTS/tiny/multi_image.yaml
    longllava train SCRIPTS/tiny/multi_image_long.yaml
    python -m tiny.evaluate multi_image_long
"""
