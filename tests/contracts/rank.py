"""One of the ranks of ``two_ranks``: it runs one command line after another in the same process group."""

import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from modules.__main__ import main


def status_of(arguments: list[str]) -> int:
    """Run the command line of ``python -m modules`` and return its exit status."""
    try:
        main(arguments)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)  # says where it hangs
    given, answer = Path(sys.argv[1]).open(), os.open(sys.argv[2], os.O_WRONLY)  # noqa: SIM115
    for line in given:
        folder, arguments = json.loads(line)
        os.chdir(folder)  # exports and logs of a config go to runs/ below the current folder
        os.write(answer, bytes([status_of(arguments)]))
