"""`nbdev_test` of one notebook after the other, each in a process forked from this one, which has imported what takes long.

A line of stdin is a notebook, a tab, and the file for what is printed; the answer is the exit status. The package itself is
imported by each notebook.
"""
import gc
import os
import sys

import open_clip  # noqa: F401
import seaborn  # noqa: F401
import torch  # noqa: F401
from nbdev.test import nbdev_test

gc.freeze()  # or every process looks through all of it as it ends
for line in sys.stdin:
    notebook, said = line.rstrip("\n").split("\t")
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()

sys.argv = ["nbdev_test"]
with open(os.devnull) as nothing, open(said, "w") as file:
    for here, there in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(here.fileno(), there)
nbdev_test(path=notebook, n_workers=0)
