"""``int8bench ab`` with real repositories and real processes, of a toy that takes no time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import pytest
from filelock import FileLock

from pytest_int8bench.cli.main import main
from pytest_int8bench.gate.ab import experiment
from pytest_int8bench.gate.ab import plan as ab_plan
from pytest_int8bench.gate.ab.design import Design
from toys.processes import runs
from toys.repositories import git, isolate, isolate_pytest, make_temporary_folder

DEADLINE_S = 60
MAIN = "import sys; from pytest_int8bench.cli.main import main; sys.exit(main())"
FAST = ("--screening-blocks=2", "--verdict-blocks=4")

# Times come from a file in the revision, plus noise that depends on the number of earlier
# processes, so that neither a clock nor torch is needed.
CONFTEST = """
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.records import Result

COUNTER = Path(os.environ["TOY_COUNTER"])


def pytest_configure(config):
    config.number = len(COUNTER.read_text())
    COUNTER.write_text(COUNTER.read_text() + "x")
    COUNTER.with_name("pid").write_text(str(os.getpid()))
    if str(config.number) == os.environ.get("TOY_HANGS_AT"):
        COUNTER.with_name("hangs").touch()
        signal.pause()


@pytest.fixture(scope="session")
def journal(request):
    config = request.config
    git = ["git", "-C", str(config.rootpath), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    environment = {"cpu": "toy", "cpu_threads": 1, "commit": commit}
    path = Path(config.getoption("int8_journal"))
    path.unlink()  # the plugin's own, which it leaves alone from here on
    return Journal(path, environment)


@pytest.fixture
def int8_throughput(request, journal):
    def measure(seconds):
        noise = random.Random(f"{request.config.number}").gauss(0, 0.002)
        journal.append(
            Result(
                nodeid=request.node.nodeid,
                workload="toy",
                run_name=request.node.name,
                params={},
                batch_time_s=seconds * (1 + noise),
            )
        )

    return measure
"""
TEST = """
import pytest
from toy import SECONDS


@pytest.mark.parametrize("name", ["steady", "Größe"])
def test_speed(name, int8_throughput):
    int8_throughput(SECONDS[name])
"""
INI = "[pytest]\naddopts = -p int8bench -p benchmark\n"


def toy(steady: float = 0.01, other: float = 0.02) -> str:
    return f'SECONDS = {{"steady": {steady}, "Größe": {other}}}\n'


def commit(root: Path, **files: str) -> str:
    """Commit files, with ``__`` for a slash in their paths, and return the short hash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path = path.with_name(path.name.replace("_py", ".py").replace("_ini", ".ini"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")
    return git(root, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with tags ``v1``, ``same`` and ``slow``; HEAD is at ``slow``."""
    root = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, root)
        git(root, "init", "-q", "-b", "main")
        (root / ".gitignore").write_text("__pycache__\n.pytest_cache\n.venv\n")
        files = {"conftest_py": CONFTEST, "pytest_ini": INI, "bench__test_a_py": TEST}
        commit(root, **files, toy_py=toy())
        git(root, "tag", "v1")
        commit(root)
        git(root, "tag", "same")
        commit(root, toy_py=toy(other=0.022))
        git(root, "tag", "slow")
    return root


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    isolate_pytest(monkeypatch)
    (tmp_path / "count").touch()
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path / "count"))
    return make_temporary_folder(tmp_path, monkeypatch)


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """The user's repository."""
    return shutil.copytree(template, tmp_path / "Maß der Größe")


def count(root: Path) -> int:
    """Return the number of processes that ran."""
    return len((root.parent / "count").read_text())


def state(root: Path) -> dict[str, Any]:
    """Return everything that must not change."""
    return {
        "status": git(root, "--no-optional-locks", "status", "--porcelain"),
        "files": {p.name: p.read_bytes() for p in root.iterdir() if p.is_file()},
        "index": (root / ".git" / "index").read_bytes(),
        "head": (root / ".git" / "HEAD").read_bytes(),
        "refs": git(root, "for-each-ref"),
        "worktrees": git(root, "worktree", "list"),
    }


Ab = Callable[..., subprocess.CompletedProcess[str]]


def start(folder: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", MAIN, "ab", *FAST, *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def ab(temporary: Path) -> Ab:
    """Run the command and check that it leaves nothing behind."""

    def ab(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = start(folder, *args, env={**os.environ, **env})
        out, err = process.communicate(timeout=DEADLINE_S)
        assert list(temporary.iterdir()) == []
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    return ab


@pytest.fixture
def ab_here(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Ab:
    """Like ``ab``, but in this process, which is faster; for commands that end in an error."""

    def ab(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, value in env.items():
                patch.setenv(name, value)
            code = main(["ab", *FAST, *args])
        out, err = capfd.readouterr()
        assert list(temporary.iterdir()) == []
        return subprocess.CompletedProcess(args, code, out, err)

    return ab


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one-line error, without earlier output."""
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].removeprefix("int8bench ab: ")


# -- verdicts ---------------------------------------------------------------------------------


def test_slower_revision_fails_in_all_reports(ab: Ab, root: Path, tmp_path: Path) -> None:
    (root / "untracked").touch()
    (root / "toy.py").write_text("work in progress")
    git(root, "add", "toy.py")
    before = state(root)
    outputs = {name: tmp_path / f"ab.{name}" for name in ("json", "markdown", "junit")}
    args = [f"--{name}={path}" for name, path in outputs.items()]
    summary = tmp_path / "summary"
    done = ab(root, *args, "v1", "slow", "--", "bench", GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == 1, done.stderr
    assert count(root) == 2 + 4 + 8

    assert "int8bench ab: uncommitted changes are not measured (toy.py)\n" in done.stderr
    assert "2 flagged" not in done.stderr
    assert "measuring 1 flagged run again: test_speed[Gr" in done.stderr
    assert done.stdout.endswith("\nint8bench ab: FAIL (1 PASS, 1 FAIL)\n")
    values = json.loads(outputs["json"].read_text())["int8bench_ab"]
    assert values["exit_code"] == 1
    assert [run["outcome"] for run in values["runs"]] == ["PASS", "FAIL"]
    assert values["runs"][1]["judged"]["estimate"]["slowdown"] == pytest.approx(0.1, abs=0.01)
    steady, slow = ElementTree.parse(outputs["junit"]).getroot().iter("testcase")
    assert ([*steady], [child.tag for child in slow]) == ([], ["failure"])
    assert outputs["markdown"].read_text().startswith("## int8bench ab: FAIL (1 PASS, 1 FAIL)\n")
    assert summary.read_text() == outputs["markdown"].read_text() + "\n"
    assert state(root) == before


# -- its own code -----------------------------------------------------------------------------


def append_path(folder: Path, entry: Path, place: str = "append(") -> str:
    """Make a folder for PYTHONPATH that puts an entry on ``sys.path``, as a .pth file does."""
    folder.mkdir()
    code = f"import sys\nsys.path.{place}{str(entry)!r})\n"
    (folder / "sitecustomize.py").write_text(code)
    return str(folder)


def test_worktree_shadows_editable_install(ab: Ab, root: Path, tmp_path: Path) -> None:
    git(root, "checkout", "-q", "-b", "src", "v1")
    (root / "toy.py").unlink()
    commit(root, src__toy_py=toy())
    git(root, "tag", "old")
    commit(root)
    editable = append_path(tmp_path / "customize", root / "src")
    done = ab(root, "old", "--", "bench", PYTHONPATH=editable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nint8bench ab: PASS (2 PASS)\n")


def test_runs_from_subfolder_and_git_hook(ab: Ab, root: Path) -> None:
    """Paths that point into the user's working tree are moved to the worktree."""
    (root / "bench" / "test_a.py").write_text("work in progress")
    before = state(root)
    args = ("v1", "same", "--", "test_a.py", f"{root}/bench/test_a.py")
    env = {"GIT_DIR": f"{root}/.git", "GIT_INDEX_FILE": f"{root}/.git/index"}
    done = ab(root / "bench", *args, PYTHONPATH=str(root), **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nint8bench ab: PASS (2 PASS)\n")
    assert state(root) == before


def test_rejects_code_of_the_main_checkout(ab: Ab, root: Path, tmp_path: Path) -> None:
    """The entry precedes all others, like one that a conftest.py inserts."""
    first = append_path(tmp_path / "customize", root, "insert(0, ")
    text = f"import sys\nsys.path.insert(0, {str(root)!r})\n{CONFTEST}"
    commit(root, conftest_py=text)
    assert refusal(ab(root, "HEAD", "HEAD", "--", "bench", PYTHONPATH=first)).startswith(
        f"HEAD ({git(root, 'rev-parse', 'HEAD')[:10]}): module toy was imported from "
        f"{root}/toy.py, not from this revision; "
    )


def test_rejects_installed_copy(ab_here: Ab, root: Path, tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "toy.py").write_text(toy())
    commit(root, conftest_py=f"import sys\nsys.path.insert(0, {str(packages)!r})\n{CONFTEST}")
    assert refusal(ab_here(root, "v1", "--", "bench")) == (
        f"HEAD ({git(root, 'rev-parse', 'HEAD')[:10]}): module toy was imported from "
        f"{packages}/toy.py, not from the worktree; if the package must be built or "
        "installed, pass the command, for example --install 'pip install --no-deps .'"
    )


def test_revision_passes_against_itself_with_install(ab: Ab, root: Path) -> None:
    """A virtual environment inside the repository does not count as project code."""
    packages = root / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "extra.py").touch()
    (root / "toy.py").unlink()
    commit(root, conftest_py=f"import extra\n{CONFTEST}", python__toy_py=toy())
    build = 'mkdir -p "$PIP_TARGET" && cp python/toy.py "$PIP_TARGET"'
    done = ab(root, "HEAD", "HEAD", "--install", build, "--", "bench", PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stderr
    assert "int8bench ab: installing HEAD (" in done.stderr
    assert "note: both revisions are the same commit: this only checks the machine\n" in done.stdout
    assert done.stdout.endswith("\nint8bench ab: PASS (2 PASS)\n")


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone"], "'gone' is not a revision of {root}"),
        (["HEAD", "gone"], "'gone' is not a revision of {root}"),
        (["v1", "--retries=-1"], "--retries must be 0 or more, got -1"),
        (
            ["v1", "--margin=6%"],
            (
                "margin must be at least 0 and less than max_slowdown, got 0.06 with a "
                "max_slowdown of 0.05"
            ),
        ),
        (["v1", "--screening-blocks=1"], "screening_blocks must be at least 2, got 1"),
        (
            ["v1", "--verdict-blocks=2", "--noise=3%"],
            (
                "2 verdict blocks detect a slowdown of 5% with a probability of only 34% "
                "(1 run, noise 3% between processes); 90% needs 9 blocks"
            ),
        ),
        (["v1", "--install", "echo why >&2; false"], None),
    ],
)
def test_rejects_bad_arguments_at_start(
    ab_here: Ab, root: Path, args: list[str], message: str | None
) -> None:
    [log] = [root / ".benchmarks" / "int8bench" / "ab"]
    done = ab_here(root, *args, "--", "bench")
    text = refusal(done)
    if message is None:
        assert text.startswith(f"v1 ({git(root, 'rev-parse', 'v1')[:10]}): --install failed with ")
        assert f"exit code 1: why (its output is in {log}/" in text
        assert len(done.stderr.splitlines()) == 2
    else:
        assert text == message.format(root=root)
        assert len(done.stderr.splitlines()) == 1
        assert not log.exists()
    assert count(root) == 0


def test_uncommitted_changes_are_refused_without_new_rev(ab_here: Ab, root: Path) -> None:
    (root / "toy.py").write_text("1")
    (root / "pytest.ini").write_text("[pytest]")
    assert refusal(ab_here(root, "v1", "--", "bench")) == (
        "uncommitted changes would not be measured (pytest.ini and 1 more): commit them, or name "
        "NEW_REV"
    )


def test_rejects_unwritable_reports(ab_here: Ab, root: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text('{"benchmarks": []}')
    done = ab_here(root, "v1", f"--json={saved}")
    assert refusal(done) == f"refusing to overwrite {saved}: it contains saved benchmarks"
    done = ab_here(root, "v1", "--json=out", "--junit=out")
    assert refusal(done) == "two reports would be written to out; name different files"
    (tmp_path / "file").touch()
    report = tmp_path / "file" / "out.md"
    unwritable = f"cannot write {report}: Not a directory"
    assert refusal(ab_here(root, "v1", f"--markdown={report}")) == unwritable
    assert refusal(ab_here(root, "v1", GITHUB_STEP_SUMMARY=str(report))) == unwritable
    assert count(root) == 0


def test_fails_outside_a_repository(ab_here: Ab, tmp_path: Path) -> None:
    assert refusal(ab_here(tmp_path, "v1")) == f"{tmp_path} is not in a git repository"


def test_fails_without_git(ab_here: Ab, root: Path) -> None:
    assert refusal(ab_here(root, "v1", PATH="")) == "git is not installed"


NOTHING = "pytest measured nothing"
LEAN = f"{NOTHING}: usage error: --int8-lean: cannot be combined with"
TOO_OLD = "pytest-int8bench is missing in this revision, turned off, or too old for int8bench ab"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "-k", "nothing"], f"{NOTHING}: no tests collected ("),
        (["gone"], f"{NOTHING}: usage error: file or directory not found: gone ("),
        (
            ["bench", "--benchmark-disable"],
            f"{LEAN} --benchmark-disable: nothing would be measured (",
        ),
        (
            ["bench", "-p", "xdist.plugin", "-n2"],
            f"{LEAN} pytest-xdist (-n): nothing would be measured (",
        ),
        (["bench", "-o", "addopts="], TOO_OLD),
    ],
)
def test_rejects_unmeasurable_args(ab_here: Ab, root: Path, args: list[str], message: str) -> None:
    if "xdist.plugin" in args:
        pytest.importorskip("xdist")
    done = ab_here(root, "v1", "--", *args)
    label = f"v1 ({git(root, 'rev-parse', 'v1')[:10]})"
    assert refusal(done).startswith(f"{label}: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_rejects_revision_with_older_plugin(ab_here: Ab, root: Path) -> None:
    (root / "pytest_int8bench").mkdir()
    (root / "pytest_int8bench" / "__init__.py").touch()
    old = commit(root)
    assert refusal(ab_here(root, old, "v1", "--", "bench")) == f"{old[:10]}: {TOO_OLD}"


def test_reports_test_that_cannot_be_imported(ab_here: Ab, root: Path) -> None:
    commit(root, bench__test_a_py="import größe\n")
    text = refusal(ab_here(root, "HEAD", "HEAD", "--", "bench", FORCE_COLOR="1"))
    assert (
        "pytest measured nothing: the tests could not be collected: "
        "ModuleNotFoundError: No module named 'größe' (its output is in "
    ) in text


def test_rejects_too_small_budget(ab_here: Ab, root: Path) -> None:
    done = ab_here(root, "v1", "--budget=2s", "--", "bench")
    assert refusal(done).startswith("--budget 2 s is too short: screening alone needs about ")
    assert "2 processes are saved in " in done.stderr
    assert count(root) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--budget=soon", "must be a time such as 90s, 30m or 2h, got 'soon'"),
        ("--budget=-1s", "must be a time such as 90s, 30m or 2h, got '-1s'"),
        (
            "--budget=" + "9" * 400 + "h",
            f"must be a time such as 90s, 30m or 2h, got '{'9' * 37}...{'9' * 37}h'",
        ),
        ("--verdict-blocks=x", "invalid int value: 'x'"),
    ],
)
def test_rejects_bad_option(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ab", "v1", option, "--", "bench"])
    assert caught.value.code == 2
    name = option.partition("=")[0]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"int8bench ab: {name}: {message}"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5 h", 5400), (" 2h ", 7200)]
)
def test_parses_budget(
    root: Path, monkeypatch: pytest.MonkeyPatch, text: str, seconds: float
) -> None:
    plans = []

    def run(plan: ab_plan.Plan, tell: object) -> NoReturn:
        plans.append(plan)
        raise KeyboardInterrupt

    monkeypatch.chdir(root / "bench")
    monkeypatch.setattr(experiment, "run", run)
    assert main(["ab", "v1", "same", f"--budget={text}", "--allow-missing", "--", "-k", "x"]) == 2
    [plan] = plans
    assert plan.budget_s == seconds
    assert (plan.base.name, plan.new.name) == ("v1", "same")
    assert (plan.root, plan.folder) == (root, root / "bench")
    assert plan.pytest_args == ("-k", "x")
    assert (plan.retries, plan.allow_missing, plan.install) == (3, True, None)
    assert plan.design == Design()


def test_rejects_a_second_gate_in_the_same_folder(ab_here: Ab, root: Path) -> None:
    folder = root / ".benchmarks" / "int8bench" / "ab"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        assert refusal(ab_here(root, "v1", "--", "bench")) == (
            f"another int8bench ab is running in {folder}; wait for it to finish: two at "
            "once would disturb each other's timings"
        )
    assert count(root) == 0


# -- interrupts -------------------------------------------------------------------------------


@contextlib.contextmanager
def hanging(root: Path, *args: str, at: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the command, wait until its process number ``at`` hangs, and yield both."""
    env = {**os.environ, "TOY_HANGS_AT": str(at)}
    process = start(root, *args, env=env, start_new_session=True)
    try:
        end = time.monotonic() + DEADLINE_S
        while not (root.parent / "hangs").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.005)
        yield process, int((root.parent / "pid").read_text())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "is_group", "code"),
    [(signal.SIGINT, True, 2), (signal.SIGINT, False, 2), (signal.SIGTERM, False, 143)],
)
def test_interrupt_leaves_nothing_behind(
    root: Path, temporary: Path, number: signal.Signals, is_group: bool, code: int
) -> None:
    before = state(root)
    with hanging(root, "v1", "same", "--", "bench", at=0) as (process, child):
        assert len(git(root, "worktree", "list").splitlines()) == 3
        (os.killpg if is_group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    assert ("int8bench ab: interrupted\n" in err) is (number == signal.SIGINT)
    assert not runs(child)
    assert list(temporary.iterdir()) == []
    assert state(root) == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_resumes_after_kill(ab: Ab, root: Path, temporary: Path, tmp_path: Path) -> None:
    before = state(root)
    args = ("v1", "same", "--", "bench")
    with hanging(root, *args, at=3) as (process, child):  # the second process of a block
        process.kill()
        process.wait()
        end = time.monotonic() + DEADLINE_S
        while runs(child):
            assert time.monotonic() < end, "the process goes on"
            time.sleep(0.005)
    assert len(list(temporary.iterdir())) == 1

    counter = tmp_path / "count"
    counter.write_text("x" * 2)
    resumed = ab(root, f"--json={tmp_path / 'ab.json'}", *args)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming with 3 processes from " in resumed.stderr
    assert count(root) == 6
    assert state(root) == before
    values = json.loads((tmp_path / "ab.json").read_text())["int8bench_ab"]
    assert values["processes"] == 7  # and half a block, which does not count
    assert [run["screened"]["estimate"]["blocks"] for run in values["runs"]] == [2, 2]
