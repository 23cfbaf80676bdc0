"""``make study`` with expressions of one's own: ``--add`` and ``--param``."""

from __future__ import annotations

import dataclasses

import pytest

import miras_kernels as mk
from examples.which_bias import __main__ as program
from examples.which_bias import methods, plan


@pytest.fixture
def table(monkeypatch):
    """The command adds rows to it."""
    monkeypatch.setattr(methods, "TABLE", dict(methods.TABLE))


def test_an_expression_is_added(table, tmp_path, capsys):
    small = dataclasses.replace(plan.QUICK, tasks=("outliers",), memories=("L2",))
    added = program._added(["cauchy=e/(1+(e/s)**2)", "twice = 2*e"], ["s=1"])
    assert [row.name for row in added] == ["cauchy", "cauchy + decay", "twice", "twice + decay"]
    assert added[0].bias == mk.CustomBias("e/(1+(e/s)**2)", s=1.0) and added[1].axes == ("step", "forget")
    found = plan.measure(dataclasses.replace(small, added=added), 0, 1)
    assert set(found.names) == {*methods.TABLE} and {row.name for row in added} <= set(found.names)
    error = {c.method: c.error for c in found.cells}
    assert error["cauchy"] != error["L2"] and error["cauchy"] != error["cauchy + decay"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "e*2"], "--add: expected NAME=EXPRESSION with a new name, got e*2="),
        (["--add", "L2=2*e"], "--add: expected NAME=EXPRESSION with a new name, got L2=2*e"),
        (["--add", "a=e", "--add", "a=2*e"], "--add: expected NAME=EXPRESSION with a new name, got a=2*e"),
        (["--add", "a=e*s"], "CustomBias: unknown name 's'"),
        (["--add", "a=e*s", "--param", "s=x"], "--param: expected NAME=NUMBER, got s=x"),
        (["--add", "a=e", "--param", "s=1"], "--param: no expression uses s"),
        (["--param", "s=1"], "--param: no expression uses s"),
    ],
)
def test_wrong_expressions_are_refused(table, capsys, arguments, message):
    with pytest.raises(SystemExit):
        program.main(["--quick", *arguments])
    assert message in capsys.readouterr().err
