"""Builds miras_kernels._C, the C++ kernels, and miras_kernels/_cuda.so, the CUDA C++ kernels, with nvcc (csrc/cuda/build.py). Building
does not need torch. Everything else is in pyproject.toml.

Without a C++ compiler or without nvcc the package installs without these kernels and writes the reason into
miras_kernels/_build_info.py; the errors of `backend="cpp"` and `backend="cuda"` quote it.

    MIRAS_REQUIRE_CPP=1    a failed build of the C++ kernels is an error (developers, CI, wheels)
    MIRAS_SKIP_CPP=1       do not build the C++ kernels
    MIRAS_SANITIZE=1       build them for `make sanitize` (AddressSanitizer, UndefinedBehaviorSanitizer), in build/sanitize alone
    MIRAS_PROFILE=1        build them with counters for the stages of a chunk, and with symbols (`python -m bench.cpu --stages`)
    MIRAS_CUDA=1           build the CUDA kernels even for a torch without CUDA; a failed build is an error
    MIRAS_CUDA=0           do not build the CUDA kernels
    CXX, CXXFLAGS          the compiler (gcc >= 11, or clang), and flags for it
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
REQUIRE_CPP = os.environ.get("MIRAS_REQUIRE_CPP", "0") not in ("", "0")
SKIP_CPP = os.environ.get("MIRAS_SKIP_CPP", "0") not in ("", "0")
SANITIZE = os.environ.get("MIRAS_SANITIZE", "0") not in ("", "0")
PROFILE = os.environ.get("MIRAS_PROFILE", "0") not in ("", "0")
CUDA = os.environ.get("MIRAS_CUDA", "")
BUILD_INFO = "_build_info.py"

SOURCES = [f"csrc/{name}{path.name}" for name in ("", "cpu/") for path in sorted((ROOT / "csrc" / name).glob("*.cpp"))]
# No -march: the kernels are compiled for several instruction sets and choose at run time. -O2 code is as fast as -O3 here and compiles in
# half the time. -MMD writes each object's dependencies beside it, see outdated().
COMPILE, LINK = ["-O2", "-g0", "-std=c++20", "-fvisibility=hidden", "-MMD"], []
if PROFILE:
    COMPILE = [*COMPILE, "-g1", "-DMIRAS_PROFILE"]
if SANITIZE:  # null: AddressSanitizer reports reads of null pointers anyway; vptr would need the types of other libraries
    INSTRUMENT = ["-fsanitize=address,undefined", "-fno-sanitize=null,vptr", "-fno-sanitize-recover=all"]
    CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]  # checks as calls compile in three quarters of the time
    COMPILE, LINK = ["-O1", "-g1", *COMPILE[2:], *INSTRUMENT, *CALLS], INSTRUMENT


def version() -> str:
    text = (ROOT / "python" / "miras_kernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


def finish(package: Path, missing: str | None) -> None:
    """Build the CUDA kernels, and write _build_info.py: ``missing`` is the reason why the C++ kernels are not there, or None."""
    package.mkdir(parents=True, exist_ok=True)
    text = f"""\"\"\"Written by setup.py.\"\"\"

