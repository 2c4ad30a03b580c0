"""Test one side of an A/B: its process, the code that it may import, and errors if it measures
nothing."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.files import is_plain
from pytest_int8bench.gate.ab import side as module
from pytest_int8bench.gate.ab.side import Side, SideError
from pytest_int8bench.gate.ab.worktrees import Revision
from pytest_int8bench.processes.ab_files import SideFiles
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.records import Result
from toys.processes import runs
from toys.results import result_of

COMMIT = "a" * 40
DEADLINE_S = 60
RESULT = result_of(nodeid="test_a.py::test[Größe]")


class Process:
    """Simulate the pytest process."""

    def __init__(self) -> None:
        self.command: list[str] = []
        self.cwd = Path()
        self.env: dict[str, str] = {}
        self.modules: dict[str, str] | None = {"os": os.__file__}
        self.commit: str | None = COMMIT
        self.results: list[Result] = [RESULT]
        self.has_journal = True
        self.output = ""
        self.code = 0
        self.only: list[str] | None = None

    def run(
        self, command: Any, *, cwd: Path, env: dict[str, str], log: Any, shell: bool = False
    ) -> int:
        self.command, self.cwd, self.env = command, cwd, env
        files = SideFiles(Path(env["INT8BENCH_SIDE"]))
        self.only = files.only()
        if self.modules is not None:
            (files.folder / "modules.json").write_text(json.dumps(self.modules))
        if self.has_journal:
            journal = Journal(files.journal, {"commit": self.commit})
            for result in self.results:
                journal.append(result)
        log.write(self.output)
        return self.code


@pytest.fixture
def side(tmp_path: Path) -> Side:
    """Return a side in ``worktrees/base``, whose files differ from the repository's."""
    root, tree = tmp_path / "repository", tmp_path / "worktrees" / "base"
    for folder in (root, tree):
        (folder / "sub" / "tests").mkdir(parents=True)
        (folder / "sub" / "tests" / "test_a.py").touch()
    (tmp_path / "cache").mkdir()
    return Side(
        revision=Revision("main", COMMIT),
        root=root,
        tree=tree,
        folder=tree / "sub",
        site=tree.parent / "site-base",
        cache=tmp_path / "cache",
        log=tmp_path / "ab.log",
    )


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    process = Process()
    monkeypatch.setattr(module, "run", process.run)
    return process


def refusal(side: Side) -> str:
    with pytest.raises(SideError) as caught:
        side.measure([], None)
    return str(caught.value)


# -- the process ------------------------------------------------------------------------------


def test_returns_results_of_a_process(side: Side, process: Process) -> None:
    measured = side.measure([], None)
    assert measured.results == [RESULT]
    assert measured.environment == {"commit": COMMIT}
    assert measured.seconds >= 0


def test_runs_lean_pytest_in_the_worktree(side: Side, process: Process) -> None:
    side.measure(["tests", "-k", "a or b"], None)
    *command, lean, journal = process.command
    assert command == [
        *(sys.executable, "-P", "-m", "pytest", "-p", "pytest_int8bench.suite.side"),
        *("tests", "-k", "a or b"),
    ]
    assert lean == "--int8-lean"
    assert Path(journal.removeprefix("--int8-journal=")).name == "journal.jsonl"
    assert process.cwd == side.folder
    # Its files are removed with the worktrees if this process is killed.
    assert Path(process.env["INT8BENCH_SIDE"]).is_relative_to(side.tree.parent)
    assert sorted(path.name for path in side.tree.parent.iterdir()) == ["base"]


def test_logs_command_and_output(side: Side, process: Process) -> None:
    process.output = "1 größer\n"
    side.measure(["tests"], None)
    side.measure(["others"], None)
    first, second = side.log.read_text().split("\n$ ")[1:]
    assert first.startswith(f"{sys.executable} -P -m pytest -p pytest_int8bench.suite.side tests ")
    assert first.endswith("  # main (aaaaaaaaaa)\n1 größer\n")
    assert " others " in second


@pytest.mark.parametrize("only", [None, [], ["b::ü", "a::b[x y]"]])
def test_process_gets_its_arguments(side: Side, process: Process, only: list[str] | None) -> None:
    side.measure([], only)
    assert process.only == (only if only is None else sorted(only))


