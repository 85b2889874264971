"""The pocket BPE and the wrapper."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dlmscope_jax.data.tokenizer_files as tokenizer_files
from dlmscope_jax.data import encode, load_tokenizer, train_bpe
from dlmscope_jax.data.tokenizer import SPECIALS
from dlmscope_jax.errors import UserError

TOK = load_tokenizer("pocket-dlm")
TEXTS = ["def f(x):\n        return x + 17\n" * 3, "let a=3. so a is 3.\n" * 4]


def test_the_shipped_tokenizer():
    file = Path(tokenizer_files._POCKET, "tokenizer.json")
    assert TOK.digest == hashlib.sha256(file.read_bytes()).hexdigest() == load_tokenizer("pocket-ar").digest == load_tokenizer(file).digest
    assert (TOK.bos_id, TOK.eos_id, TOK.pad_id, TOK.mask_id, TOK.vocab_size, TOK.padding_side) == (0, 1, 2, 3, 2048, "right")
    assert TOK.pieces(range(4)) == list(SPECIALS)
    [digits] = TOK.encode(["2026"])
    assert TOK.pieces(digits) == ["2", "0", "2", "6"] and not any(
        len(p.strip()) > 1 and any(map(str.isdigit, p)) for p in TOK.pieces(range(2048))
    )
    assert TOK.pieces(TOK.encode(["    if x:\n        return 17"])[0]) == ["   ", " if", " x", ":", "\n       ", " return", " ", "1", "7"]
    # the words of the synthetic documents are single tokens
    assert all(len(ids) == 1 for ids in TOK.encode([" fox", " owl", " red", " gray", "fox", "from"]))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_text_survives(text):
    [ids] = TOK.encode_plain([text])
    assert TOK.decode(ids) == text
    assert not set(ids) & {0, 1, 2, 3}


def test_pieces_and_offsets_spell_the_text():
    text = "class A: # grüße\n\tx = 'día' + str(12)"
    [ids] = TOK.encode([text])
    line = "let a=3."
    assert [line[a:b] for a, b in TOK.offsets(line)] == TOK.pieces(TOK.encode([line])[0]) == ["let", " a", "=", "3", "."]
    assert TOK.pieces([*TOK.encode(["ab"])[0], 2048, 99999])[-2:] == ["<unused 2048>", "<unused 99999>"]
    assert TOK.decode(ids) == text and "\ufffd" not in TOK.decode(ids)
    assert "".join(TOK.pieces(TOK.encode(["plain ascii\n  text 42"])[0])) == "plain ascii\n  text 42"
    assert TOK.decode([3, *TOK.encode([" x"])[0], 3]) == "<|mask|> x<|mask|>"


def test_encode_pads_on_the_familys_side():
    tokens, mask = encode(TOK, ["a b c", "a"])
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (2, 4)
    assert tokens[:, 0].tolist() == [0, 0] and tokens[1, 2:].tolist() == [2, 2] and mask[1].tolist() == [True, True, False, False]
    left, left_mask = encode(replace(TOK, padding_side="left", pad_id=None), ["a b c", "a"])
    assert left[1].tolist() == [1, 1, *tokens[1, :2]] and left_mask[1].tolist() == [False, False, True, True]
    assert encode(TOK, [])[0].shape == (0, 0)
    with pytest.raises(UserError, match="takes a list of texts"):
        encode(TOK, "one text")


def test_training_is_deterministic_and_has_the_specials_first(tmp_path):
    one, two = train_bpe(TEXTS, 300), train_bpe(iter(TEXTS), 300)
    assert one.digest == two.digest != train_bpe(TEXTS[:1], 300).digest
    assert [one.backend.token_to_id(s) for s in SPECIALS] == [0, 1, 2, 3] and one.vocab_size <= 300
    one.backend.save(str(tmp_path / "tokenizer.json"), pretty=True)
    read = load_tokenizer(tmp_path)
    assert read.digest == one.digest and read.encode(TEXTS) == one.encode(TEXTS) and read.mask_id == 3
    with pytest.raises(UserError, match="vocab_size is 100: a byte-level vocabulary has at least 260 entries"):
        train_bpe(TEXTS, 100)
