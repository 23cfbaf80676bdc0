"""Prints the constraints for the packages of the environment it runs in: `make update-constraints` writes them to tested.txt.

They hold on Linux, for the Pythons that all of these releases support; any other resolves without them. PyTorch is left out: which
build suits a machine is the Makefile's and the user's choice.
"""

import importlib.metadata
import re

NEWEST_PYTHON = 14  # for a later one these releases need not have wheels

packages = [p for p in importlib.metadata.distributions() if p.name.lower() not in ("torch", "miras-kernels", "pip")]
oldest = max(int(minor) for p in packages for minor in re.findall(r">=\s*3\.(\d+)", p.metadata["Requires-Python"] or ""))
marker = f'sys_platform == "linux" and python_version >= "3.{oldest}" and python_version <= "3.{NEWEST_PYTHON}"'
print("# Written by `make update-constraints`: the releases that demo, tests and documentation were run with.")
for p in sorted(packages, key=lambda p: p.name.lower()):
    print(f"{p.name}=={p.version.split('+')[0]} ; {marker}")
