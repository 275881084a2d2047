"""The readers of files, fuzzed by atheris, which follows the code that an input reaches."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_fuzz_files import arrays, pictures
from test_fuzz_tables import PACKED, WHOLE

BEGUN = {"csv": WHOLE, "dat": [b"1::2::3::4\n1::3::4::5\n"], "json": [b'[{"user": 1, "item": "a"}]'],
         "jsonl": [b'{"user": 1, "item": "a"}\n{"user": 2, "item": "b"}\n'], "parquet": [PACKED], "npy": arrays(),
         "jpg": pictures()}


@pytest.mark.slow
@pytest.mark.parametrize("ending", BEGUN)
def test_readers(ending, tmp_path):
    pytest.importorskip("atheris", reason="pip install atheris")
    for n, content in enumerate(BEGUN[ending]):
        (tmp_path / f"{n}").write_bytes(content)
    command = [sys.executable, "tests/fuzz_readers.py", ending, "-runs=5000", "-seed=1", "-max_len=4000", "-timeout=60",
               f"-artifact_prefix={tmp_path}/", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0 and "Done 5000 runs" in result.stderr, result.stdout[-1500:] + result.stderr[-1500:]
