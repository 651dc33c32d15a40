"""The benchmark ``examples/bench/zoo.py`` as modules: it is run as a script, from its own folder."""

from __future__ import annotations

import zoo_checks as checks
import zoo_coverage as coverage
import zoo_models as models
import zoo_page as page
import zoo_runs as runs

__all__ = ["checks", "coverage", "models", "page", "runs"]
