"""Documents, tokenizers and token blocks."""

from .corpus import builtin_documents, count_matches, manifest, side_of
from .documents import Document, assign_sides, on_side, read_documents
from .packing import Blocks, SyntheticBlocks, builtin_blocks, pack, synthetic_blocks
from .streamed import StreamedBlocks
from .synthetic import Answer, SyntheticDocument, synthetic_document, synthetic_documents
from .tokenizer import Tokenizer, encode, train_bpe
from .tokenizer_files import load_tokenizer

__all__ = [
    "Answer",
    "Blocks",
    "Document",
    "StreamedBlocks",
    "SyntheticBlocks",
    "SyntheticDocument",
    "Tokenizer",
    "assign_sides",
    "builtin_blocks",
    "builtin_documents",
    "count_matches",
    "encode",
    "load_tokenizer",
    "manifest",
    "on_side",
    "pack",
    "read_documents",
    "side_of",
    "synthetic_blocks",
    "synthetic_document",
    "synthetic_documents",
    "train_bpe",
]
