"""``--base REF``: this source tree against another commit of it; both pass the parity gate, then take turns in one run.

Two processes that run the same code differ by a percent or more for as long as they live, because their memory is placed differently. So
each side is launched several times, and every launch has a third process, of this tree again. A difference is reported only where the other
commit was slower than both of them in every launch, or faster than both: for equally fast code, this happens in one launch with a
probability of 1/3 for either direction, whatever the noise.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..common.implementations import DIRECTIONS
from ..common.processes import ROOT, Lost
from ..common.timing import clock_for, interleave, ratio, spread
from .cases import Settings
from .measuring import environment
from .studies import Server
from .watch import Watch

LAUNCHES = 7  # false alarms: 2 / 3^7, less than once in a thousand
FEWEST = 5  # with fewer launches no difference is reported: 2 / 3^5 is less than once in a hundred
RESOLUTION = 0.01  # a smaller difference is not reported: the placement of code and data makes as much
SIDES = ("base", "this", "again")  # the processes of a launch: the other commit, this tree, and this tree again

NO_DIFFERENCE = "no difference"


class Unusable(Exception):
    """The other commit cannot be checked out or built."""


@contextlib.contextmanager
def prepared(ref: str, backend: str) -> Iterator[tuple[dict, dict]]:
    """The other commit in a temporary git worktree, built: what the document has of it, and options of :func:`study_base`."""
    commit = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", error=f"--base: expected a commit, got {ref!r}")
    with tempfile.TemporaryDirectory(prefix="miras-base-") as folder:
        root = Path(folder) / "tree"
        _git("worktree", "add", "--detach", "--quiet", str(root), commit, error=f"--base: git cannot check out {ref!r}")
        try:
            if backend == "cpp":
                build(root, commit)
            yield {"ref": ref, "commit": commit}, {"other": str(root)}
        finally:
            _git("worktree", "remove", "--force", str(root), error="--base: the temporary worktree cannot be removed")


def build(root: Path, commit: str) -> None:
    """Build the C++ kernels of the other tree, or copy this tree's extension where it was built from the same sources."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    built = list((ROOT / "python" / "miras_kernels").glob("_C.*.so"))
    changed = _git("diff", "--name-only", commit, "--", "csrc", "setup.py", error="--base: git diff failed")
    changed += _git("ls-files", "--others", "--exclude-standard", "--", "csrc", error="--base: git ls-files failed")
    if len(built) == 1 and not changed and all(path.stat().st_mtime <= built[0].stat().st_mtime for path in sources):
        print("its C++ sources are those of this tree: no need to build them", file=sys.stderr)
        for path in (built[0], built[0].with_name("_build_info.py")):
            shutil.copy2(path, root / path.relative_to(ROOT))
        return
    print("building its C++ kernels, about a minute", file=sys.stderr, flush=True)
    env = dict(os.environ, MIRAS_REQUIRE_CPP="1", MIRAS_CUDA="0")
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])  # ninja, for trees that need it
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, check=False, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise Unusable(f"--base: building {commit[:12]} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-20:]))


def _git(*arguments: str, error: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise Unusable(f"{error} {done.stderr.strip()}".strip())
    return done.stdout.strip()


def study_base(shape: str, threads: int, settings: Settings, other: str, launches: int) -> Iterator[dict]:
    """Calls of the public function of both trees."""
    found: dict[str, list[dict]] = {direction: [] for direction in DIRECTIONS}
    gates, notes, failure = {}, [], {}
    for launch in range(launches):
        try:
            with contextlib.ExitStack() as stack:
                servers = launched(stack, shape, threads, settings, other)
                if launch == 0:
                    gates = {side: servers[side].get("parity") for side in SIDES[:2]}
                red = [f"{side}: parity is red, nothing is timed ({gate['worst']})" for side, gate in gates.items() if not gate["ok"]]
                if red:
                    notes += red
                    break
                for direction in DIRECTIONS:
                    found[direction].append(_one_launch(servers, direction, threads, settings, launches))
        except Lost as error:  # the other commit may have another interface
            failure = {"error": f"launch {launch + 1} of {launches}: {error}; see its stderr"}
            notes.append(failure["error"])
            break
    for direction, seen in found.items():
        head = {"study": "base", "case": shape, "direction": direction, "threads": threads, "clock": clock_for(threads)[0]}
        yield {**head, "parity": gates, "notes": notes, **failure, **(summarise(seen) if seen else {})}


def launched(stack: contextlib.ExitStack, shape: str, threads: int, settings: Settings, other: str) -> dict[str, Server]:
    """A process for each of :data:`SIDES`, ended with the stack."""
    servers = {}
    for side in SIDES:
        tree = Path(other) if side == "base" else ROOT
        servers[side] = stack.enter_context(Server(shape, threads, settings, environment(threads, root=tree), root=str(tree)))
    return servers


def _one_launch(servers: dict[str, Server], direction: str, threads: int, settings: Settings, launches: int) -> dict:
    """One launch: medians of its rounds."""
    samplers = {side: server.sampler(direction) for side, server in servers.items()}
    with Watch(threads, [server.process.pid for server in servers.values()]) as watch:
        times = interleave(samplers, settings.seconds / launches, settings.min_rounds)
    return {
        "ms": {side: 1e3 * spread(seconds)["median"] for side, seconds in times.items()},
        "ratios": {side: ratio(times[side], times["this"])["median"] for side in ("base", "again")},
        "watch": watch.report(),
    }


def summarise(launches: Sequence[dict]) -> dict:
    """Medians over launches with their extremes, and the verdict."""
    ratios = {side: [launch["ratios"][side] for launch in launches] for side in ("base", "again")}
    flags = sorted({flag for launch in launches for flag in launch["watch"]["flags"]})
    loads = [launch["watch"]["other_load_cores"] for launch in launches if launch["watch"]["other_load_cores"] is not None]
    return {
        "launches": len(launches),
        "ms": {side: statistics.median(launch["ms"][side] for launch in launches) for side in SIDES},
        "ratios": {side: {"median": statistics.median(x), "low": min(x), "high": max(x)} for side, x in ratios.items()},
        "verdict": verdict(ratios["base"], ratios["again"]),
        "same_code": math.expm1(max(abs(math.log(x)) for x in ratios["again"])),
        "watch": {"other_load_cores": max(loads, default=None), "thread_speedup": None, "flags": flags},
    }


def verdict(base: Sequence[float], again: Sequence[float]) -> str:
    """What the launches show: this tree is "faster", "slower", or there is "no difference". ``base``: times of the other commit over those
    of this tree, one per launch; ``again``: the same of this tree's second process."""
    launches = list(zip(base, again, strict=True))
    if len(launches) < FEWEST or abs(math.log(statistics.median(base))) < math.log1p(RESOLUTION):
        return NO_DIFFERENCE
    if all(other > max(1.0, twin) for other, twin in launches):
        return "faster"
    return "slower" if all(other < min(1.0, twin) for other, twin in launches) else NO_DIFFERENCE


STUDIES = {"base": study_base}
