"""Test worktrees of two revisions: what is found, what stays unchanged, and what is removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.errors import ClearError
from pytest_int8bench.gate.ab import worktrees as module
from pytest_int8bench.gate.ab.worktrees import (
    GitError,
    Revision,
    changed_files,
    find_repository,
    has_submodules,
    resolve,
    worktrees,
)
from toys.repositories import git, isolate, make_temporary_folder

DEADLINE_S = 60


def commit(root: Path, message: str, **files: str) -> None:
    for name, text in files.items():
        (root / name).write_text(text)
    if files:
        git(root, "add", *files)
    git(root, "commit", "-q", "-m", message)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the tag ``v1``, the branch ``main`` after it, and work in progress."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder)
        git(folder, "init", "-q", "-b", "main")
        # A user's setting, which makes newer git write an extension into the configuration.
        git(folder, "config", "worktree.useRelativePaths", "true")
        commit(folder, "first: a model", text="1", staged="1", unstaged="1")
        git(folder, "tag", "-a", "-m", "note", "v1")
        commit(folder, "second", text="2")
        (folder / "text").write_text("stashed")
        git(folder, "stash", "--quiet")
        (folder / "staged").write_text("changed")
        git(folder, "add", "staged")
    (folder / "unstaged").write_text("changed")
    (folder / "untracked").write_text("new")
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    return make_temporary_folder(tmp_path, monkeypatch)


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """The user's repository."""
    return shutil.copytree(template, tmp_path / "Größe und Maß", symlinks=True)


def both(root: Path) -> dict[str, Revision]:
    return {"base": resolve(root, "v1"), "new": resolve(root, "main")}


def state(root: Path) -> dict[str, Any]:
    """Return everything that must not change, without writing anything."""
    common = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    own = Path(git(root, "rev-parse", "--absolute-git-dir"))
    index = own / "index"
    return {
        "status": git(root, "--no-optional-locks", "status", "--porcelain"),
        "files": {p.name: p.read_text() for p in root.iterdir() if p.is_file()},
        "index": (index.read_bytes(), index.stat().st_mtime_ns),
        "head": (own / "HEAD").read_bytes(),
        "heads": (own / "logs" / "HEAD").read_bytes(),
        "refs": git(root, "for-each-ref"),
        "stash": git(root, "stash", "list"),
        "config": (common / "config").read_bytes(),
    }


def listed(root: Path) -> list[Path]:
    lines = git(root, "worktree", "list", "--porcelain").splitlines()
    return [Path(line.partition(" ")[2]) for line in lines if line.startswith("worktree ")]


def is_clean(root: Path, temporary: Path) -> bool:
    """Return whether nothing of ours is left in git's folder or among temporary files."""
    return not (root / ".git" / "worktrees").exists() and not list(temporary.iterdir())


# -- finding ----------------------------------------------------------------------------------


