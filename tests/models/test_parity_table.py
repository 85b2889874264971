"""The parity matrix of ``models/README.md``: made from the list of what ``test_parity`` checks, and compared with it.

``python tests/models/test_parity_table.py`` writes it.
"""

from pathlib import Path

import pytest
from tiny import TINY

from dlmscope_jax.models import sites_of
from dlmscope_jax.models.sites import FINAL_SITES

README = Path(__file__).resolve().parents[2] / "dlmscope_jax" / "models" / "README.md"
BEGIN, END = "<!-- parity -->\n", "<!-- end of parity -->\n"

MODELS = {
    "llama": "Llama 3, 3.1, 3.2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma2": "Gemma-2",
    "gpt2": "GPT-2, all sizes",
    "gpt_neox": "Pythia, GPT-NeoX",
    "llada": "LLaDA 8B Base, Instruct, 1.5",
    "illada": "iLLaDA 8B",
    "dream": "Dream 7B, Dream-Coder, DiffuCoder",
    "a2d-qwen3": "Tiny-A2D from Qwen3",
    "a2d-qwen2": "Tiny-A2D from Qwen2.5",
    "diffugpt": "DiffuGPT-s, -m",
    "mdlm": "MDLM (mdlm-owt)",
    "sdar": "SDAR",
    "fast_dllm_qwen": "Fast-dLLM v2",
}


def table() -> str:
    """The matrix in Markdown: a row a family, a column a property, in each cell what is promised and checked."""
    from test_parity import CASES, PROPERTIES

    lines = [["family", "models", "attention", *PROPERTIES], ["---"] * (3 + len(PROPERTIES))]
    for family, models in MODELS.items():
        config, _ = TINY[family]
        cells = []
        for name, checked in PROPERTIES.items():
            promise = checked.promise if (family, name) in CASES else "has one only"
            cells.append(f"{len(sites_of(config)) + len(FINAL_SITES)} sites {promise}" if name == "sites" else promise)
        lines.append([f"`{family}`", models, config.attention.replace("_", "-"), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def test_every_family_has_a_row() -> None:
    pytest.importorskip("torch")
    from test_parity import CASES, FAMILIES

    assert set(MODELS) == set(FAMILIES) == set(TINY) == {family for family, _ in CASES}


def test_the_committed_table_is_what_is_tested() -> None:
    pytest.importorskip("torch")
    text = README.read_text(encoding="utf-8")
    committed = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert committed == table(), f"the table in {README.name} is old: python tests/models/test_parity_table.py"


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    README.write_text(old[: old.index(BEGIN) + len(BEGIN)] + table() + old[old.index(END) :], encoding="utf-8")
