"""Documents -> token blocks of one length, with the document of every position."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int32

from ..errors import UserError
from .corpus import builtin_documents
from .documents import Document, Side
from .synthetic import SyntheticDocument, synthetic_documents
from .tokenizer import Tokenizer, padding_id

_AT_ONCE = 512  # documents tokenized in one call: keeps the tokenizer's own copies small


@dataclass(frozen=True)
class Blocks:
    """``n`` token blocks of length ``T``.

    ``tokens`` [n, T] int32; ``documents`` [n, T] int32 indexes ``names`` and is -1 at padding (a beginning-of-sequence token belongs
    to the document after it).
    """

    tokens: Int32[np.ndarray, "n T"]
    documents: Int32[np.ndarray, "n T"]
    names: tuple[str, ...]
    side: Side

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: slice | np.ndarray) -> "Blocks":
        """The chosen blocks, names unchanged."""
        return replace(self, tokens=self.tokens[rows], documents=self.documents[rows])


@dataclass(frozen=True)
class PlacedAnswer:
    """Where an answer of a synthetic document lies: tokens ``start:stop`` of ``block``; ``document`` and ``answer`` index the truth."""

    block: int
    start: int
    stop: int
    document: int
    answer: int


@dataclass(frozen=True)
class SyntheticBlocks:
    """Synthetic blocks with their ground truth; ``blocks.names[i]`` is ``truths[i].name``, every document lies whole in one block."""

    blocks: Blocks
    truths: tuple[SyntheticDocument, ...]
    answers: tuple[PlacedAnswer, ...]


def pack(documents: Iterable[Document], tokenizer: Tokenizer, block_length: int) -> Blocks:
    """Join documents, each closed by EOS, and cut the stream into blocks that begin with BOS (where the tokenizer has them).

    A document may run over several blocks; only the last block is padded. Raises ``UserError`` for an empty corpus, mixed sides or
    a block length below 2.
    """
    documents = list(documents)
    sides = {d.side for d in documents}
    if len(sides) != 1:
        raise UserError(f"pack needs documents of one side, got {sorted(sides) or 'none'}")
    _check(block_length)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = [
        np.asarray(ids + end, np.int32)
        for i in range(0, len(documents), _AT_ONCE)
        for ids in tokenizer.encode_plain(d.text for d in documents[i : i + _AT_ONCE])
    ]
    stream = np.concatenate(rows)
    owner = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
    if not len(stream):
        raise UserError("the corpus is empty: no document has a token")
    body = block_length - (tokenizer.bos_id is not None)
    n = -(-len(stream) // body)
    tokens = np.full((n, block_length), padding_id(tokenizer), np.int32)
    where = np.full((n, block_length), -1, np.int32)
    for target, source in ((tokens, stream), (where, owner)):
        flat = np.full(n * body, target[0, 0], np.int32)
        flat[: len(source)] = source
        target[:, block_length - body :] = flat.reshape(n, body)
    if tokenizer.bos_id is not None:
        tokens[:, 0] = tokenizer.bos_id
        where[:, 0] = where[:, 1]
    return Blocks(tokens, where, tuple(d.name for d in documents), documents[0].side)


def synthetic_blocks(tokenizer: Tokenizer, block_length: int, side: Side, n_blocks: int, seed: int = 0) -> SyntheticBlocks:
    """``n_blocks`` blocks of whole synthetic documents (``synthetic.synthetic_documents``); what remains of a block is padding.

    Raises ``UserError`` where a document does not fit into a block.
    """
    _check(block_length)
    tokens = np.full((n_blocks, block_length), padding_id(tokenizer), np.int32)
    where = np.full((n_blocks, block_length), -1, np.int32)
    bos = tokenizer.bos_id
    begin = int(bos is not None)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    truths: list[SyntheticDocument] = []
    answers: list[PlacedAnswer] = []
    block, at = 0, begin
    for document in synthetic_documents(side, seed):
        ids = tokenizer.encode([document.text])[0] + end
        if begin + len(ids) > block_length:
            raise UserError(f"block_length {block_length} is too short for the synthetic documents: use at least 128")
        if at + len(ids) > block_length:
            block, at = block + 1, begin
        if block >= n_blocks:
            break
        tokens[block, at : at + len(ids)] = ids
        where[block, at : at + len(ids)] = len(truths)
        for i, answer in enumerate(document.answers):
            covering = [t for t, (a, b) in enumerate(tokenizer.offsets(document.text)) if a < answer.stop and b > answer.start]
            answers.append(PlacedAnswer(block, at + covering[0], at + covering[-1] + 1, len(truths), i))
        truths.append(document)
        at += len(ids)
    if bos is not None:
        tokens[:, 0] = bos
        where[:, 0] = where[:, 1]
    return SyntheticBlocks(Blocks(tokens, where, tuple(d.name for d in truths), side), tuple(truths), tuple(answers))


def builtin_blocks(tokenizer: Tokenizer, block_length: int, side: Side) -> Blocks:
    """One side of the built-in corpus with every tenth block synthetic (the last of each ten)."""
    corpus = pack([d for d in builtin_documents() if d.side == side], tokenizer, block_length)
    synthetic = synthetic_blocks(tokenizer, block_length, side, len(corpus) // 9).blocks
    total = len(corpus) + len(synthetic)
    made = np.zeros(total, bool)
    made[9::10] = True
    tokens = np.empty((total, block_length), np.int32)
    where = np.empty((total, block_length), np.int32)
    tokens[~made], tokens[made] = corpus.tokens, synthetic.tokens
    where[~made] = corpus.documents
    where[made] = np.where(synthetic.documents < 0, -1, synthetic.documents + len(corpus.names))
    return Blocks(tokens, where, corpus.names + synthetic.names, side)


def _check(block_length: int) -> None:
    if block_length < 2:
        raise UserError(f"block_length is {block_length}: it must be at least 2")
