"""``rpqfx report`` shows what a file or folder holds, without building a model."""

from __future__ import annotations

import argparse
from typing import Any

from rpqfx.errors import RPQError
from rpqfx.integrations.command_line.source import opened
from rpqfx.storage.files import draft, place
from rpqfx.storage.manifest_report import report_of


def run(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Makes the report of a saved model.

    Args:
        given: What was typed.

    Returns:
        The report, as values and as text.

    Raises:
        RPQError: If the file is damaged or has no quantized weight.
    """
    page = None if given.html is None else place(given.html)
    with opened(given.path) as source:
        try:
            made = report_of(source.manifest)
        except RPQError as error:
            raise RPQError(f"{source.name} {error}") from error
    if page is not None:
        with draft(page) as part:
            part.write_text(made.to_html(), encoding="utf-8")
    return made.to_dict(), str(made)
