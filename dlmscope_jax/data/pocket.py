"""The pocket models' tokenizer, made from the train side of the built-in corpus."""

from .corpus import builtin_documents
from .synthetic import synthetic_documents
from .tokenizer import Tokenizer, train_bpe


def train_pocket_tokenizer(vocab_size: int = 2048) -> Tokenizer:
    """Byte-level BPE over the built-in train documents and about a tenth as many characters of synthetic train documents."""
    texts = [d.text for d in builtin_documents() if d.side == "train"]
    wanted = sum(map(len, texts)) / 9
    lengths = 0
    for document in synthetic_documents("train"):
        texts.append(document.text)
        lengths += len(document.text)
        if lengths >= wanted:
            break
    return train_bpe(texts, vocab_size)
