"""Compiled functions on disk: what several processes keep there is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# one process compiles for a number, the other for an array; to save it, each reads the index and waits for the other to
# have read it too
SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
from numba.core.caching import IndexDataCacheFile
from double import double

here, kind = Path(__file__).parent, sys.argv[1]
load, saving = IndexDataCacheFile._load_index, Path(sys.argv[0]).name == "save.py"

def together(self):
    found = load(self)
    if saving and sys._getframe(1).f_code.co_name == "save":
        (here / kind).touch()
        end = time.monotonic() + 5
        while not all((here / k).exists() for k in ("number", "array")) and time.monotonic() < end:
            time.sleep(0.01)
    return found

IndexDataCacheFile._load_index = together
value = 4.0 if kind == "number" else np.array([4.0])
assert double(value) == 8.0, double(value)
"""


def test_processes_that_save_two_signatures_at_a_time_do_not_mix_them_up(tmp_path: Path):
    (tmp_path / "double.py").write_text("from specdec.jit import njit\n\n\n@njit\ndef double(x):\n    return x * 2\n")
    for name in ("save.py", "load.py"):
        (tmp_path / name).write_text(SCRIPT)
    folders = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": folders}
    for name in ("save.py", "load.py"):
        command = [sys.executable, str(tmp_path / name)]
        started = [
            subprocess.Popen([*command, kind], env=environment, stderr=subprocess.PIPE, text=True)
            for kind in ("number", "array")
        ]
        said = [process.communicate(timeout=240)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        assert len(list((tmp_path / "cache").rglob("*.nbc"))) == 2, f"{name}: a signature's code each"
