"""Git repositories isolated from everything outside a test."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest


def git(folder: Path, *args: str) -> str:
    """Run git in a folder; return its output."""
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, check=True)
    return os.fsdecode(done.stdout).strip()


def isolate(patch: pytest.MonkeyPatch, ceiling: Path) -> None:
    """Keep git from reading this machine's configuration and from finding a repository above."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "GITHUB_"))]:
        patch.delenv(name)
    patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    patch.setenv("GIT_CEILING_DIRECTORIES", str(ceiling))
    for who in ("AUTHOR", "COMMITTER"):
        patch.setenv(f"GIT_{who}_NAME", "a")
        patch.setenv(f"GIT_{who}_EMAIL", "a@b.c")


def isolate_pytest(patch: pytest.MonkeyPatch) -> None:
    """Let pytest sessions load only the plugins they name."""
    patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONPATH"):
        patch.delenv(name, raising=False)


def make_temporary_folder(tmp_path: Path, patch: pytest.MonkeyPatch) -> Path:
    """Isolate git and return a new folder for temporary files."""
    isolate(patch, tmp_path)
    folder = tmp_path / "temp"
    folder.mkdir()
    patch.setenv("TMPDIR", str(folder))
    patch.setattr(tempfile, "tempdir", str(folder))
    return folder
