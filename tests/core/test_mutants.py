"""The mutants of mutants.py still apply to the sources, and the tests that must catch them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mutant_table import MUTANTS
from mutants import occurrences


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_applies_and_its_tests_exist(mutant):
    assert occurrences(mutant) == 1, f"expected {mutant.text!r} once in {mutant.file}"
    assert mutant.replacement != mutant.text and mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        source = (Path(__file__).parents[1] / file).read_text()
        assert not function or re.search(rf"^def {re.escape(function.split('[')[0])}\(", source, re.MULTILINE), test


def test_mutants_cover_every_folder():
    assert len(MUTANTS) >= 40 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for folder in ("kernels/", "csrc/cpu/", "csrc/cuda/", "python/miras_kernels/layers/", "python/miras_kernels/hf/"):
        assert sum(mutant.file.startswith(folder) for mutant in MUTANTS) >= 2, folder
