"""The package's commands with the Triton kernels as compiled.

PYTHONPATH=tests MIRAS_TRITON=ptx:sm_90 python -m ptx fuzz --backend triton --seconds 60
"""

import os

from .host import on_machine

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from miras_kernels.__main__ import main

    with on_machine(os.environ.get("MIRAS_TRITON", "ptx:sm_90").removeprefix("ptx:")):
        raise SystemExit(main())
