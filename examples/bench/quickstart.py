"""The quickstart's figures, for the README: runs ``examples/01_quickstart.py`` as it stands, and how long it takes.

python examples/bench/quickstart.py         # two threads; compiles kernels first, within the time, if there are none
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import results
import torch


def main() -> None:
    torch.set_num_threads(2)
    example = Path(__file__).parents[1] / "01_quickstart.py"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(example), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    figures = {"seed": 0, "seconds": time.perf_counter() - began, **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(figures))
    results.write("quickstart", "python examples/bench/quickstart.py", figures)


if __name__ == "__main__":
    main()
