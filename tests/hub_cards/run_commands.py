"""Run as a script by test_recipes: a process that runs the dualstream commands of one page after another.

What the commands import is read once for all pages, which is most of what a page takes. Usage: write a line of JSON,
``{"folder": ..., "commands": [[argument, ...], ...]}``; the line that comes back is empty after the last command, or
says which one failed. What commands print goes to standard error.
"""

import gc
import json
import os
import sys
import traceback

from dualstream.cli import main


def failure(folder, commands):
    """Run commands in a folder up to the first that fails; what to say of it, or nothing."""
    os.chdir(folder)
    for arguments in commands:
        print("$ dualstream", *arguments, file=sys.stderr, flush=True)
        gc.freeze()  # lmms-eval collects garbage after every arm; not among all modules each time
        try:
            status = main(arguments)
        except BaseException as error:
            traceback.print_exc()
            status = repr(error)
        if status:
            return f"dualstream {' '.join(arguments)} ended with {status}"
    return ""


answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    print(failure(**json.loads(line)), file=answers, flush=True)
