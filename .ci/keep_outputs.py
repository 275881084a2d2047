#!/usr/bin/env python3
"""Git's clean filter for notebooks: what git sees of a notebook that was run and saved.

If its cells are those of the staged version, git sees the staged version, so that running a notebook changes nothing in
`git status`. Once a cell is edited, git sees the file as it is. `make notebooks` stages new outputs past this filter.
Set up by `make`: git config filter.keep-outputs.clean "python3 .ci/keep_outputs.py %f".
"""
import json
import subprocess
import sys
from pathlib import Path


def cells(notebook):
    "Kind, source and tags of each cell."
    return [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags")) for c in json.loads(notebook)["cells"]]


def git(*arguments, cwd=None):
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=cwd).stdout.strip()


def refresh(path):
    "Have git forget that a notebook was written, if it sees the staged version: it goes by size before it asks the filter."
    path = Path(path)
    staged = git("ls-files", "--stage", "--", path.name, cwd=path.parent).split()
    if staged and git("hash-object", "--path", path.name, "--", path.name, cwd=path.parent) == staged[1]:
        git("add", "--", path.name, cwd=path.parent)


def main():
    saved = sys.stdin.buffer.read()
    staged = subprocess.run(["git", "show", f":{sys.argv[1]}"], capture_output=True)
    try:
        unchanged = staged.returncode == 0 and cells(staged.stdout) == cells(saved)
    except (ValueError, KeyError, TypeError):  # not a notebook
        unchanged = False
    sys.stdout.buffer.write(staged.stdout if unchanged else saved)


if __name__ == "__main__":
    main()
