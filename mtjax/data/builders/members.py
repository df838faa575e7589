"""Files of one kind out of an archive, one at a time, in the order of the archive."""

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def read_members(path: Path, suffix: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Reads the files of an archive whose names end in `suffix`.

    Args:
      path: a zip file, or a tar file with any of the usual compressions.
      suffix: the lower-case end of the names; upper case is accepted in the archive.

    Yields:
      The path inside the archive and the content. The order is the one of the
      archive, so that positions stay meaningful.
    """
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.lower().endswith(suffix):
                    yield PurePosixPath(name), archive.read(name)
        return
    with tarfile.open(path) as tar:
        for info in tar:
            if info.name.lower().endswith(suffix) and (file := tar.extractfile(info)):
                yield PurePosixPath(info.name), file.read()
