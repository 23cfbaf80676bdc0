"""A worker process whose tasks answer, fail, end the process or hang."""

from __future__ import annotations

import os
import time

from bench.common.processes import serve

if __name__ == "__main__":
    serve({
        "echo": lambda value: [value, os.getpid()],
        "fail": lambda value: [1 / 0],
        "die": lambda value: (yield {"doing": value}) or os._exit(7),
        "hang": lambda value: (yield {"doing": value}) or time.sleep(600),
    })  # fmt: skip
