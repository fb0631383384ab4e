"""Index the images of a folder and its sub-folders."""

import os
from pathlib import Path

from mm1.engine.data.samples import IMAGES, MemberCounts
from mm1.engine.data.shards import Shard
from mm1.engine.data.tar import File


class FolderShard(Shard):
    """Read the images of a folder, in the order of their paths. The first sub-folder of a path is the image's class.

    Links to files are followed, links to folders are not. damage: sub-folders that cannot be read. ignored: other
    files, and names that begin with a dot.
    """

    def __init__(self, file: File):
        super().__init__(file)
        self.ignored, self.names, self._size = MemberCounts(), list[str](), 0
        errors: list[OSError] = []
        for folder, folders, files in os.walk(file.path, onerror=errors.append):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in sorted(files):
                path = os.path.join(folder, name)
                if kind := _ignored(name, path):
                    self.ignored.add(kind, os.path.relpath(path, file.path))
                    continue
                self.names.append(os.path.relpath(path, file.path))
                self._size += os.path.getsize(path)
        self.names.sort()
        self.count = len(self.names)
        if errors:
            self.damage = f"{errors[0].filename}: {errors[0].strerror}, one of {len(errors)} folders left out"

    @property
    def size(self) -> int:
        """Return the bytes of all images."""
        return self._size

    def key(self, row: int) -> str:
        """Return the path of an image inside the folder."""
        return self.names[row]

    def item(self, row: int) -> tuple[bytes, str | None]:
        """Return the bytes of an image, and its class: the first sub-folder, None for an image in none."""
        first, *rest = Path(self.names[row]).parts
        return Path(self.file.path, self.names[row]).read_bytes(), first if rest else None


def _ignored(name: str, path: str) -> str:
    """Return the kind of a file that is not read, "" for an image."""
    ending = os.path.splitext(name)[1]
    if name.startswith("."):
        return "a name that begins with a dot"
    if ending[1:].lower() not in IMAGES:
        return ending or "a name without an extension"
    return "" if os.path.isfile(path) else "a broken link"
