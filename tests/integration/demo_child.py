"""``hydraopt demo`` on other tasks: the first argument is the folder of their task files."""

from __future__ import annotations

import sys
from pathlib import Path

from flows.command_line import main
from flows.demo import material

material._TASKS = Path(sys.argv.pop(1))
material._BUDGET = 0.8
main()
