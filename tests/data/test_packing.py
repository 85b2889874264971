"""Blocks: nothing lost, every position owned by the right document, synthetic truth in its place."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.data import Document, builtin_blocks, builtin_documents, load_tokenizer, pack, synthetic_blocks
from dlmscope_jax.errors import UserError

TOK = load_tokenizer("pocket-dlm")
BARE = replace(TOK, bos_id=None, eos_id=None)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.integers(2, 20), st.booleans())
def test_unpacking_gives_the_documents_back(texts, length, bare):
    tok = BARE if bare else TOK
    documents = [Document(f"d{i}", t, "train") for i, t in enumerate(texts)]
    if bare and not any(texts):
        with pytest.raises(UserError, match="no document has a token"):
            pack(documents, tok, length)
        return
    blocks = pack(documents, tok, length)
    begin = 0 if bare else 1
    assert blocks.tokens.shape == blocks.documents.shape == (len(blocks), length)
    assert blocks.tokens.dtype == blocks.documents.dtype == np.int32
    assert bare or (blocks.tokens[:, 0] == 0).all() and (blocks.documents[:, 0] == blocks.documents[:, 1]).all()
    tokens, owner = blocks.tokens[:, begin:].ravel(), blocks.documents[:, begin:].ravel()
    for i, text in enumerate(texts):
        own = tokens[owner == i].tolist()
        assert own == tok.encode_plain([text])[0] + ([] if bare else [1])
    real = owner >= 0
    assert (np.diff(owner[real]) >= 0).all() and not real[real.sum() :].any()  # in order, padding only at the end
    assert (~real).sum() < length and (tokens[~real] == 2).all()
    assert blocks.names == tuple(d.name for d in documents) and blocks.side == "train"


def test_specials_spelled_out_in_a_document_are_text():
    blocks = pack([Document("d", "a <|mask|> b <|eos|>", "train")], TOK, 32)
    assert Counter(blocks.tokens.ravel().tolist())[3] == 0 and (blocks.tokens == 1).sum() == 1
    assert TOK.decode(blocks.tokens[0][1 : (blocks.documents[0] >= 0).sum() - 1]) == "a <|mask|> b <|eos|>"
    assert TOK.encode(["<|mask|>"]) == [[3]]  # a prompt may spell it


def test_bad_input():
    a, b = Document("a", "x", "train"), Document("b", "y", "test")
    with pytest.raises(UserError, match=r"one side, got \['test', 'train'\]"):
        pack([a, b], TOK, 8)
    with pytest.raises(UserError, match="got none"):
        pack([], TOK, 8)
    with pytest.raises(UserError, match="block_length is 1"):
        pack([a], TOK, 1)
    with pytest.raises(UserError, match="too short for the synthetic documents"):
        synthetic_blocks(TOK, 24, "train", 2)


@pytest.mark.parametrize("tok", [TOK, BARE])
def test_synthetic_answers_lie_where_they_are_placed(tok):
    made = synthetic_blocks(tok, 128, "test", 12)
    assert len(made.blocks) == 12 and len(made.truths) > 12 and made.blocks.side == "test"
    assert len(made.answers) == sum(len(d.answers) for d in made.truths)
    for p in made.answers:
        answer = made.truths[p.document].answers[p.answer]
        assert tok.decode(made.blocks.tokens[p.block, p.start : p.stop]).strip() == answer.accepted[0]
        assert (made.blocks.documents[p.block, p.start : p.stop] == p.document).all()
    for i, d in enumerate(made.truths):
        assert len(np.unique(np.nonzero(made.blocks.documents == i)[0])) == 1  # whole, in one block
        ids = made.blocks.tokens[made.blocks.documents == i].tolist()
        assert tok.decode([t for t in ids if t > 3]) == d.text
    assert (made.blocks.documents >= 0).any(1).all() and made.blocks.names == tuple(d.name for d in made.truths)
    again = synthetic_blocks(tok, 128, "test", 12)
    assert np.array_equal(again.blocks.tokens, made.blocks.tokens)
    assert not np.array_equal(synthetic_blocks(tok, 128, "test", 12, seed=1).blocks.tokens, made.blocks.tokens)


def test_builtin_blocks_are_a_tenth_synthetic():
    blocks = builtin_blocks(TOK, 256, "test")
    made = np.array([n.startswith("synthetic:test:") for n in blocks.names])
    in_block = made[blocks.documents[:, 0]]
    assert (np.flatnonzero(in_block) == np.arange(9, len(blocks), 10)).all() and in_block.mean() == pytest.approx(0.1, abs=0.002)
    for row in (3, 9):
        assert len(set(made[blocks.documents[row][blocks.documents[row] >= 0]].tolist())) == 1
    corpus = {d.name for d in builtin_documents() if d.side == "test"}
    assert {n for n, m in zip(blocks.names, made, strict=True) if not m} == corpus
    assert set(np.unique(blocks.documents)) == set(range(-1, len(blocks.names)))
    pad = blocks.documents < 0
    assert pad.mean() < 0.02 and np.array_equal(pad, blocks.tokens == 2)
    assert not (blocks.tokens == 3).any() and (blocks.tokens[:, 0] == 0).all() and blocks.tokens.max() < TOK.vocab_size
    taken = blocks.take(slice(2, 5))
    assert np.array_equal(taken.tokens, blocks.tokens[2:5]) and taken.names == blocks.names and len(taken) == 3
