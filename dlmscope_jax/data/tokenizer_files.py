"""Tokenizers from files: ``tokenizer.json``, Qwen2's or GPT-2's vocabulary and merges, or whatever ``transformers`` can open."""

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_POCKET = Path(__file__).parents[1] / "pocket"

_WANTED = "give a pocket name, a tokenizer.json, a folder that has one (or vocab.json + merges.txt), its URL, or a hub id"

_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
_FILES += ["tokenizer_config.json", "config.json", "tokenizer.model", "vocab.txt"]

# The split that the Qwen2 family trained with (transformers, models/qwen2/tokenization_qwen2.py).
_QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Tokens that a family uses without naming them in its settings: Dream's BOS (training put it at position 0), the masks of
# Dream, LLaDA and iLLaDA, and the pocket models' own.
_UNNAMED = {
    "bos": ("<|bos|>", "<|beginoftext|>"),
    "eos": ("<|eos|>",),
    "pad": ("<|pad|>",),
    "mask": ("<|mask|>", "<|mdm_mask|>", "<[MASK]>"),
}

# Mask tokens that a family's released files may leave out, both in the tokenizer and in config.json, by model type; the readers
# in models/families say the same. MDLM's is the row after GPT-2's tokens, DiffuGPT's depends on the width.
_MASK = {"llada": 126336, "illada": 5, "sdar": 151669, "fast_dllm_qwen": 151665, "a2d-qwen2": 151665, "a2d-qwen3": 151669}
_DIFFUGPT_MASK = {768: 10541, 1024: 50257}


def load_tokenizer(name: str | Path) -> Tokenizer:
    """A tokenizer from a pocket name (``pocket-dlm`` ...), a ``tokenizer.json``, a folder, its URL or, when it is none of these, a hub id.

    ``tokenizer.json`` is read with ``tokenizers`` alone, ``vocab.json`` + ``merges.txt`` of the Qwen2 and GPT-2 families are
    assembled (Dream ships no more than that), anything else goes to ``transformers``' ``AutoTokenizer`` with
    ``trust_remote_code=False``. Special ids come from the tokenizer's settings, then from names that only one family uses, then
    from ``config.json``, then from what is known of its model type. Only a URL (``gs://``, ``s3://``) and a hub id use the
    network. Raises ``UserError`` where nothing fits.
    """
    if "://" in str(name):
        return _from_bucket(str(name).rstrip("/"))
    path = Path(name)
    if path.is_file():
        return _from_folder(path.parent, path)
    if path.is_dir():
        return _from_folder(path, path / "tokenizer.json")
    if str(name).startswith("pocket"):
        folder = _POCKET / str(name)
        folder = folder if (folder / "tokenizer.json").is_file() else _POCKET  # one tokenizer serves all pocket models
        return _from_folder(folder, folder / "tokenizer.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
        raise UserError(f"{name} does not exist: {_WANTED}")
    folder = _download(str(name))
    return _from_folder(folder, folder / "tokenizer.json")


def _from_folder(folder: Path, file: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    settings = _json(folder / "tokenizer_config.json")
    config = _json(folder / "config.json")
    if file.is_file():
        raw = file.read_bytes()
        try:
            backend = Backend.from_str(raw.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file} is not a readable tokenizer.json: {error}") from None
        backend.no_padding()  # the file may carry the padding and truncation of its last training run
        backend.no_truncation()
        digest = hashlib.sha256(raw).hexdigest()
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and (kind := _bpe_kind(settings, config)):
        backend = _from_vocab(folder, kind, settings, config)
        digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    else:
        return _from_transformers(folder, settings, config)
    ids, side = _specials(folder, settings, config, backend.token_to_id)
    return Tokenizer(backend, backend.get_vocab_size(), **ids, padding_side=side, digest=digest)


def _bpe_kind(settings: dict[str, Any], config: dict[str, Any]) -> Literal["qwen", "gpt2"] | None:
    """Which split goes with a bare vocabulary; None where nothing says so (RoBERTa and others ship the same two file names)."""
    said = f"{settings.get('tokenizer_class', '')} {config.get('model_type', '')}".lower()
    return "qwen" if re.search("qwen|dream", said) else "gpt2" if "gpt2" in said else None


def _from_vocab(folder: Path, kind: Literal["qwen", "gpt2"], settings: dict[str, Any], config: dict[str, Any]) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = _json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line.strip() and not line.startswith("#version"))]
    added = {token: int(i) for token, i in _json(folder / "added_tokens.json").items()}
    decoder = settings.get("added_tokens_decoder") or {}
    added |= {entry["content"]: int(i) for i, entry in decoder.items()}
    mask = config.get("mask_token_id")
    if str(config.get("model_type", "")).lower() == "dream" and isinstance(mask, int):
        taken = {*added.values(), *vocab.values()}
        added |= {token: i for token, i in (("<|beginoftext|>", mask - 1), ("<|mask|>", mask)) if token not in added and i not in taken}
    # Added tokens stand in the vocabulary, so that each keeps its id whatever gaps there are before it.
    try:
        backend = Backend(models.BPE(vocab={**vocab, **added}, merges=merges, fuse_unk=False))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{folder}: vocab.json and merges.txt do not fit together: {error}") from None
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = {entry["content"] for entry in decoder.values() if not entry.get("special", True)}
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in sorted(added, key=added.__getitem__) if t not in plain])
    backend.add_tokens([AddedToken(t, normalized=False) for t in sorted(plain)])
    return backend


