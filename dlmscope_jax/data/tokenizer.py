"""The tokenizer wrapper, batch encoding, and the training of the pocket models' byte-level BPE."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int32

from ..errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>")

# Words keep their leading space, digits stand alone (so that numbers have one spelling), and an indented line start is one
# run of white space that leaves the last space to the word after it.
_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what the models need to know of it.

    The ids are ``None`` where the family has no such token. ``vocab_size`` counts the tokenizer's entries; a model may have more
    rows. ``digest`` is the SHA-256 (hex) of the files it was read from; it is kept with stores and dictionaries, because token ids
    mean nothing without it.
    """

    backend: Any  # a tokenizers.Tokenizer, or a slow transformers tokenizer where nothing else exists
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    mask_id: int | None
    padding_side: Literal["left", "right"]
    digest: str

    @property
    def fast(self) -> bool:
        """Whether the backend is a ``tokenizers.Tokenizer``."""
        return hasattr(self.backend, "encode_batch_fast")

    def encode(self, texts: Iterable[str], special: bool = False) -> list[list[int]]:
        """Ids of each text. A special token that is spelled out in a text (``<|mask|>`` in a prompt) becomes that token.

        ``special=True`` adds the tokens that the family itself puts around a text (often a BOS).
        """
        if self.fast:
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=special)]
        return [self.backend.encode(text, add_special_tokens=special) for text in texts]

    def encode_plain(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text as data: a spelled-out special token is ordinary text, so that no corpus can smuggle in a mask or an EOS."""
        if not self.fast:
            return [self.backend.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
        before = self.backend.encode_special_tokens
        self.backend.encode_special_tokens = True
        try:
            return self.encode(texts)
        finally:
            self.backend.encode_special_tokens = before

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of every token of ``encode([text])[0]``. Raises ``UserError`` for a tokenizer that does not know them."""
        if not self.fast:
            raise UserError("this tokenizer has no character offsets: use a folder that has a tokenizer.json")
        return list(self.backend.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out (a mask must stay visible)."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, for display; bytes that are no whole character show as U+FFFD, rows past the vocabulary as unused."""
        if not self.fast:
            return [self.decode([i]) for i in ids]
        out = []
        for i in (int(i) for i in ids):
            token = self.backend.id_to_token(i)
            if token is None:
                out.append(f"<unused {i}>")
            else:  # sentencepiece decoders drop the leading space of a first token
                out.append(token.replace("▁", " ") if "▁" in token else self.decode([i]))
        return out


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Texts -> ``(tokens [B, T] int32, mask [B, T] bool)``, with the family's own special tokens, padded on the family's side.

    ``mask`` is True at real tokens. Padding is the pad token, or EOS or 0 where there is none. Raises ``UserError`` for one bare text.
    """
    if isinstance(texts, str):
        raise UserError("encode takes a list of texts, got one text: write encode(tok, [text])")
    rows = tokenizer.encode(texts, special=True)
    length = max((len(r) for r in rows), default=0)
    tokens = np.full((len(rows), length), padding_id(tokenizer), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if tokenizer.padding_side == "left" else slice(0, len(row))
        tokens[i, where] = row
        mask[i, where] = True
    return tokens, mask


def padding_id(tokenizer: Tokenizer) -> int:
    """What stands at padding: the pad token, else EOS, else 0."""
    return next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)


def from_backend(backend: "tokenizers.Tokenizer") -> Tokenizer:
    """Wrap a ``tokenizers.Tokenizer`` that has the pocket models' special tokens."""
    digest = hashlib.sha256(backend.to_str(pretty=True).encode()).hexdigest()  # what backend.save writes
    ids = {f"{s[2:-2]}_id": backend.token_to_id(s) for s in SPECIALS}
    return Tokenizer(backend, backend.get_vocab_size(), **ids, padding_side="right", digest=digest)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with specials ``<|bos|>`` 0, ``<|eos|>`` 1, ``<|pad|>`` 2, ``<|mask|>`` 3; the same for the same texts.

    Its post-processor puts ``<|bos|>`` before a text when special tokens are asked for, as every training block begins with it.
    ``.backend.save(path)`` writes its ``tokenizer.json``. Raises ``UserError`` for a vocabulary too small for the 256 bytes.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    smallest = len(SPECIALS) + 256
    if vocab_size < smallest:
        raise UserError(f"vocab_size is {vocab_size}: a byte-level vocabulary has at least {smallest} entries")
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return from_backend(bpe)
