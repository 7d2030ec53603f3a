# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What MkDocs calls: results of benchmarks that a page links to become part of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


RESULTS = "benchmarks/results"


def on_files(files: Any, config: Any) -> Any:
    root = Path(config.config_file_path).parent
    for path in sorted((root / RESULTS).iterdir()):
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """On GitHub the folder is beside `docs`, in the site below it."""
    return re.sub(rf"\]\(\.\./(?={RESULTS}/)", "](", markdown)


__all__ = ["on_files", "on_page_markdown"]
