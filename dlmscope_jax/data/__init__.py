"""Documents, tokenizers and token blocks."""

from .corpus import builtin_documents, count_matches, manifest, side_of
from .documents import Document
from .packing import Blocks, SyntheticBlocks, builtin_blocks, pack, synthetic_blocks
from .tokenizer import Tokenizer, encode, load_tokenizer, train_bpe

__all__ = [
    "Blocks",
    "Document",
    "SyntheticBlocks",
    "Tokenizer",
    "builtin_blocks",
    "builtin_documents",
    "count_matches",
    "encode",
    "load_tokenizer",
    "manifest",
    "pack",
    "side_of",
    "synthetic_blocks",
    "train_bpe",
]