def test_its_own_code_is_first_on_the_path(
    side: Side, process: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ["", str(tmp_path / "other"), str(side.root / "python"), "relative"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(given))
    side.measure([], None)
    assert process.env["PYTHONPATH"].split(os.pathsep) == [
        str(side.site),
        str(side.tree / "src"),
        str(side.tree),
        str(side.tree / "sub"),
        str(tmp_path / "other"),
        str(side.tree / "python"),
        "relative",
    ]


def test_sets_process_environment(
    side: Side, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "elsewhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "elsewhere")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-q")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "shared")
    side.measure([], None)
    assert not {"GIT_DIR", "GIT_INDEX_FILE", "PYTEST_XDIST_WORKER"} & set(process.env)
    assert process.env["PYTEST_ADDOPTS"] == "-q"
    assert process.env["TORCHINDUCTOR_CACHE_DIR"] == str(side.cache / "inductor")
    assert process.env["TRITON_CACHE_DIR"] == str(side.cache / "triton")


def test_compile_cache_has_a_plain_path(side: Side, process: Process, tmp_path: Path) -> None:
    cache = tmp_path / "my repo" / "it's cache"
    cache.mkdir(parents=True)
    replace(side, cache=cache).measure([], None)
    folder = Path(process.env["TORCHINDUCTOR_CACHE_DIR"])
    assert is_plain(folder)
    assert folder.resolve() == cache / "inductor"


@pytest.mark.parametrize(
    ("argument", "moved"),
    [
        ("tests", "tests"),
        ("../tests", "../tests"),
        ("{root}", "{tree}"),
        ("{root}/sub/tests/test_a.py::test_x[/y]", "{tree}/sub/tests/test_a.py::test_x[/y]"),
        ("{link}/sub/tests", "{tree}/sub/tests"),
        ("--int8-workload={root}/work.py:make", "--int8-workload={tree}/work.py:make"),
        ("--rootdir={root}", "--rootdir={tree}"),
        ("not=an=option", "not=an=option"),
        ("{root}-other/tests", "{root}-other/tests"),
        ("--set={root}/new.json", "--set={tree}/new.json"),
        # Not committed: paths of data stay, paths of code are moved.
        ("--int8-weights={root}/weights.pt", "--int8-weights={root}/weights.pt"),
        ("{root}/untracked.py", "{tree}/untracked.py"),
        ("{root}/.venv/lib/site-packages", "{root}/.venv/lib/site-packages"),
    ],
)
def test_moves_working_tree_paths_to_the_worktree(
    side: Side, process: Process, tmp_path: Path, argument: str, moved: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(side.root)
    for name in ("weights.pt", "untracked.py"):
        (side.root / name).touch()
    places = {"root": side.root, "tree": side.tree, "link": link}
    side.measure([argument.format(**places)], None)
    assert process.command[6] == moved.format(**places)


# -- its own code -----------------------------------------------------------------------------


def add_project(side: Side) -> None:
    """Add a top-level package, one in src, a module, and a folder that is not a package."""
    for name in ("flat", "src/inner"):
        (side.tree / name).mkdir(parents=True)
        (side.tree / name / "__init__.py").touch()
    (side.tree / "alone.py").touch()
    (side.tree / "docs").mkdir()


FOREIGN = (
    "main (aaaaaaaaaa): module {module} was imported from {path}, not from this revision; remove "
    "that path from sys.path, for example in a conftest.py or an editable install (see --install)"
)
INSTALLED = (
    "main (aaaaaaaaaa): module {module} was imported from {path}, not from the worktree; if the "
    "package must be built or installed, pass the command, for example --install 'pip install "
    "--no-deps .'"
)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("flat", "{tree}/flat/__init__.py", None),
        ("flat.deep.module", "{tree}/flat/deep/module.py", None),
        ("inner", "{tree}/src/inner/__init__.py", None),
        ("flat", "{site}/flat/__init__.py", None),
        ("numpy", "{other}/site-packages/numpy/__init__.py", None),
        ("docs", "{other}/site-packages/docs/__init__.py", None),
        ("flatter", "{other}/site-packages/flatter/__init__.py", None),
        ("numpy", "{root}/.venv/lib/python3.11/site-packages/numpy/__init__.py", None),
        ("numpy", "{root}/.venv/lib/python3/dist-packages/numpy/__init__.py", None),
        ("json", "{stdlib}/json/__init__.py", None),
        ("alone", "{stdlib}/alone.py", None),
        ("flat", "{other}/site-packages/flat/__init__.py", INSTALLED),
        ("flat.kernels", "{other}/site-packages/flat/kernels.so", INSTALLED),
        ("inner.x", "{other}/elsewhere/inner/x.py", INSTALLED),
        ("alone", "{other}/alone.py", INSTALLED),
        ("flat", "{root}/.venv/lib/python3.11/site-packages/flat/__init__.py", INSTALLED),
        ("flat", "{root}/flat/__init__.py", FOREIGN),
        ("flat", "{link}/flat/__init__.py", FOREIGN),
        ("helpers", "{root}/tools/helpers.py", FOREIGN),
        ("conftest", "{root}/conftest.py", FOREIGN),
    ],
)
def test_rejects_code_from_outside_the_worktree(
    side: Side, process: Process, tmp_path: Path, name: str, path: str, message: str | None
) -> None:
    add_project(side)
    (tmp_path / "link").symlink_to(side.root)
    path = path.format(
        tree=side.tree,
        root=side.root,
        site=side.site,
        link=tmp_path / "link",
        other=tmp_path / "other",
        stdlib=sysconfig.get_path("stdlib"),
    )
    process.modules = {"os": os.__file__, name: path, "zzz": str(side.tree / "zzz.py")}
    if message is None:
        assert side.measure([], None).results == [RESULT]
    else:
        expected = message.format(module=name, path=os.path.realpath(path))
        assert refusal(side) == expected


