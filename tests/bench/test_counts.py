"""bench.gpu.counts: the model's arithmetic, its table, and the kernels' counts against the table."""

from __future__ import annotations

import copy
import re

import pytest
import triton

from bench.common.implementations import FORWARD
from bench.gpu import counts, model, plan, report
from bench.gpu.chips import CHIPS
from quick import slow

CHIP = CHIPS["H100"]
BETWEEN = (256, 512)


def row(**changes) -> model.Row:
    """A launch with 8 programs and 1,000 of everything at 512 tokens, half of it at 256."""
    linear = dict.fromkeys(model.FIELDS, (500, 1000)) | {"programs": (4, 8), "latency": (700, 700)}
    return model.Row("kernel", 1, 128, 64, 1024, linear | changes)


def test_rates_are_those_of_the_busiest_multiprocessor():
    """8 programs a head for 512 tokens: 1,056 for 66 heads and 1,024 tokens, which is 8 on each of 132 multiprocessors."""
    times = model.time(row(), CHIP, BETWEEN, batch=1, tokens=1024, heads=66)
    each = 66 * 2000 / 1056 * 8 / CHIP.clock
    assert times["issue"] == pytest.approx(each / 4) and times["tensor"] == pytest.approx(each / 4096)
    assert times["shared"] == pytest.approx(each) and times["special"] == pytest.approx(each * 2)
    assert times["DRAM"] == pytest.approx(66 * 2000 / CHIP.dram)
    assert times["L2"] == pytest.approx(66 * 2000 * 32 / (CHIP.l2 * 132 * CHIP.clock))
    one_more = model.time(row(), CHIP, BETWEEN, batch=1, tokens=1024, heads=67)
    assert one_more["issue"] == pytest.approx(2000 / 16 * 9 / CHIP.clock / 4)


def test_programs_that_do_not_fit_together_wait():
    """At 255 registers two programs of 128 threads fit, at 64 eight."""
    wide = model.Row("kernel", 1, 128, 255, 1024, row().counts)
    assert (model.resident(wide, CHIP), model.resident(row(), CHIP)) == (2, 8)
    assert model.resident(model.Row("kernel", 1, 128, 32, 100 * 1024, row().counts), CHIP) == 2  # shared memory
    assert model.resident(model.Row("kernel", 1, 1024, 16, 0, row().counts), CHIP) == 2  # threads
    times = [model.time(x, CHIP, BETWEEN, 1, 1024, 66)["latency"] for x in (row(), wide)]
    assert times == pytest.approx([700 / CHIP.clock, 4 * 700 / CHIP.clock])


def test_a_count_that_is_worse_is_named():
    known = counts.read()["7c81e26"]["rows"]["sm_90:D64-C64-l2"]
    assert list(counts.worse(known, known)) == []
    now = copy.deepcopy(known)
    kernel = now["forward"][1]
    kernel["counts"]["sectors"][1] *= 1.02
    assert list(counts.worse(known, now)) == []
    kernel["counts"]["sectors"][1] *= 1.02
    (text,) = counts.worse(known, now)
    assert "forward: linear_state: sectors" in text and "+4.0%" in text
    del now["forward"][0]
    assert "launches" in next(counts.worse(known, now))


def test_the_table_is_complete():
    """Every specimen has counts of the tested Triton, of the CUDA C++ kernels where they serve it, and of the baseline, which goes token
    by token where exact steps are taken now. Of the MLP memory in smaller chunks the CUDA C++ kernels alone need counts."""
    table = counts.read()
    for label in table:
        specimens = counts.specimens("cuda" if label.startswith("nvcc") else "triton")
        known = {name for name in specimens if label != "7c81e26" or "-C1-" not in name}
        small = {name for name in known if re.search("-C(16|32)-Hd", name) and not label.startswith("nvcc")}
        assert known - small <= set(table[label]["rows"]) <= known, label
        for name, directions in table[label]["rows"].items():
            for chip in (chip for chip, x in CHIPS.items() if x.architecture == specimens[name].architecture):
                assert "forward+backward: " in "\n".join(counts.report(specimens[name], directions, chip, directions))


def test_names_of_cuda_kernels():
    file = "_ZN5miras4cuda53_GLOBAL__N__5c3e31a8_20_linear_chain_bf16_cu_2cac0875"
    chain = "12linear_chainINS1_10ChainShapeI13__nv_bfloat16Li128ELi64ELi32EEEEEv16MirasLinearChaini"
    assert counts.readable(file + chain) == "linear_chain bf16 Dk128 C64 values32"
    mlp = "_ZN5miras4cuda45_GLOBAL__N__45921a42_12_mlp_chain_cu_c44580399mlp_chainILi16ELi128E6__halfEEv13MirasMlpChain"
    assert counts.readable(mlp) == "mlp_chain f16 C16 Hd128"
    assert counts.readable("linear_chain_fwd") == "linear_chain_fwd"


def test_blocks_are_those_that_a_shape_launches():
    """64 values, or 32 where heads are few: docs/backends.md."""
    wide, narrow = (counts.specimens("cuda")[f"sm_90:D128-C64-l2-v{values}"].shapes for values in (64, 32))
    assert [str(x) for x in narrow] == ["1x32768x32x128"] and {*wide, *narrow} == set(counts.LONG)


def test_measured_kernels_beside_modelled_ones():
    result = {"case": plan.TARGET, "base": "l2", "direction": FORWARD, "kernel_us": {"linear_chain_fwd_fused": 1000.0, "other": 1.0}}
    version = next(label for label in counts.read() if label[0].isdigit() and label != "7c81e26")
    environment = {"device": {"name": "NVIDIA H200"}, "versions": {"triton": version}}
    expected = counts.modelled(plan.SHAPES[plan.TARGET], "l2", FORWARD, "H200", version)["linear_chain_fwd_fused"]
    cells = lambda given: [[cell.strip() for cell in line.split("|")[1:-1]] for line in report._modelled(result, given).split("\n")[-2:]]
    ours, other = cells(environment)
    assert ours == ["linear_chain_fwd_fused", "1000", f"{expected:.0f}", report.number(1000 / expected)]
    assert other == ["other", "1", "-", "-"]
    assert cells(environment | {"device": {"name": "another"}})[0] == ["linear_chain_fwd_fused", "1000", "-", "-"]


@pytest.mark.parametrize("name", [slow("sm_90:D64-C64-l2"), slow("sm_90:D128-C64-l2")])
def test_no_kernel_is_worse_than_in_the_table(name):
    """Renew the table by ``python -m bench.gpu.counts --renew REASON``."""
    label = triton.__version__.split("+")[0]
    if label not in counts.read():
        pytest.skip(f"the table has no counts of Triton {label}")
    assert list(counts.worse(counts.read()[label]["rows"][name], counts.rows(counts.SPECIMENS[name]))) == []
