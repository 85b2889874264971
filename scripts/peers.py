"""The environment of the libraries that ours is measured against: .venv-peers, apart from our own (2 GB of disk, some minutes)."""

import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH, SAELENS, SPARSIFY, LEARNING = "torch==2.13.0", "sae-lens==6.54.12", "eai-sparsify==1.3.3", "dictionary-learning==0.1.0"


def python_of_peers() -> Path:
    """The interpreter of an environment that holds torch and the three libraries, made where it is not there."""
    folder = ROOT / ".venv-peers"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    check = "import importlib.metadata as m; [m.version(n) for n in ('torch', 'sae-lens', 'eai-sparsify', 'dictionary-learning', 'einops')]"
    if subprocess.run([python, "-c", check], capture_output=True).returncode:
        print(f"making {folder.name} with {TORCH}, {SAELENS}, {SPARSIFY}, {LEARNING}: some minutes")
        pip = [python, "-m", "pip", "install", "-qq"]
        # torch first and held where it is: the libraries would take any, and the newest brings gigabytes
        subprocess.run([*pip, TORCH, "numpy", "einops"], check=True)
        (folder / "constraints.txt").write_text(TORCH + "\n")
        subprocess.run([*pip, "--constraint", folder / "constraints.txt", SAELENS, SPARSIFY], check=True)
        # its declared dependencies are those of language models and another torch; its dictionaries and trainers need none
        subprocess.run([*pip, "--no-deps", LEARNING], check=True)
    return python
