"""``python -m flows.command_line`` is ``hydraopt``, whatever the PATH says."""

from flows.command_line import main

main(prog_name="hydraopt")
