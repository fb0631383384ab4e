"""Make API pages of the folders of mm1/ that have no __init__.py.

mkdocstrings does not read folders without this file as packages, so it reads a copy of mm1/ that has the missing files.
"""

import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

FOLDERS = ("engine", "kernels", "autotune", "bench", "integrations")
COPY = tempfile.TemporaryDirectory(prefix="mm1-docs-")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config):
    """Copy the sources, add the missing files, and let mkdocstrings read the copy."""
    package = Path(COPY.name) / "mm1"
    source = Path(config.config_file_path).parent / "mm1"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("digits", "results", "tables"), dirs_exist_ok=True)
    for folder in FOLDERS:
        (package / folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [COPY.name]
    return config
