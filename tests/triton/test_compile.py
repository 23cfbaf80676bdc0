"""The Triton kernels compiled for GPUs that are not here: registers, shared memory and tensor cores as recorded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

#: kinds of matrix instructions of a chip; small tiles use the older one
TENSOR = {"sm_80": ("mma",), "sm_90": ("wgmma", "mma"), "sm_100": ("tcgen05", "mma"), "gfx942": ("mfma",)}
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    """A fresh process that compiles, since this one may run Triton's interpreter."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "miras_kernels.kernels.offline.resources", *arguments]
    return subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=1800, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_the_most_common_calls():
    done = run("--check", "--quick")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kernels = set(re.findall(r"((?:linear|mlp)_\w+)\.\d", done.stdout))
    assert {
        "linear_chain_fwd",
        "linear_output",
        "linear_du_bwd",
        "linear_chain_bwd",
        "linear_dqk_bwd",
        "linear_chain_bwd_streamed",
    } <= kernels
    assert {"linear_step_predict", "linear_step_write", "mlp_step_predict", "mlp_step_write", "mlp_step_finish"} <= kernels
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert f" {target}:" in done.stdout


@pytest.mark.slow
def test_every_configuration():
    done = run("--check", "--cover")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_the_table():
    """resources.json has every kernel and configuration for every chip, within the limits."""
    from miras_kernels.kernels.common import configs
    from miras_kernels.kernels.offline import resources

    table = json.loads((KERNELS / "offline" / "resources.json").read_text())
    assert {"3.6.0"} < set(table)
    for version, rows in table.items():
        found = {tuple(job.rsplit(":", 3)[i] for i in (0, 2, 3)) for job in rows}
        for target in resources.LIMITS:
            for kernel, known in configs.KERNELS.items():
                made = {config for chip, launch, config in found if chip == target and launch.split(".")[0] == kernel}
                shipped = {str(config) for config in known if configs.denial(target, kernel, config) is None}
                assert made == shipped, (version, target, kernel)
        for job, (registers, spills, shared, tensor) in rows.items():
            target, specimen, launch, label = job.split(":")
            kernel, place = launch.split(".")
            config = next(x for x in configs.KERNELS[kernel] if str(x) == label)
            assert shared <= resources.LIMITS[target], job
            assert spills <= resources.spills_allowed(resources.Job(specimen, kernel, int(place), config, target)), job
            assert registers <= 255 or not target.startswith("sm_"), job
            if "float32" not in specimen and kernel not in resources.NO_PRODUCTS:
                assert tensor in TENSOR[target], job


@pytest.mark.slow
def test_a_spill_is_reported():
    """A configuration that needs more registers than there are is a problem."""
    code = (
        "from miras_kernels.kernels.common import configs\n"
        "from miras_kernels.kernels.offline import resources\n"
        "job = resources.Job('D128-C64-huber_coordinate-bfloat16', 'linear_chain_bwd', 0, configs.Config(0, 0, 4, 2), 'sm_90')\n"
        "configs.RULES['linear_chain_bwd'] = ((job.config, lambda key: True),)\n"
        "print(resources.problems(job, resources.compile_job(job)))\n"
    )
    done = run(code=code)
    assert done.returncode == 0, done.stderr
    assert re.search(r"spills \d+ bytes", done.stdout), done.stdout
