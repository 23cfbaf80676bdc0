"""Expressions that users write for an attentional bias or a retention gate: from text to a straight-line program with derivatives.

``parse`` reads the text into a ``Graph``, ``Graph.derivative`` differentiates it, ``Graph.program`` lists what a backend has to compute,
and ``evaluate`` does so in PyTorch. Nothing is ever executed as Python.
"""

from .graph import Graph
from .program import OPERATIONS, Program, evaluate, values
from .text import FUNCTIONS, parse

__all__ = ["FUNCTIONS", "OPERATIONS", "Graph", "Program", "evaluate", "parse", "values"]
