"""``python -m rpqfx``, which is the command ``rpqfx``; see ``rpqfx.integrations.command_line``."""

from __future__ import annotations

import sys

from rpqfx.integrations.command_line.parser import main

if __name__ == "__main__":
    sys.exit(main())
