"""Every way to install: contents of the source distribution, compilation of the kernels, the reason reported where they are missing."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from miras_kernels.backends import cpp

ROOT = Path(__file__).resolve().parents[2]
#: the folders that a build needs, and files that an earlier build may have left there
FOLDERS, LEFT = ("csrc", "kernels", "python"), ("python/miras_kernels/_build_info.py", "python/miras_kernels/_C.so", "csrc/cpu/x.pyc")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")

# Logs its arguments and writes what a compiler would: an object and its dependency file, or a library.
COMPILER = """#!{python}
import pathlib, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*words, file=log)
target = pathlib.Path(words[words.index("-o") + 1])
target.write_text("")
if "-c" in words:
    target.with_suffix(".d").write_text(f"{{target}}: {{words[words.index('-c') + 1]}} \\\\\\n csrc/params.h\\n")
"""
FAILS = "#!/bin/sh\necho 'csrc/bindings.cpp:1:1: error: planted' >&2\nexit 1\n"


def tracked() -> set[str]:
    """The files of the folders that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository, so nothing to compare with")
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *FOLDERS]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {name for name in listed if (ROOT / name).exists()}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the tracked files, with the products of an earlier build."""
    for name in [*tracked(), *FILES]:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "tree" / name)
    for name in LEFT:
        (tmp_path / "tree" / name).write_text("")
    return tmp_path / "tree"


def run(tree: Path, *words: str, ok: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with these arguments in the tree, without the MIRAS_* and compiler settings of the test run."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MIRAS_") and k not in ("CXX", "CXXFLAGS")}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=env | {"MIRAS_CUDA": "0"} | environment, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def sdist(tree: Path) -> Path:
    run(tree, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", MIRAS_SKIP_CPP="1")
    [archive] = (tree / "dist").iterdir()
    return archive


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def missing(package: Path) -> str | None:
    return runpy.run_path(str(package / "_build_info.py"))["CPP_MISSING"]


def test_the_source_distribution_is_complete(tree):
    with tarfile.open(sdist(tree)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
        [information] = [archive.extractfile(m).read().decode() for m in archive.getmembers() if re.fullmatch(r"[^/]*/PKG-INFO", m.name)]
    found = {name for name in names if name.startswith(FOLDERS) and ".egg-info/" not in name}
    assert found == tracked()
    assert names >= set(FILES)
    for line in (
        "License-Expression: Apache-2.0", "License-File: LICENSE", "Requires-Dist: torch>=2.11", "Requires-Python: >=3.10",
        "Project-URL: Homepage, https://github.com/miras-kernels/miras-kernels",
    ):  # fmt: skip
        assert line in information.splitlines()


def test_compiler_flags_and_recompilation(tree, tmp_path):
    log = tmp_path / "log"
    compiler = script(tmp_path / "compiler", COMPILER.format(python=sys.executable, log=str(log)))

    def compiled() -> list[str]:
        log.write_text("")
        run(tree, "setup.py", "-q", "build_ext", "--inplace", CXX=compiler, MIRAS_REQUIRE_CPP="1")
        lines = log.read_text().splitlines()
        assert len(lines) == 0 or "-shared" in lines[-1] or "-bundle" in lines[-1]
        for line in lines:
            words = line.split()
            assert not {"-fopenmp", "-s"} & set(words) and not re.search(r"-march|-mcpu|torch/|-ltorch", line)
            assert "-c" not in words or {"-std=c++20", "-O2"} < set(words)
        return sorted(re.search(r"-c (\S+)", line)[1] for line in lines if " -c " in line)

    def touch(name: str) -> None:
        later = max(path.stat().st_mtime for path in tree.rglob("*")) + 10
        os.utime(tree / name, (later, later))

    every = sorted(name for name in tracked() if re.fullmatch(r"csrc/(cpu/)?[^/]*\.cpp", name))
    assert compiled() == every
    assert compiled() == []
    touch("csrc/cpu/level_avx2.cpp")
    assert compiled() == ["csrc/cpu/level_avx2.cpp"]


def test_a_changed_header_recompiles_its_includers(tree, tmp_path):
    log = tmp_path / "log"
    compiler = script(tmp_path / "compiler", COMPILER.format(python=sys.executable, log=str(log)))
    build = lambda: run(tree, "setup.py", "-q", "build_ext", "--inplace", CXX=compiler)
    build()
    lines = log.read_text().count(" -c ")
    later = max(path.stat().st_mtime for path in tree.rglob("*")) + 10
    for name, count in (("csrc/tensor.h", 0), ("csrc/params.h", lines)):  # by the dependency files, all objects include the second only
        log.write_text("")
        os.utime(tree / name, (later, later))
        build()
        assert log.read_text().count(" -c ") == count


def test_the_reason_is_reported_without_a_compiler(tree, tmp_path):
    for environment, reason in (
        ({"MIRAS_SKIP_CPP": "1"}, "MIRAS_SKIP_CPP was set"),
        ({"CXX": "/nowhere/c++"}, "there was no C++ compiler (CXX=/nowhere/c++ not found)"),
        ({"PATH": "/nowhere"}, "there was no C++ compiler (c++, g++ or clang++ not found)"),
    ):
        package = tmp_path / "lib" / "miras_kernels"
        run(tree, "setup.py", "-q", "build", "--build-lib", str(package.parent), **environment)
        assert missing(package).startswith(reason) and missing(package).endswith("when the package was installed")
        assert not list(package.glob("_C*.so"))
        assert reason in run(tree, "setup.py", "-q", "build_py", ok=False, MIRAS_REQUIRE_CPP="1", **environment).stderr


def test_compiler_errors_are_reported(tree, tmp_path):
    compiler = script(tmp_path / "compiler", FAILS)
    run(tree, "setup.py", "-q", "build", "--build-lib", "lib", CXX=compiler)
    wanted = "compiling it failed when the package was installed: csrc/bindings.cpp:1:1: error: planted"
    assert missing(tree / "lib" / "miras_kernels") == wanted
    assert "error: planted" in run(tree, "setup.py", "-q", "build_ext", ok=False, CXX=compiler, MIRAS_REQUIRE_CPP="1").stderr


def test_the_backend_reports_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "miras_kernels._C", None)
    monkeypatch.setitem(sys.modules, "miras_kernels._build_info", type(sys)("_build_info"))
    monkeypatch.setattr(sys.modules["miras_kernels._build_info"], "CPP_MISSING", "there was no C++ compiler", raising=False)
    assert cpp._load() == (None, "the extension is not built: there was no C++ compiler")


def test_a_torch_without_the_dlpack_exchange_api():
    program = (
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__\n"
        "from miras_kernels import dispatch; print(dispatch.unavailable('cpp'))"
    )  # fmt: skip
    wanted = f"it needs torch >= 2.11, and torch {torch.__version__} has no Tensor.__dlpack_c_exchange_api__"
    assert run(ROOT, "-c", program).stdout.strip() == f"the extension cannot be loaded: {wanted}"


def test_pre_commit_runs_the_versions_of_the_makefile():
    pinned = set(re.findall(r"^\w+ +\?= ((?:ruff|clang-format)==\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(pinned) == 2
    assert set(re.findall(r"(?:ruff|clang-format)==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())) == pinned


# ------------------------------------------------------------------------------------------------------- slow: by pip


def pip(tree: Path, *words: str, **options) -> subprocess.CompletedProcess:
    return run(tree, "-m", "pip", "--disable-pip-version-check", "--no-input", *words, **options)


def install(what: Path | str, where: Path, **options) -> Path:
    """Install into a new environment that takes only torch from this one; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(where)], check=True)
    site = next(where.glob("lib/python*/site-packages"))
    pip(ROOT, "install", "--quiet", "--no-deps", "--target", str(site), str(what), **options)
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return where / "bin" / "python"