def test_finds_repository_from_a_subfolder(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    assert find_repository(root / "a" / "b") == root
    assert find_repository(root) == root


def test_rejects_folder_outside_a_repository(tmp_path: Path) -> None:
    with pytest.raises(GitError) as caught:
        find_repository(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not in a git repository"
    assert isinstance(caught.value, ClearError)


def test_rejects_missing_folder(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with pytest.raises(GitError) as caught:
        find_repository(folder)
    assert str(caught.value) == (
        f"git cannot read {folder}: fatal: cannot change to '{folder}': No such file or directory"
    )


@pytest.mark.parametrize("part", ["bare", "Größe und Maß/.git"])
def test_rejects_bare_repository_and_git_folder(part: str, root: Path, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--bare", "bare")
    folder = tmp_path / part
    with pytest.raises(GitError) as caught:
        find_repository(folder)
    assert str(caught.value) == (
        f"{folder} is in a bare repository or a .git folder, not in a working tree"
    )


def test_reports_repository_that_git_refuses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # for git's own tests
    with pytest.raises(GitError) as caught:
        find_repository(root)
    assert str(caught.value) == (
        f"git cannot read {root}: fatal: detected dubious ownership in repository at '{root}'"
    )


def test_fails_without_git(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(GitError, match=r"^git is not installed$"):
        find_repository(root)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("main", "refs/heads/main"),
        ("HEAD", "refs/heads/main"),
        ("v1", "refs/tags/v1^{commit}"),
        ("main~1", "refs/tags/v1^{commit}"),
        (":/first: a", "refs/tags/v1^{commit}"),
        ("stash", "refs/stash"),
    ],
)
def test_resolves_revisions_to_commits(name: str, meant: str, root: Path) -> None:
    full = git(root, "rev-parse", meant)
    revision = resolve(root, name)
    assert revision == Revision(name, full)
    assert revision.label == f"{name} ({full[:10]})"


def test_hash_is_labelled_once(root: Path) -> None:
    full = git(root, "rev-parse", "main")
    for name in (full, full[:4], full[:12].upper()):
        revision = resolve(root, name)
        assert (revision.commit, revision.label) == (full, full[:10])
    # Too short for a hash: a branch whose name happens to be a prefix of one.
    assert Revision(full[:3], full).label == f"{full[:3]} ({full[:10]})"


def test_revision_is_not_parsed_as_an_option(root: Path) -> None:
    git(root, "update-ref", "refs/tags/-n", "main")  # `git tag` would reject the name
    assert resolve(root, "-n").commit == git(root, "rev-parse", "main")


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "gone",
        "-n",
        "--all",
        "--git-dir",
        "v1..main",
        "^main",
        "main^!",
        "v1:text",
        "0" * 40,
    ],
)
def test_rejects_unknown_revisions(name: str, root: Path) -> None:
    with pytest.raises(GitError) as caught:
        resolve(root, name)
    assert str(caught.value) == f"'{name}' is not a revision of {root}"


def test_error_mentions_shallow_clone(root: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth=1", root.as_uri(), str(clone))
    old = git(root, "rev-parse", "v1^{commit}")
    assert resolve(clone, "main").commit == git(root, "rev-parse", "main")
    for name in ("v1", old):
        with pytest.raises(GitError) as caught:
            resolve(clone, name)
        assert str(caught.value) == (
            f"'{name}' is not a revision of {clone} (the clone is shallow; fetch its history, in "
            "GitHub Actions with fetch-depth: 0)"
        )


def test_lists_changed_files(root: Path) -> None:
    assert changed_files(root) == ["staged", "unstaged"]
    (root / "a").mkdir()
    git(root, "mv", "text", "a/täxt \n")
    (root / "staged").write_text("1")  # staged, then reverted in the working tree only
    before = state(root)
    assert sorted(changed_files(root)) == ["a/täxt \n", "staged", "text", "unstaged"]
    assert state(root) == before
    git(root, "reset", "-q", "--hard")
    assert changed_files(root) == []


def test_git_output_is_in_english(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "git").write_text('#!/bin/sh\necho "fatal: in $LC_ALL" >&2\nexit 1\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    with pytest.raises(GitError, match=r"^fatal: in C$"):
        changed_files(root)


def test_listing_changes_does_not_refresh_the_index(root: Path) -> None:
    os.utime(root / "text", (1, 1))  # git would note that the content is the same
    before = state(root)
    assert changed_files(root) == ["staged", "unstaged"]
    assert state(root) == before


def test_changed_files_outside_a_repository(tmp_path: Path) -> None:
    with pytest.raises(GitError, match=r"^fatal: not a git repository"):
        changed_files(tmp_path)


# -- checking out -----------------------------------------------------------------------------


def test_checks_out_two_revisions(root: Path, temporary: Path) -> None:
    before = state(root)
    with worktrees(root, both(root)) as folders:
        assert list(folders) == ["base", "new"]
        assert [(folders[key] / "text").read_text() for key in folders] == ["1", "2"]
        assert [(folders[key] / "staged").read_text() for key in folders] == ["1", "1"]
        assert all(folder.parent.parent == temporary for folder in folders.values())
        for key, folder in folders.items():
            assert git(folder, "rev-parse", "HEAD") == both(root)[key].commit
            assert git(folder, "rev-parse", "--abbrev-ref", "HEAD") == "HEAD"
            assert git(folder, "status", "--porcelain") == ""
        assert state(root) == before
    assert state(root) == before
    assert is_clean(root, temporary)


def test_checks_out_one_commit_twice(root: Path, temporary: Path) -> None:
    main = resolve(root, "main")  # the user has it checked out as well
    with worktrees(root, {"base": main, "new": resolve(root, "HEAD")}) as folders:
        assert folders["base"] != folders["new"]
        assert [(folders[key] / "text").read_text() for key in folders] == ["2", "2"]
    assert is_clean(root, temporary)


@pytest.mark.parametrize("kind", ["linked", "beside a bare repository", "submodule"])
def test_supports_linked_worktrees_and_submodules(
    kind: str, root: Path, tmp_path: Path, temporary: Path
) -> None:
    tree = tmp_path / "tree"
    if kind == "linked":
        git(root, "worktree", "add", "-q", "-b", "work", str(tree))
    elif kind == "submodule":
        git(tmp_path, "init", "-q", "outer")
        local = ("-c", "protocol.file.allow=always")
        git(tmp_path / "outer", *local, "submodule", "--quiet", "add", str(root), "inner")
        tree = tmp_path / "outer" / "inner"
    else:
        git(tmp_path, "clone", "-q", "--bare", str(root), "bare")
        git(tmp_path / "bare", "worktree", "add", "-q", str(tree), "main")
    assert find_repository(tree) == tree
    (tree / "text").write_text("changed")
    git(tree, "add", "text")
    before, trees = state(tree), listed(tree)
    with worktrees(tree, both(tree)) as folders:
        assert [(folders[key] / "text").read_text() for key in folders] == ["1", "2"]
        assert state(tree) == before
    assert (state(tree), listed(tree)) == (before, trees)
    assert not list(temporary.iterdir())


def test_detects_submodules(root: Path) -> None:
    without = resolve(root, "main")
    commit(root, "third", **{".gitmodules": '[submodule "a"]\npath = a\nurl = nowhere\n'})
    with worktrees(root, {"base": without, "new": resolve(root, "main")}) as folders:
        assert [has_submodules(folders[key]) for key in folders] == [False, True]


def test_runs_no_hooks(root: Path, tmp_path: Path, temporary: Path) -> None:
    ran = tmp_path / "ran"
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("post-checkout", "post-index-change", "reference-transaction"):
        (hooks / name).write_text(f"#!/bin/sh\necho {name} >> '{ran}'\n")
        (hooks / name).chmod(0o755)
    git(root, "config", "core.hooksPath", str(hooks))
    with worktrees(root, both(root)):
        pass
    assert not ran.exists()
    git(root, "worktree", "add", "-q", "--detach", str(tmp_path / "by hand"))
    assert "post-checkout" in ran.read_text()


def test_ignores_variables_that_git_sets_for_hooks(
    root: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    git(tmp_path, "init", "-q", "-b", "main", str(other))
    commit(other, "other", text="other")
    before, others = state(root), state(other)
    with monkeypatch.context() as patch:
        patch.setenv("GIT_DIR", str(other / ".git"))
        patch.setenv("GIT_WORK_TREE", str(other))
        patch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
        patch.setenv("GIT_OBJECT_DIRECTORY", str(other / ".git" / "objects"))
        patch.setenv("GIT_COMMON_DIR", str(other / ".git"))
        patch.setenv("GIT_PREFIX", "a/")
        assert find_repository(root) == root
        assert changed_files(root) == ["staged", "unstaged"]
        with worktrees(root, both(root)) as folders:
            assert [(folders[key] / "text").read_text() for key in folders] == ["1", "2"]
    assert (state(root), state(other)) == (before, others)
    assert is_clean(root, temporary)


def test_respects_git_settings_in_the_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers set safe.directory this way, for example."""
    commit(root, "third", **{".gitattributes": "text filter=mine\n"})
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "filter.mine.smudge")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "sed s/2/two/")
    with worktrees(root, {"new": resolve(root, "main")}) as folders:
        assert (folders["new"] / "text").read_text() == "two"


def test_supports_temporary_folder_in_the_repository(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = root / "temp"
    inside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(inside))
    with pytest.raises(GitError) as caught, worktrees(root, both(root)):
        pass
    assert str(caught.value) == (
        f"the temporary directory must be outside of the repository {root}, got {inside}; "
        "set TMPDIR to another directory"
    )
    assert not list(inside.iterdir())


# -- removing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_removed_on_exception(error: type[BaseException], root: Path, temporary: Path) -> None:
    before = state(root)
    with pytest.raises(error, match=r"^in the body$"), worktrees(root, both(root)):
        raise error("in the body")
    assert state(root) == before
    assert is_clean(root, temporary)


def test_removes_first_worktree_if_the_second_fails(root: Path, temporary: Path) -> None:
    first = both(root)
    commit(root, "third", **{".gitattributes": "text filter=lfs\n"})
    git(root, "config", "filter.lfs.smudge", "false")
    git(root, "config", "filter.lfs.clean", "cat")
    git(root, "config", "filter.lfs.required", "true")
    third = resolve(root, "main")
    before = state(root)
    with pytest.raises(GitError) as caught, worktrees(root, {"base": first["base"], "new": third}):
        pytest.fail("the body must not run")
    assert str(caught.value) == (
        f"git cannot check out main ({third.commit[:10]}): error: external filter 'false' failed "
        "1; fatal: text: smudge filter lfs failed"
    )
    assert state(root) == before
    assert is_clean(root, temporary)


LFS = """Downloading model.pt (5.2 MB)
Error downloading object: model.pt (4d7a214): Smudge error: Object does not exist

Errors logged to '/r/.git/lfs/logs/20260131T000000.1.log'.
Use `git lfs logs last` to view the log.
error: external filter 'git-lfs filter-process' failed
fatal: model.pt: smudge filter lfs failed
"""


NO_LFS = """git-lfs filter-process: 1: git-lfs: not found
fatal: the remote end hung up unexpectedly
"""
FULL = """Updating files:  50% (1/2)\rUpdating files: 100% (2/2), done.
hint: free some space
error: unable to write file a: No space left
fatal: Could not reset index file
"""


@pytest.mark.parametrize(
    ("printed", "first", "last"),
    [
        (
            LFS,
            "Error downloading object: model.pt (4d7a214): Smudge error: Object does not exist",
            "; fatal: model.pt: smudge filter lfs failed",
        ),
        (
            NO_LFS,
            "git-lfs filter-process: 1: git-lfs: not found",
            "; fatal: the remote end hung up unexpectedly",
        ),
        (
            FULL,
            "error: unable to write file a: No space left",
            "; fatal: Could not reset index file",
        ),
        ("fatal: bad object\n", "fatal: bad object", ""),
        ("warning: only this\n", "warning: only this", ""),
        ("", "git failed without a message", ""),
    ],
)
def test_error_has_the_first_line_of_git(
    printed: str, first: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    (tmp_path / "printed").write_text(printed)
    fake.write_text(f"#!/bin/sh\ncat '{tmp_path}/printed' >&2\nexit 128\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(GitError) as caught:
        changed_files(tmp_path)
    assert str(caught.value) == first + last


def test_error_names_missing_object(root: Path, temporary: Path) -> None:
    first = both(root)
    blob = git(root, "rev-parse", "main:text")
    (root / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(GitError) as caught, worktrees(root, first):
        pytest.fail("the body must not run")
    assert str(caught.value) == (
        f"git cannot check out {first['new'].label}: error: unable to read sha1 file of text "
        f"({blob}); fatal: Could not reset index file to revision 'HEAD'."
    )
    assert is_clean(root, temporary)


def test_removes_worktrees_changed_by_a_build(root: Path, temporary: Path) -> None:
    with worktrees(root, both(root)) as folders:
        git(root, "worktree", "lock", "--reason", "mine", str(folders["base"]))
        (folders["base"] / "text").write_text("changed")
        (folders["base"] / "untracked").touch()
        (folders["new"] / ".git").unlink()
    assert is_clean(root, temporary)


def test_tolerates_deleted_worktrees(root: Path, temporary: Path) -> None:
    with worktrees(root, both(root)) as folders:
        shutil.rmtree(folders["base"].parent)
    assert is_clean(root, temporary)


def test_finds_leftovers(root: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError("Device or resource busy")

    with monkeypatch.context() as patch:
        with (
            pytest.warns(UserWarning, match="busy") as caught,
            worktrees(root, both(root)) as folders,
        ):
            patch.setattr(shutil, "rmtree", refuse)
        folder = folders["base"].parent
        assert [str(warning.message) for warning in caught] == [
            f"int8bench could not remove {folder}: Device or resource busy"
        ]
    assert listed(root)[1:] == list(folders.values())
    (folder / "owner").write_text("")
    with worktrees(root, {}):
        assert listed(root) == [root]
    assert is_clean(root, temporary)


def test_warnings_as_errors_do_not_lose_results(
    root: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError("Device or resource busy")

    warnings.simplefilter("error")
    with monkeypatch.context() as patch:
        with worktrees(root, both(root)) as folders:
            patch.setattr(shutil, "rmtree", refuse)
        folder = folders["base"].parent
    assert capsys.readouterr().err == (
        f"int8bench could not remove {folder}: Device or resource busy\n"
    )


def test_keeps_worktrees_of_the_user(root: Path, temporary: Path, tmp_path: Path) -> None:
    host = os.uname().nodename
    mine = [
        tmp_path / "missing",  # as on a disk that is not mounted
        tmp_path / "locked",
        temporary / "mine",
        temporary / f"mine-{host}" / "base",
        temporary / "scratch" / "base",
        tmp_path / f"int8bench-ab-abcdefgh-{host}" / "base",  # not among temporary files
        temporary / f"int8bench-ab-abcdefgh-{host}" / "a" / "deeper",
        temporary
        / "int8bench-ab-abcdefgh-another"
        / "base",  # a running process on another machine
    ]
    for folder in mine:
        git(root, "worktree", "add", "-q", "--detach", str(folder))
    git(root, "worktree", "lock", str(mine[1]))
    shutil.rmtree(mine[0])
    shutil.rmtree(mine[-1].parent)
    ours = temporary / f"int8bench-ab-abcdefgi-{host}" / "base"
    git(root, "worktree", "add", "-q", "--detach", str(ours))
    assert sorted(listed(root)) == sorted([root, *mine, ours])
    with worktrees(root, both(root)):
        pass
    assert sorted(listed(root)) == sorted([root, *mine])
    assert mine[2].is_dir()
    assert not ours.parent.exists()


def test_keeps_worktrees_of_a_running_process(root: Path, temporary: Path) -> None:
    with worktrees(root, both(root)) as first:
        with worktrees(root, both(root)) as second:
            assert not set(first.values()) & set(second.values())
            assert listed(root)[1:] == sorted([*first.values(), *second.values()])
        assert git(first["base"], "status", "--porcelain") == ""
        assert [(first[key] / "text").read_text() for key in first] == ["1", "2"]
    assert is_clean(root, temporary)


@pytest.mark.parametrize("owner", ["", "1", "x y", "{pid} 1", "{pid} {pid}", f"{2**70} 1"])
def test_reused_pid_does_not_protect_worktrees(owner: str, root: Path, temporary: Path) -> None:
    folder = temporary / f"int8bench-ab-abcdefgh-{os.uname().nodename}"
    git(root, "worktree", "add", "-q", "--detach", str(folder / "base"))
    (folder / "owner").write_text(owner.format(pid=os.getpid()))
    with worktrees(root, {}):
        assert listed(root) == [root]
    assert is_clean(root, temporary)


def test_checks_only_the_pid_without_proc(
    root: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROC", temporary / "none")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = temporary / f"int8bench-ab-abcdefgh-{os.uname().nodename}"
    git(root, "worktree", "add", "-q", "--detach", str(folder / "base"))
    (folder / "owner").write_text(f"{ended.pid} unknown")
    with worktrees(root, both(root)) as first, worktrees(root, {}):
        assert listed(root)[1:] == list(first.values())
    assert is_clean(root, temporary)


def test_keeps_foreign_trees(root: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary / f"int8bench-ab-abcdefgh-{os.uname().nodename}"
    git(root, "worktree", "add", "-q", "--detach", str(folder / "base"))

    def refuse(path: Path) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(module, "_start_time", lambda pid: None)
    with worktrees(root, {}):
        assert listed(root) == [root, folder / "base"]


# -- signals ----------------------------------------------------------------------------------

CHILD = """
import signal, sys
from pathlib import Path
from pytest_int8bench.gate.ab.worktrees import resolve, worktrees

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
root, ready = Path(sys.argv[1]), Path(sys.argv[2])
with worktrees(root, {"base": resolve(root, "v1"), "new": resolve(root, "main")}) as folders:
    if "read-only" in sys.argv:
        inside = folders["base"] / "build" / "inside"
        inside.mkdir(parents=True)
        (inside / "file").touch()
        (inside.parent / "link").symlink_to(ready.parent / "outside")
        inside.chmod(0o000)
        inside.parent.chmod(0o500)
        sys.exit(3)
    ready.touch()
    while True:
        signal.pause()
"""

# Block at the call with this word until the file `go` exists.
SLOW_GIT = """#!/bin/sh
for word; do
    if [ "$word" = {word} ]; then
        touch '{folder}/stopped'
        while [ ! -e '{folder}/go' ]; do sleep 0.01; done
    fi
done
exec {git} "$@"
"""

Start = Callable[..., "subprocess.Popen[str]"]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.005)


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a process that holds worktrees, in its own process group like in a terminal."""

    def end(group: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)

    with contextlib.ExitStack() as stack:

        def start(*arguments: str, before: tuple[str, ...] = (), **env: str) -> Any:
            process = subprocess.Popen(
                [*before, sys.executable, "-c", CHILD, root, tmp_path / "ready", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **env},
                start_new_session=True,
            )
            stack.enter_context(process)
            stack.callback(end, process.pid)
            return process

        yield start


@pytest.fixture
def slow_git(tmp_path: Path) -> Callable[[str], str]:
    def slow_git(word: str) -> str:
        """Return a PATH with a git that blocks at ``word``."""
        folder = tmp_path / "bin"
        folder.mkdir()
        real = shutil.which("git")
        (folder / "git").write_text(SLOW_GIT.format(word=word, folder=tmp_path, git=real))
        (folder / "git").chmod(0o755)
        return f"{folder}{os.pathsep}{os.environ['PATH']}"

    return slow_git


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_signal_removes_the_worktrees(
    number: signal.Signals, code: int, root: Path, temporary: Path, tmp_path: Path, start: Start
) -> None:
    before = state(root)
    process = start()
    wait_for(tmp_path / "ready", process)
    assert len(listed(root)) == 3
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == code
    assert state(root) == before
    assert is_clean(root, temporary)


@pytest.mark.parametrize("folder_is_gone", [False, True])
def test_next_use_removes_worktrees_of_a_killed_process(
    folder_is_gone: bool, root: Path, temporary: Path, tmp_path: Path, start: Start
) -> None:
    before = state(root)
    process = start()
    wait_for(tmp_path / "ready", process)
    left = listed(root)[1:]
    process.kill()
    # The process has ended but was not reaped, so its pid is still in use.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert len(left) == 2
    assert all((folder / "text").exists() for folder in left)
    if folder_is_gone:  # as /tmp is after a power cut
        shutil.rmtree(left[0].parent)
    with worktrees(root, both(root)) as folders:
        assert listed(root)[1:] == list(folders.values())
        assert not left[0].parent.exists()
    assert state(root) == before
    assert is_clean(root, temporary)


def test_signals_during_the_removal_do_not_stop_it(
    root: Path, temporary: Path, tmp_path: Path, start: Start, slow_git: Callable[[str], str]
) -> None:
    process = start(PATH=slow_git("remove"))
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "stopped", process)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    (tmp_path / "go").touch()
    assert process.wait(DEADLINE_S) == -signal.SIGINT
    assert is_clean(root, temporary)


@pytest.mark.parametrize("word", ["add", "reset"])
@pytest.mark.parametrize("from_terminal", [False, True])
def test_signal_during_checkout(
    word: str,
    from_terminal: bool,
    root: Path,
    temporary: Path,
    tmp_path: Path,
    start: Start,
    slow_git: Callable[[str], str],
) -> None:
    before = state(root)
    process = start(PATH=slow_git(word))
    wait_for(tmp_path / "stopped", process)
    if from_terminal:  # git gets it too
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == (-signal.SIGINT if from_terminal else 143)
    assert not (tmp_path / "ready").exists()
    assert state(root) == before
    assert is_clean(root, temporary)


def test_removes_read_only_files(root: Path, temporary: Path, tmp_path: Path, start: Start) -> None:
    (tmp_path / "outside").mkdir(mode=0o555)
    without: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root may write anywhere unless it drops that capability
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv can write to read-only folders")
        rights = "-dac_override,-dac_read_search"
        without = ("setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}")
    process = start("read-only", before=without)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (3, "")
    assert is_clean(root, temporary)
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o555


def test_restores_signal_handlers(root: Path) -> None:
    def mine(number: int, frame: object) -> None:
        pass

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGTERM, mine)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with worktrees(root, {}):
            assert signal.getsignal(signal.SIGINT) is found[signal.SIGINT]
            assert signal.getsignal(signal.SIGTERM) is not mine
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert [signal.getsignal(number) for number in numbers] == [
            found[signal.SIGINT],
            mine,
            signal.SIG_IGN,
        ]
        with pytest.raises(SystemExit) as caught, worktrees(root, both(root)):
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def test_other_threads_leave_signals_alone(root: Path, temporary: Path) -> None:
    texts: list[str] = []
    handlers = [signal.getsignal(signal.SIGTERM)]

    def run() -> None:
        with worktrees(root, both(root)) as folders:
            texts.extend((folder / "text").read_text() for folder in folders.values())
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert texts == ["1", "2"]
    assert handlers[0] is handlers[1]
    assert is_clean(root, temporary)


def test_loads_neither_pytest_nor_torch() -> None:
    code = "import sys, pytest_int8bench.gate.ab.worktrees as w; print(w.__name__, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert loaded[0] == "pytest_int8bench.gate.ab.worktrees"
    assert not {"pytest", "torch"} & set(loaded)
