"""Recognize the pointer files that Git LFS leaves in place of files it did not download."""

from __future__ import annotations

#: Description of a pointer file, for messages.
POINTER = "is a pointer of Git LFS, not the file itself: run git lfs pull"
_FIRST_LINE = "version https://git-lfs.github.com/spec/"
#: Where that was before 2015.
_OLD_FIRST_LINE = "version https://hawser.github.com/spec/"


def is_pointer(text: str | bytes) -> bool:
    """Return whether a file that begins with ``text`` is a Git LFS pointer."""
    start = text.decode("latin-1") if isinstance(text, bytes) else text
    return start.startswith((_FIRST_LINE, _OLD_FIRST_LINE))
