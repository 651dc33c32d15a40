"""``rpqfx check`` verifies a file or folder without building a model."""

from __future__ import annotations

import argparse
from typing import Any

from rpqfx.errors import FormatError
from rpqfx.integrations.command_line.source import opened
from rpqfx.reporting.tables import size
from rpqfx.storage.restore import codes_of, unpacked


def run(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Verifies the seal, the checksum, and that every code points into its codebook.

    Args:
        given: What was typed.

    Returns:
        What was found, as values and as text.

    Raises:
        FormatError: If anything is not as it was written.
    """
    with opened(given.path) as source:
        codes = codes_of(source.manifest)
        for entry in source.manifest["tensors"]:
            name = entry["names"][0]
            if "packed" not in entry and name not in codes:
                continue
            try:
                unpacked(entry, source.read([name])[name], *codes.get(name, ()))
            except FormatError as error:
                raise FormatError(f"{source.name} {error}") from error
        found = {
            "path": source.name, "format": source.manifest["version"], "files": source.files, "bytes": source.nbytes,
            "tensors": len(source.manifest["tensors"]), "quantized_weights": len(source.manifest["sites"]),
            "quantized_caches": len(source.manifest.get("kv", ())), "ranges_checked": len(codes),
        }  # fmt: skip
    files = f"{source.files} file{'s' if source.files > 1 else ''}"
    text = (
        f"{source.name} is whole: {size(source.nbytes)} in {files}, format {found['format']}, "
        f"{found['tensors']} tensors, {found['quantized_weights']} quantized weights; "
        "seal, ranges and checksum are right"
    )
    return found, text
