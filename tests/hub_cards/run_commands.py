"""Run as a script by test_recipes: run dualstream commands one after the other, in one process.

Usage: python run_commands.py < COMMANDS, a JSON list of lists of arguments.
"""

import json
import sys

from dualstream.cli import main

for arguments in json.load(sys.stdin):
    print("$ dualstream", *arguments, file=sys.stderr, flush=True)
    if status := main(arguments):
        sys.exit(f"dualstream {' '.join(arguments)} ended with {status}")
