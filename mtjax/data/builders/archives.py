"""Lines of original files, unpacked or inside the archive that they came in."""

import tarfile
from functools import lru_cache
from pathlib import Path

from mtjax.data.builders.spec import DataFormatError, require


def read_lines(
    folder: Path,
    member: str,
    *,
    archive: str,
    encoding: str = "utf-8",
    fallback: str | None = None,
) -> list[str]:
    """Reads a text file from a folder, or from an archive in that folder.

    Only a line feed ends a line: some of these texts hold the other characters that
    `str.splitlines` would break at, which shifts every following label.

    Args:
      folder: where the file or the archive is.
      member: path of the file inside the folder or the archive.
      archive: file name of the tar archive.
      encoding: encoding of the text.
      fallback: encoding of the lines that are not valid in `encoding`.

    Returns:
      The lines without their ends and without a last empty one.

    Raises:
      DataNotFoundError: if the folder has neither.
      DataFormatError: if the archive has no such member.
    """
    if (folder / member).is_file():
        content = (folder / member).read_bytes()
    else:
        path = require(folder, archive, member)
        changed = path.stat().st_mtime_ns
        members = _members(path, changed)
        if member not in members:
            raise DataFormatError(f"{str(path)!r} must hold {member!r}, not found.")
        content = members[member]
    lines = content.removesuffix(b"\n").split(b"\n")
    return [_decode(line.removesuffix(b"\r"), encoding, fallback) for line in lines]


def _decode(line: bytes, encoding: str, fallback: str | None) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError:
        if fallback is None:
            raise
        return line.decode(fallback)


# One archive at a time: the configurations of a family share it, and unpacking takes
# longer than reading.
@lru_cache(maxsize=1)
def _members(path: Path, changed: int) -> dict[str, bytes]:
    del changed
    members = {}
    with tarfile.open(path) as tar:
        for info in tar:
            if file := tar.extractfile(info):
                members[info.name.removeprefix("./")] = file.read()
    return members
