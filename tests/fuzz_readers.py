"""Coverage-guided fuzzing of the readers of files, by atheris: `python tests/fuzz_readers.py csv -runs=5000`.

It ends at the first input that is neither read nor refused by a documented error, and says what was raised.
"""
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ptmrec.data", "ptmrec.tables", "ptmrec.sources"]):
    import numpy as np

    from ptmrec.data import DataError, PictureError, _read_features, load_image
    from ptmrec.tables import read_table

READERS = {"csv": read_table, "dat": read_table, "json": read_table, "jsonl": read_table, "parquet": read_table,
           "npy": lambda path: _read_features(path, np.array([0, 5])), "jpg": lambda path: load_image(path, 8)}


def main(ending, *options):
    read, path = READERS[ending], Path(tempfile.mkdtemp()) / f"file.{ending}"

    def one_input(content):
        path.write_bytes(content)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                read(path)
            except (DataError, PictureError) as error:
                assert "\n" not in str(error)

    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