def _from_transformers(folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> Tokenizer:
    if not any(folder.glob("*token*")) and not any(folder.glob("*vocab*")) and not any(folder.glob("*.model")):
        if _diffusion(config)[0] == "mdlm":
            raise UserError(f"{folder} holds no tokenizer: MDLM's is GPT-2's, put the tokenizer.json of openai-community/gpt2 there")
        raise UserError(f"{folder} holds no tokenizer: {_WANTED}")
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # whatever goes wrong in there is a matter of the files
        raise UserError(f"transformers cannot open the tokenizer in {folder} without remote code: {_first_line(error)}") from None
    backend = getattr(theirs, "backend_tokenizer", None) or theirs
    words = json.dumps(sorted(theirs.get_vocab().items(), key=lambda item: item[1]))
    content = backend.to_str() if hasattr(backend, "to_str") else words

    def token_to_id(token: str) -> int | None:
        return theirs.get_vocab().get(token)

    named = {f"{kind}_token": getattr(theirs, f"{kind}_token", None) for kind in _UNNAMED}
    ids, side = _specials(folder, {**settings, **{k: v for k, v in named.items() if v}}, config, token_to_id)
    return Tokenizer(backend, len(theirs), **ids, padding_side=side, digest=hashlib.sha256(content.encode()).hexdigest())


def _specials(
    folder: Path, settings: dict[str, Any], config: dict[str, Any], token_to_id: Any
) -> tuple[dict[str, int | None], Literal["left", "right"]]:
    named = {**_json(folder / "special_tokens_map.json"), **{k: v for k, v in settings.items() if v is not None}}
    ids: dict[str, int | None] = {}
    for kind, unnamed in _UNNAMED.items():
        token = named.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        candidates = ([token] if isinstance(token, str) else []) + list(unnamed)
        found = next((i for t in candidates if (i := token_to_id(t)) is not None), None)
        # Qwen's config.json names a BOS that its tokenizer says it does not have; settings that are silent on BOS settle it.
        if found is None and not (kind == "bos" and settings):
            value = config.get(f"{kind}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            found = value if isinstance(value, int) else None
        ids[f"{kind}_id"] = found
    model_type, known_mask = _diffusion(config)
    if ids["mask_id"] is None:
        ids["mask_id"] = known_mask
    # the samplers of diffusion models expect prompts that end together
    side = settings.get("padding_side") or ("left" if model_type else "right")
    if side not in ("left", "right"):
        raise UserError(f"{folder / 'tokenizer_config.json'}: padding_side is {side!r}, it must be 'left' or 'right'")
    return ids, "left" if side == "left" else "right"


def _from_bucket(url: str) -> Tokenizer:
    """The tokenizer in a folder that is a URL: its few small files are copied here for as long as they are read."""
    import tensorstore as ts

    with tempfile.TemporaryDirectory() as folder:
        try:
            store = ts.KvStore.open(url + "/").result()
            for name in _FILES:
                if (found := store.read(name).result()).state == "value":
                    (Path(folder) / name).write_bytes(found.value)
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise UserError(f"{url} cannot be read: {' '.join(str(error).split())[:300]}") from error
        try:
            return _from_folder(Path(folder), Path(folder) / "tokenizer.json")
        except UserError as error:
            raise UserError(str(error).replace(folder, url)) from None


def _diffusion(config: dict[str, Any]) -> tuple[str | None, int | None]:
    """The model type of a diffusion model's ``config.json``, None for any other, and the mask token that no file need say."""
    model_type = str(config.get("model_type", "")).lower()
    if model_type == "gpt2" and "DiscreteDiffusionModel" in (config.get("architectures") or []):
        return "diffugpt", _DIFFUGPT_MASK.get(config.get("n_embd"))
    if model_type == "mdlm":
        return "mdlm", config["vocab_size"] - 1 if isinstance(config.get("vocab_size"), int) else None
    return (model_type, _MASK.get(model_type)) if model_type in _MASK or model_type == "dream" else (None, None)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*_FILES, "*.model"]))
    except Exception as error:  # no network, no such repository, no permission
        raise UserError(f"{name} is no folder here and the hub does not give it ({_first_line(error)}): {_WANTED}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}: it should be a JSON object")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
