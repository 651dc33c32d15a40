"""The benchmark ``examples/bench/zoo.py`` as modules: it is run as a script, from its own folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "bench"))

import zoo_checks as checks  # noqa: E402
import zoo_coverage as coverage  # noqa: E402
import zoo_models as models  # noqa: E402
import zoo_page as page  # noqa: E402
import zoo_runs as runs  # noqa: E402

__all__ = ["checks", "coverage", "models", "page", "runs"]
