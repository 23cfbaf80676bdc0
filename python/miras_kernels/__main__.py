"""``python -m miras_kernels``: what this machine can run, whether its kernels compute correctly, which backend serves a call, and more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from .cli import explain, fuzz, info, linearize, verify, warmup

#: name: (one line of help, the module in cli/)
COMMANDS: dict[str, tuple[str, ModuleType]] = {
    "info": ("versions, devices, backends and options (the default)", info),
    "explain": ("which backends can serve a call, and which one 'auto' takes", explain),
    "fuzz": ("random calls of everything public, checked against the reference", fuzz),
    "linearize": ("replace the attention of a pretrained model by memories, and train it to do what it did", linearize),
    "verify": ("compare this machine's kernels with the reference; 'auto' then skips wrong ones", verify),
    "warmup": ("compile the Triton kernels that calls of given sizes need, before a job does", warmup),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m miras_kernels", description="What miras-kernels can do on this machine.")
    parser.set_defaults(run=info.run)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (text, module) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