def test_ignores_tree_python(side: Side, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib = side.root / "env" / "lib" / "python3.11"
    process.modules = {"json": str(stdlib / "json" / "__init__.py")}
    assert refusal(side).startswith("main (aaaaaaaaaa): module json was imported from ")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(stdlib))
    assert side.measure([], None).results == [RESULT]
    process.modules = {"toy": str(side.root / "env" / "lib" / "toy.py")}
    assert refusal(side).startswith("main (aaaaaaaaaa): module toy was imported from ")


@pytest.mark.parametrize("where", [".", "python", "packages/toy"])
def test_recognizes_installed_project_in_any_layout(
    side: Side, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Code that is neither at the top level nor in src is not on the path."""
    (side.tree / where).mkdir(parents=True, exist_ok=True)
    (side.tree / where / "pyproject.toml").write_text('[project]\nname = "My.Toy"\n')
    packages = tmp_path / "lib" / "site-packages"
    info = packages / "my_toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-toy\nVersion: 1.0\n")
    (info / "RECORD").write_text(
        "toy/__init__.py,,\ntoy_fast.cpython-311-x86_64-linux-gnu.so,,\n../../bin/toy,,\n"
        "__editable___my_toy_finder.py,,\nmy_toy-1.0.dist-info/METADATA,,\n"
    )
    monkeypatch.syspath_prepend(packages)
    for name in ("toy.model", "toy_fast"):
        process.modules = {name: str(packages / "toy.py")}
        assert refusal(side) == INSTALLED.format(module=name, path=packages / "toy.py")
    for name in ("__editable___my_toy_finder", "other"):
        process.modules = {name: str(packages / "x.py")}
        assert side.measure([], None).results == [RESULT]


@pytest.mark.parametrize(
    "text", ["no = toml = file", "[project]\n", "project = 1", "[project]\nname = ''", "\udcff"]
)
def test_ignores_invalid_pyproject(side: Side, process: Process, text: str) -> None:
    (side.tree / "pyproject.toml").write_bytes(os.fsencode(text))
    process.modules = {"pytest": pytest.__file__}
    assert side.measure([], None).results == [RESULT]


@pytest.mark.parametrize(
    ("commit", "where"), [("b" * 40, f", but at commit {'b' * 40}"), (None, "")]
)
def test_rejects_other_root(side: Side, process: Process, commit: str | None, where: str) -> None:
    process.commit = commit
    assert refusal(side) == (
        f"main (aaaaaaaaaa): pytest's root folder must be in the worktree{where}; remove --rootdir "
        "and -c from the pytest arguments"
    )


# -- nothing measured -------------------------------------------------------------------------

TOO_OLD = (
    "main (aaaaaaaaaa): pytest-int8bench is missing in this revision, turned off, or too old for "
    "int8bench ab"
)


@pytest.mark.parametrize(
    ("code", "output", "why"),
    [
        (5, "collected 0 items\n", "no tests collected"),
        (4, "", "usage error"),
        (
            4,
            "ERROR: usage: pytest [options]\npytest: error: unrecognized arguments: -y\n  more\n",
            "usage error: unrecognized arguments: -y",
        ),
        (
            4,
            "ERROR: file or directory not found: benchmarks\n",
            "usage error: file or directory not found: benchmarks",
        ),
        (
            4,
            "\x1b[31mERROR: file or directory not found: x\n\x1b[0m\n",
            "usage error: file or directory not found: x",
        ),
        (
            2,
            "ERROR collecting a.py\nE   ModuleNotFoundError: No module named 'größe'\nE   more\n",
            "the tests could not be collected: ModuleNotFoundError: No module named 'größe'",
        ),
        (0, "", "no test ran"),
        (-9, "", "SIGKILL"),
        (-11, "Fatal Python error\n", "SIGSEGV"),
    ],
)
def test_explains_why_nothing_was_measured(
    side: Side, process: Process, code: int, output: str, why: str
) -> None:
    side.log.write_text("ERROR: of another process\nE   AssertionError\n")
    process.has_journal, process.code, process.output = False, code, output
    assert refusal(side) == (
        f"main (aaaaaaaaaa): pytest measured nothing: {why} (its output is in {side.log})"
    )


@pytest.mark.parametrize(
    "output",
    [
        'ImportError: Error importing plugin "pytest_int8bench.suite.side": No module named x\n',
        'ImportError: Error importing plugin "int8bench": No module named int8bench\n',
        'Error while loading plugin "int8bench".\nModuleNotFoundError: No module named x\n',
        "__main__.py: error: unrecognized arguments: --int8-lean --int8-journal=x\n",
    ],
)
def test_rejects_revision_without_the_plugin(side: Side, process: Process, output: str) -> None:
    process.has_journal, process.modules = False, None
    process.code, process.output = 4, output
    assert refusal(side) == TOO_OLD


def test_process_without_results_measured_nothing(side: Side, process: Process) -> None:
    process.results, process.code = [], 1
    assert "pytest measured nothing: every test failed before" in refusal(side)


def test_journal_without_header_measured_nothing(
    side: Side, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = process.run

    def truncated(*args: Any, env: dict[str, str], **options: Any) -> int:
        code = run(*args, env=env, **options)
        SideFiles(Path(env["INT8BENCH_SIDE"])).journal.write_text("")
        return code

    monkeypatch.setattr(module, "run", truncated)
    assert "pytest measured nothing: no test ran" in refusal(side)


def test_rejects_results_of_a_crashed_process(side: Side, process: Process) -> None:
    """A crashed process cannot report which code it ran."""
    process.modules, process.code = None, -11
    assert refusal(side) == (
        f"main (aaaaaaaaaa): pytest did not finish: SIGSEGV (its output is in {side.log})"
    )


# -- modules missing from the worktree ----------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "error", "name"),
    [
        ("pkg/_version.py", "ModuleNotFoundError: No module named 'pkg._version'", "pkg._version"),
        (
            "src/pkg/_version.py",
            "ImportError: cannot import name '_version' from 'pkg' (src/pkg/__init__.py)",
            "pkg._version",
        ),
        (
            "pkg/_core.cpython-311-x86_64-linux-gnu.so",
            "ImportError: cannot import name '_core' from partially initialized module 'pkg'",
            "pkg._core",
        ),
        ("sub/src/made/__init__.py", "ModuleNotFoundError: No module named 'made'", "made"),
        ("made_pb2.py", "ModuleNotFoundError: No module named 'made_pb2'", "made_pb2"),
    ],
)
def test_names_missing_module_that_git_ignores(
    side: Side, process: Process, file: str, error: str, name: str
) -> None:
    (side.root / file).parent.mkdir(parents=True, exist_ok=True)
    (side.root / file).touch()
    process.has_journal, process.code, process.output = False, 2, f"E   {error}\n"
    assert refusal(side) == (
        f"main (aaaaaaaaaa): module {name} is missing: {file} is in your working tree, but not in "
        "the revision; if a build creates it, pass the build command, for example "
        "--install 'pip install --no-deps .'"
    )


def test_does_not_blame_git_for_modules_that_do_not_differ(side: Side, process: Process) -> None:
    for folder in (side.root, side.tree):
        (folder / "a.py").touch()
    for name in ("a", "b.c", "."):
        error = f"ModuleNotFoundError: No module named '{name}'"
        process.has_journal, process.code, process.output = False, 2, f"E   {error}\n"
        assert refusal(side) == (
            f"main (aaaaaaaaaa): pytest measured nothing: the tests could not be collected: {error}"
            f" (its output is in {side.log})"
        )


# -- install ----------------------------------------------------------------------------------


def test_runs_install_in_tree(side: Side, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_DIR", "elsewhere")
    side.install('pwd; echo "$PIP_TARGET $PIP_UPGRADE [$GIT_DIR]" && echo "$PYTHONPATH"')
    where, pip, path = side.log.read_text().splitlines()[-3:]
    assert where == str(side.tree)
    assert pip == f"{side.site} 1 []"
    assert path.startswith(f"{side.site}{os.pathsep}")
    assert "\n$ pwd; echo" in side.log.read_text()
    assert "  # main (aaaaaaaaaa)\n" in side.log.read_text()


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("echo one; echo 'no  such' >&2; exit 3", "exit code 3: no  such"),
        ("false", "exit code 1"),
        (r"printf '\033[31mred\033[0m\n'; exit 3", "exit code 3: red"),
        ("kill -TERM $$", "SIGTERM"),
    ],
)
def test_reports_failed_install(side: Side, command: str, how: str) -> None:
    side.log.write_text("of another process\n")
    with pytest.raises(SideError) as caught:
        side.install(command)
    assert str(caught.value) == (
        f"main (aaaaaaaaaa): --install failed with {how} (its output is in {side.log})"
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_interrupted_install_leaves_no_process(side: Side, tmp_path: Path) -> None:
    """Background jobs of a shell ignore SIGINT."""
    pid = tmp_path / "pid"
    waits = f"until grep -q 'State:.S' /proc/{os.getpid()}/status; do :; done"
    shell = f"sleep 600 & echo $! > {shlex.quote(str(pid))}; {waits}; kill -INT {os.getpid()}; wait"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            side.install(shell)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + DEADLINE_S
    while runs(int(pid.read_text())):  # a killed process takes a moment to end
        assert time.monotonic() < deadline


# -- files of a process -----------------------------------------------------------------------


def test_files_round_trip_through_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SideFiles.start(tmp_path / "a", ["b", "a::ü"])
    for name, value in files.to_env_vars().items():
        monkeypatch.setenv(name, value)
    found = SideFiles.from_env_vars()
    assert found == files
    assert found.only() == ["a::ü", "b"]
    assert found.modules() is None
    found.note_modules()
    modules = files.modules()
    assert modules is not None
    assert modules["json"] == json.__file__
    assert modules[__name__] == __file__
    assert "sys" not in modules


def test_skips_modules_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in (("relative", "_ops.py"), ("none", None), ("number", 3)):
        fake = type(sys)(name)
        fake.__file__ = file  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setitem(sys.modules, "gone", None)
    files = SideFiles.start(tmp_path / "a", None)
    files.note_modules()
    modules = files.modules()
    assert modules is not None
    assert not {"relative", "none", "number", "gone"} & set(modules)


def test_runs_all_tests_by_default(tmp_path: Path) -> None:
    assert SideFiles.start(tmp_path / "a", None).only() is None
    assert SideFiles.start(tmp_path / "b", []).only() == []


def test_process_knows_its_parent(tmp_path: Path) -> None:
    files = SideFiles.start(tmp_path / "a", None)
    assert files.is_started_by(os.getpid())
    assert not files.is_started_by(os.getppid())
    assert not SideFiles(tmp_path / "b").is_started_by(os.getpid())


# -- the plugin of a process ------------------------------------------------------------------

Pytest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pytest:
    """Run pytest with the plugin in a folder with two tests."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_a.py").write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('x', ['a', 'b b'])\ndef test(x):\n    pass\n"
    )
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run_pytest(files: SideFiles) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-v", "-p", "pytest_int8bench.suite.side"]
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **files.to_env_vars()},
            capture_output=True,
            text=True,
            check=False,
        )

    return run_pytest


def test_process_runs_only_the_selected_tests(run_pytest: Pytest, tmp_path: Path) -> None:
    files = SideFiles.start(tmp_path / "a", ["test_a.py::test[b b]", "test_a.py::gone"])
    done = run_pytest(files)
    assert done.returncode == 0, done.stdout
    assert "test_a.py::test[b b] PASSED" in done.stdout
    assert "1 passed, 1 deselected" in done.stdout
    modules = files.modules()
    assert modules is not None
    assert modules["test_a"] == str(tmp_path / "toy" / "test_a.py")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose child a process is")
def test_orphaned_process_does_not_start(run_pytest: Pytest, tmp_path: Path) -> None:
    files = SideFiles.start(tmp_path / "a", None)
    (files.folder / "parent").write_text("1")
    done = run_pytest(files)
    assert done.returncode == 4
    assert "ERROR: the int8bench ab that started this process has ended" in done.stderr
