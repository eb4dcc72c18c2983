"""Run commands in this one process, since importing what they need takes seconds.

Reads one JSON list of arguments a line from stdin, and answers each with a line on stdout:
``{"code", "stdout", "stderr"}``.
"""

from __future__ import annotations

import json
import os
import sys

from click.testing import CliRunner

from flows.command_line import main

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a library prints past Python must not look like an answer
for line in sys.stdin:
    done = CliRunner().invoke(main, json.loads(line))
    json.dump({"code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr}, answers)
    print(file=answers, flush=True)