def works(wheel: Path, where: Path) -> bool:
    python = install(wheel, where)
    done = subprocess.run([python, "-I", str(ROOT / "tests" / "installed.py")], capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.endswith("right\n")


@pytest.fixture
def quick(tmp_path) -> str:
    """The C++ compiler without optimisation."""
    return script(tmp_path / "quick", '#!/bin/sh\nexec c++ "$@" -O0\n')


@pytest.mark.slow
def test_the_source_distribution_installs_and_its_objects_pass_the_self_check(tree, tmp_path, quick):
    """Built in pip's isolated environment, which has no torch; the objects are also tested without Python."""
    with tarfile.open(sdist(tree)) as archive:
        archive.extractall(tmp_path / "unpacked")
    [source] = (tmp_path / "unpacked").iterdir()
    pip(source, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), ".", CXX=quick, MIRAS_REQUIRE_CPP="1")
    [wheel] = tmp_path.glob("*.whl")
    assert works(wheel, tmp_path / "env")
    objects = list(source.glob("build/objects-*/csrc/cpu/*.o"))
    command = [quick, "-std=c++20", "-Icsrc", str(ROOT / "tests" / "cpp" / "selfcheck.cpp"), *map(str, objects), "-o", "selfcheck"]
    subprocess.run(command, check=True, cwd=source)
    done = subprocess.run(["./selfcheck"], capture_output=True, text=True, cwd=source)
    assert done.returncode == 0 and done.stdout.endswith("right\n"), done.stdout


@pytest.mark.slow
def test_from_a_git_repository(tree, tmp_path, quick):
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for name in LEFT:
        (tree / name).unlink()
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *who, *words], cwd=tree, check=True)
    pip(tmp_path, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), f"git+file://{tree}", CXX=quick, MIRAS_REQUIRE_CPP="1")
    [wheel] = tmp_path.glob("*.whl")
    assert works(wheel, tmp_path / "env")


@pytest.mark.slow
def test_pip_without_a_compiler(tree, tmp_path):
    python = install(tree, tmp_path / "env", CXX="/nowhere/c++")
    program = "import miras_kernels as mk; print(mk.__file__, mk.dispatch.unavailable('cpp'))"
    done = subprocess.run([python, "-I", "-c", program], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith(str(tmp_path)) and "there was no C++ compiler (CXX=/nowhere/c++ not found)" in done.stdout
    error = pip(tree, "install", "--no-deps", "--target", str(tmp_path / "other"), ".", ok=False, CXX="/nowhere/c++", MIRAS_REQUIRE_CPP="1")
    assert "MIRAS_REQUIRE_CPP is set, but there was no C++ compiler" in error.stdout + error.stderr
