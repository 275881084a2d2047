#!/usr/bin/env python3
"""Git's clean filter for notebooks: what git sees of a notebook that was run and saved.

If its cells are those of the staged version, git sees the staged version, so that running a notebook changes nothing in
`git status`. Once a cell is edited, git sees the file as it is. `make notebooks` stages new outputs past this filter.
Set up by `make`: git config filter.keep-outputs.clean "python3 .ci/keep_outputs.py %f".
"""
import json
import subprocess
import sys


def cells(notebook):
    "Kind, source and tags of each cell."
    return [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags")) for c in json.loads(notebook)["cells"]]


def main():
    saved = sys.stdin.buffer.read()
    staged = subprocess.run(["git", "show", f":{sys.argv[1]}"], capture_output=True)
    try:
        unchanged = staged.returncode == 0 and cells(staged.stdout) == cells(saved)
    except (ValueError, KeyError, TypeError):  # not a notebook
        unchanged = False
    sys.stdout.buffer.write(staged.stdout if unchanged else saved)


main()
