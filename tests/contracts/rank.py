"""One of the ranks of ``two_ranks``: it runs one command line after another in the same process group."""

import faulthandler
import json
import os
import signal
import sys
import traceback

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
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        os.chdir(folder)  # exports and logs of a config go to runs/ below the current folder
        os.write(int(sys.argv[1]), bytes([status_of(arguments)]))
