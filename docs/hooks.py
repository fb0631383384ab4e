"""Let the API pages be made of the four folders of mm1/ that have no __init__.py.

The tool that reads docstrings takes a folder without that file for no package. It reads a copy that has one instead.
"""

import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

FOLDERS = ("engine", "kernels", "autotune", "bench", "integrations")
COPY = tempfile.TemporaryDirectory(prefix="mm1-docs-")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config):
    """Copy the sources with the missing files, and let mkdocstrings read the copy."""
    package = Path(COPY.name) / "mm1"
    source = Path(config.config_file_path).parent / "mm1"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("digits", "results", "tables"), dirs_exist_ok=True)
    for folder in FOLDERS:
        (package / folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [COPY.name]
    return config
