"""Tokenizers: the pocket models' own byte-level BPE, and a thin wrapper over anybody else's."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>")

# Words keep their leading space, digits stand alone (so that numbers have one spelling), and an indented line start is one
# run of white space that leaves the last space to the word after it.
_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_POCKET = Path(__file__).parents[1] / "pocket"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what the models need to know of it.

    The ids are ``None`` where the family has no such token. ``digest`` is the SHA-256 (hex) of the files it was read from; it is
    kept with stores and dictionaries, because token ids mean nothing without it.
    """

    backend: Any  # a tokenizers.Tokenizer, or a slow transformers tokenizer where nothing else exists
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    mask_id: int | None
    padding_side: Literal["left", "right"]
    digest: str

    def encode(self, texts: Iterable[str], special: bool = False) -> list[list[int]]:
        """Ids of each text; ``special=True`` adds the tokens that the family itself puts around a text (often a BOS)."""
        if hasattr(self.backend, "encode_batch_fast"):
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=special)]
        return [self.backend.encode(text, add_special_tokens=special) for text in texts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of every token of ``encode([text])[0]``. Raises ``UserError`` for a tokenizer that does not know them."""
        if not hasattr(self.backend, "encode_batch_fast"):
            raise UserError("this tokenizer has no character offsets: give a folder with a tokenizer.json")
        return list(self.backend.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out (a mask must stay visible)."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, for display; bytes that are no whole character show as U+FFFD."""
        ids = [int(i) for i in ids]
        if not hasattr(self.backend, "id_to_token"):
            return [self.decode([i]) for i in ids]
        out = []
        for i in ids:
            token = self.backend.id_to_token(i)
            if token is None:  # logits reach past the last token of most released models
                out.append(f"<unused {i}>")
            else:  # sentencepiece decoders drop a leading space that belongs to the token
                out.append(token.replace("▁", " ") if "▁" in token else self.decode([i]))
        return out


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> ``(tokens [B, T] int32, mask [B, T] bool)``, padded on the family's side, with the family's own special tokens."""
    if isinstance(texts, str):
        raise UserError("encode takes a list of texts, not one text")
    rows = tokenizer.encode(texts, special=True)
    length = max((len(r) for r in rows), default=0)
    fill = next((i for i in (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) if i is not None), 0)
    tokens = np.full((len(rows), length), fill, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if tokenizer.padding_side == "left" else slice(0, len(row))
        tokens[i, where] = row
        mask[i, where] = True
    return tokens, mask


def load_tokenizer(name: str | Path) -> Tokenizer:
    """A tokenizer from a folder, a ``tokenizer.json``, a pocket name (``pocket-dlm`` ...) or, only when it is none of these, a hub id.

    A ``tokenizer.json`` is read with ``tokenizers`` alone, ``vocab.json`` + ``merges.txt`` as a Qwen2 tokenizer (Dream), anything
    else with ``transformers``' ``AutoTokenizer`` and ``trust_remote_code=False``. Raises ``UserError`` where nothing fits.
    """
    if str(name).startswith("pocket"):
        folder = _POCKET / str(name)
        return _from_folder(folder if (folder / "tokenizer.json").is_file() else _POCKET)
    path = Path(name)
    if path.is_file():
        return _from_folder(path.parent, path)
    if path.is_dir():
        return _from_folder(path)
    return _from_transformers(str(name))


def from_backend(backend: "tokenizers.Tokenizer") -> Tokenizer:
    """Wrap a ``tokenizers.Tokenizer`` that uses the pocket models' special tokens (``train_bpe``)."""
    text = backend.to_str(pretty=True)
    ids = [backend.token_to_id(s) for s in SPECIALS]
    return Tokenizer(backend, backend.get_vocab_size(), *ids, padding_side="right", digest=hashlib.sha256(text.encode()).hexdigest())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with specials ``<|bos|>`` 0, ``<|eos|>`` 1, ``<|pad|>`` 2, ``<|mask|>`` 3; the same for the same texts.

    Its post-processor puts ``<|bos|>`` before a text when special tokens are asked for, as every training block begins with it.
    ``.backend.save(path)`` writes its ``tokenizer.json``.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

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


def _from_folder(folder: Path, file: Path | None = None) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    file = file or folder / "tokenizer.json"
    if file.is_file():
        raw = file.read_bytes()
        try:
            backend = Backend.from_str(raw.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file} is not a readable tokenizer.json: {error}") from None
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _qwen_from_vocab(folder)
        raw = b"".join((folder / f).read_bytes() for f in ("vocab.json", "merges.txt", "added_tokens.json") if (folder / f).is_file())
    else:
        return _from_transformers(str(folder))
    ids, side = _special_ids(folder, backend)
    return Tokenizer(backend, backend.get_vocab_size(), **ids, padding_side=side, digest=hashlib.sha256(raw).hexdigest())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _special_ids(folder: Path, backend: "tokenizers.Tokenizer") -> tuple[dict[str, int | None], Literal["left", "right"]]:
    """The special ids of a folder: the tokenizer's own settings, then names that only one family uses, then ``config.json``."""
    settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    config = _json(folder / "config.json")
    known_settings = (folder / "tokenizer_config.json").is_file()
    ids: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad", "mask"):
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = backend.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            found = next((i for s in (f"<|{kind}|>", *_FAMILY_TOKENS.get(kind, ())) if (i := backend.token_to_id(s)) is not None), None)
        # Qwen's config.json names a BOS that its tokenizer does not have: a config's BOS counts only where there are no settings.
        if found is None and not (kind == "bos" and known_settings):
            value = config.get(f"{kind}_token_id")
            found = value[0] if isinstance(value, list) and value else value
        ids[f"{kind}_id"] = found if isinstance(found, int) else None
    side = settings.get("padding_side") or ("left" if str(config.get("model_type", "")).lower() in ("llada", "dream") else "right")
    return ids, side


# Dream's BOS and mask are plain added tokens; training put the first at position 0.
_FAMILY_TOKENS = {"bos": ("<|beginoftext|>",), "mask": ("<|mask|>", "<|mdm_mask|>", "<[MASK]>")}


def _qwen_from_vocab(folder: Path) -> "tokenizers.Tokenizer":
    raise NotImplementedError


def _from_transformers(name: str) -> Tokenizer:
    raise NotImplementedError