# The reason why the C++ kernels are not there, or None.
CPP_MISSING = {missing!r}
# The same for the CUDA kernels.
CUDA_MISSING = {build_cuda(package / "_cuda.so")!r}
"""
    (package / BUILD_INFO).write_text(text, encoding="utf-8")


def build_cuda(library: Path) -> str | None:
    """Build the CUDA kernels if they are wanted; return the reason why they are not there, or None."""
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc" / "cuda" / "build.py")
    nvcc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nvcc)
    missing = why_not_cuda(nvcc)
    if missing is None:
        try:
            nvcc.build(library)
            return None
        except RuntimeError as error:
            missing = f"compiling them failed when the package was installed: {error}"
    library.unlink(missing_ok=True)
    if CUDA == "1":
        sys.exit(f"MIRAS_CUDA=1 is set, but {missing}")
    return missing


def why_not_cuda(nvcc) -> str | None:
    """The reason why the CUDA kernels cannot be built here, or are not wanted."""
    if CUDA == "0":
        return "MIRAS_CUDA=0 was set when the package was installed"
    if nvcc.nvcc() is None:
        return "there was no nvcc, neither in CUDA_HOME nor on the PATH, when the package was installed"
    if CUDA != "1":
        try:
            import torch
        except ImportError:
            return "there was no torch when the package was installed (MIRAS_CUDA=1 builds them all the same)"
        if torch.version.cuda is None:
            return "torch had no CUDA when the package was installed (MIRAS_CUDA=1 builds them all the same)"
    return None


def why_not() -> str | None:
    """The reason, if it is known before trying, why the C++ kernels cannot be built here, or None."""
    if SKIP_CPP:
        return "MIRAS_SKIP_CPP was set when the package was installed"
    if importlib.util.find_spec("pybind11") is None:
        return "there was no pybind11, which `pip install --no-build-isolation` needs, when the package was installed"
    if compiler() is None:
        asked = f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "c++, g++ or clang++"
        return f"there was no C++ compiler ({asked} not found) when the package was installed"
    return None


def compiler() -> str | None:
    """The command of the C++ compiler: that of CXX, else the one that Python was built with, else a common one; None without any."""
    commands = [os.environ["CXX"]] if "CXX" in os.environ else [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
    return next((command for command in commands if command.split() and shutil.which(command.split()[0])), None)


def outdated(target: str, source: str) -> bool:
    """Whether an object is older than one of its dependencies."""
    made_of = Path(target).with_suffix(".d")
    try:
        made = os.stat(target).st_mtime
        files = shlex.split(made_of.read_text(encoding="utf-8").replace("\\\n", " "))[1:]
        return any(os.stat(file).st_mtime > made for file in files)
    except OSError:
        return True


class BuildPython(build_py):
    """Also writes _build_info.py, as far as it is known."""

    def run(self):
        super().run()
        editable = getattr(self, "editable_mode", False)
        finish(ROOT / "python" / "miras_kernels" if editable else Path(self.build_lib) / "miras_kernels", MISSING)


MISSING = why_not()
if MISSING and REQUIRE_CPP:
    sys.exit(f"MIRAS_REQUIRE_CPP is set, but {MISSING}")

extensions, commands = [], {"build_py": BuildPython}
if MISSING:
    print(f"miras-kernels: installing without the C++ kernels: {MISSING}", file=sys.stderr)
else:
    import pybind11
    from pybind11.setup_helpers import ParallelCompile

    os.environ["CXX"] = compiler()
    ParallelCompile(needs_recompile=outdated).install()

    class BuildKernels(build_ext):
        """After a failed build the package has no kernels and the reason in _build_info.py, unless they are required."""

        def finalize_options(self):
            super().finalize_options()
            # Objects of equal flags are kept in one folder, so that only changed files are compiled again, under pip too.
            alike = [os.environ["CXX"], os.environ.get("CXXFLAGS"), *COMPILE, self.plat_name, sys.implementation.cache_tag]
            self.build_temp = str(ROOT / "build" / f"objects-{zlib.crc32(repr(alike).encode()):08x}")
            if SANITIZE:
                self.build_lib, self.inplace = str(ROOT / "build" / "sanitize"), False

        def run(self):
            with tempfile.TemporaryFile() as said:
                terminal = os.dup(2)
                os.dup2(said.fileno(), 2)
                try:
                    super().run()
                    error = None
                except (Exception, SystemExit) as failed:
                    error = failed
                finally:
                    os.dup2(terminal, 2)
                said.seek(0)
                lines = said.read().decode(errors="replace").splitlines()
            print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
            if error is None:
                finish(self.destination(), None)
                return
            if REQUIRE_CPP:
                raise error
            package = self.destination()
            for stale in package.glob("_C.*.so"):
                stale.unlink()
            first = next((line.strip() for line in lines if "error" in line.lower()), error)
            missing = f"compiling it failed when the package was installed: {first}"
            finish(package, missing)
            print(f"miras-kernels: installing without the C++ kernels: {missing}", file=sys.stderr)

        def destination(self) -> Path:
            """The folder of the package that the kernels are built for."""
            in_source = self.inplace or getattr(self, "editable_mode", False)
            return (ROOT / "python" if in_source else Path(self.build_lib)) / "miras_kernels"

        def copy_extensions_to_source(self):
            if all(os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(e.name))) for e in self.extensions):
                super().copy_extensions_to_source()

    commands["build_ext"] = BuildKernels
    extensions.append(
        Extension(
            "miras_kernels._C",
            SOURCES,
            depends=["setup.py", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h")))],
            include_dirs=["csrc", pybind11.get_include()],
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
            language="c++",
        )
    )

setup(
    version=version(),
    package_dir={"miras_kernels": "python/miras_kernels", "miras_kernels.kernels": "kernels"},
    packages=[*find_packages("python"), "miras_kernels.kernels", *(f"miras_kernels.kernels.{name}" for name in find_packages("kernels"))],
    package_data={"miras_kernels": ["py.typed"], "miras_kernels.kernels": ["*.md"], "miras_kernels.kernels.offline": ["*.json"]},
    ext_modules=extensions,
    cmdclass=commands,
    zip_safe=False,
)
