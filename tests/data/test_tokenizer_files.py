"""Foreign tokenizers: each family's files against transformers' own class, special ids, and errors."""

import json
from pathlib import Path

import pytest

from dlmscope_jax.data import Tokenizer, encode, load_tokenizer, train_bpe
from dlmscope_jax.errors import UserError

TEXT = "It's 2026:\r\n\r\n    def naïve_é(x):\n\treturn x+17  # don't\n"
TEXTS = [TEXT, TEXT.lower(), "  ", "", "a\n\n\nb   c", "e\u0301 decomposed"]


def put(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained() -> dict:
    """A small vocabulary without special tokens, and its merges."""
    model = json.loads(train_bpe([TEXT * 3, "the return of the definition " * 5], 330).backend.to_str())["model"]
    vocab = {t: i - 4 for t, i in model["vocab"].items() if i >= 4}
    return {"vocab": vocab, "merges": [tuple(m) for m in model["merges"]]}


def vocab_files(trained: dict) -> dict[str, object]:
    return {"vocab_json": trained["vocab"], "merges_txt": "#version: 0.2\n" + "\n".join(" ".join(m) for m in trained["merges"]) + "\n"}


def ids(tok: Tokenizer) -> tuple:
    return tok.bos_id, tok.eos_id, tok.pad_id, tok.mask_id


def test_qwen_vocabulary_and_merges_agree_with_transformers(tmp_path, trained):
    from transformers import Qwen2Tokenizer

    n = len(trained["vocab"])
    added = {"<|endoftext|>": n, "<|im_start|>": n + 1, "<|im_end|>": n + 2}
    folder = put(tmp_path / "qwen", **vocab_files(trained), added__tokens_json=added,
                 config_json={"model_type": "qwen2", "bos_token_id": n, "eos_token_id": n},
                 tokenizer__config_json={"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|endoftext|>",
                                         "pad_token": "<|endoftext|>"})  # fmt: skip
    rename(folder)
    tok = load_tokenizer(folder)
    theirs = Qwen2Tokenizer(vocab=trained["vocab"], merges=trained["merges"])
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    texts = [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n"]
    assert tok.encode(texts) == [theirs(t)["input_ids"] for t in texts]
    assert [tok.decode(i) for i in tok.encode(texts)] == [theirs.decode(theirs(t)["input_ids"]) for t in texts]
    assert ids(tok) == (None, n, n, None) and tok.padding_side == "right" and tok.vocab_size == n + 3


def rename(folder: Path) -> None:
    """``a__b.json`` -> ``a_b.json``: keyword names cannot tell an underscore from a dot."""
    for file in folder.iterdir():
        file.rename(file.with_name(file.name.replace("__", "_")))


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "config.json alone"])
def test_dream_has_its_two_special_tokens(tmp_path, trained, where):
    n = len(trained["vocab"])
    own = {"<|endoftext|>": n, "<|beginoftext|>": n + 22, "<|mask|>": n + 23}  # a gap lies before them, as in the released files
    config = {"model_type": "Dream", "mask_token_id": n + 23, "bos_token_id": n, "eos_token_id": n, "pad_token_id": n}
    files: dict[str, object] = {**vocab_files(trained), "config_json": config}
    if where == "added_tokens.json":
        files["added__tokens_json"] = own
    elif where == "tokenizer_config.json":
        files["tokenizer__config_json"] = {
            "tokenizer_class": "DreamTokenizer", "mask_token": "<|mask|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in own.items()},
        }  # fmt: skip
    folder = put(tmp_path / "dream", **files)
    rename(folder)
    tok = load_tokenizer(folder)
    assert ids(tok) == (n + 22, n, n, n + 23) and tok.padding_side == "left"
    assert tok.encode(["<|beginoftext|>a<|mask|>"]) == [[n + 22, trained["vocab"]["a"], n + 23]]
    assert tok.decode([n + 23, trained["vocab"]["a"]]) == "<|mask|>a" and tok.pieces([n + 5]) == [f"<unused {n + 5}>"]
    assert tok.encode(["a"], special=True) == [[trained["vocab"]["a"]]]  # Dream adds no BOS to raw text
    tokens, mask = encode(tok, ["a a a", "a"])
    assert mask[1].tolist() == [False] * (mask.shape[1] - 1) + [True] and tokens[1, 0] == n


def test_gpt2_vocabulary_and_merges_agree_with_transformers(tmp_path, trained):
    from transformers import GPT2Tokenizer

    vocab = {**trained["vocab"], "<|endoftext|>": len(trained["vocab"])}
    folder = put(
        tmp_path / "gpt2", **vocab_files({**trained, "vocab": vocab}), config_json={"model_type": "gpt2", "eos_token_id": len(vocab) - 1}
    )
    tok = load_tokenizer(folder)
    theirs = GPT2Tokenizer(vocab=vocab, merges=trained["merges"])
    assert tok.encode(TEXTS) == [theirs(t)["input_ids"] for t in TEXTS]
    assert tok.eos_id == len(vocab) - 1


def test_ids_of_a_tokenizer_json(tmp_path):
    backend = train_bpe([TEXT], 300).backend
    text = backend.to_str().replace("<|bos|>", "<|startoftext|>").replace("<|eos|>", "<|endoftext|>")
    llada = put(
        tmp_path / "llada",
        tokenizer_json=text.replace("<|pad|>", "[CLS]").replace("<|mask|>", "[gMASK]"),
        config_json={"model_type": "llada", "mask_token_id": 336, "eos_token_id": 1, "pad_token_id": 1},
        tokenizer__config_json={"bos_token": {"content": "<|startoftext|>"}, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    )
    rename(llada)  # fmt: skip
    assert ids(load_tokenizer(llada)) == (0, 1, 1, 336)  # the mask comes from config.json alone
    assert load_tokenizer(llada).padding_side == "left"
    put(llada, tokenizer__config_json={"padding_side": "right", "pad_token": None})
    rename(llada)
    assert load_tokenizer(llada).padding_side == "right" and load_tokenizer(llada).pad_id == 1
    plain = put(tmp_path / "plain", tokenizer_json=text, config_json={"model_type": "llama", "bos_token_id": 0, "eos_token_id": [1, 7]})
    assert ids(load_tokenizer(plain)) == (0, 1, 2, 3)


FAMILIES = {
    "llada": ({"model_type": "llada"}, 126336, "left"),
    "illada": ({"model_type": "illada"}, 5, "left"),
    "sdar": ({"model_type": "sdar"}, 151669, "left"),
    "fast_dllm": ({"model_type": "Fast_dLLM_Qwen"}, 151665, "left"),
    "a2d-qwen2": ({"model_type": "a2d-qwen2"}, 151665, "left"),
    "a2d-qwen3": ({"model_type": "a2d-qwen3"}, 151669, "left"),
    "mdlm": ({"model_type": "mdlm", "vocab_size": 50258}, 50257, "left"),
    "diffugpt-s": ({"model_type": "gpt2", "architectures": ["DiscreteDiffusionModel"], "n_embd": 768}, 10541, "left"),
    "diffugpt-m": ({"model_type": "gpt2", "architectures": ["DiscreteDiffusionModel"], "n_embd": 1024}, 50257, "left"),
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768}, None, "right"),
    "llama": ({"model_type": "llama"}, None, "right"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_that_stands_in_no_file(tmp_path, trained, name):
    config, mask, side = FAMILIES[name]
    backend = json.loads(train_bpe([TEXT], 300).backend.to_str())
    model = backend["model"] | {"vocab": trained["vocab"], "merges": [list(m) for m in trained["merges"]]}
    plain = backend | {"added_tokens": [], "post_processor": None, "model": model}
    folder = put(tmp_path / name, tokenizer_json=plain, config_json=config)
    tok = load_tokenizer(folder)
    assert (tok.mask_id, tok.padding_side) == (mask, side)
    put(folder, config_json=config | {"mask_token_id": 7}, tokenizer__config_json={"padding_side": "right"})
    rename(folder)
    assert (load_tokenizer(folder).mask_id, load_tokenizer(folder).padding_side) == (7, "right")  # files that say it are believed
    tokens, real = encode(load_tokenizer(folder), ["a a", "a"])
    assert real[1].tolist() == [True] + [False] * (real.shape[1] - 1) and tokens[1, -1] == 0


def test_the_models_readers_say_the_same_masks():
    """The two rooms do not know each other."""
    from dlmscope_jax.data.tokenizer_files import _DIFFUGPT_MASK, _MASK
    from dlmscope_jax.models.families import a2d, diffugpt, fast_dllm_v2, illada, llada, sdar

    theirs = {"llada": llada, "illada": illada, "sdar": sdar, "fast_dllm_qwen": fast_dllm_v2}
    assert {name: family.MASK_ID for name, family in theirs.items()} | a2d.MASK_ID == _MASK
    assert diffugpt.MASK_ID == _DIFFUGPT_MASK


def test_a_bos_that_the_tokenizer_itself_puts_there(tmp_path):
    """Llama's and Gemma's files do so, GPT-2's and Dream's do not; a corpus gets none either way."""
    made = train_bpe([TEXT], 300)
    made.backend.save(str(tmp_path / "tokenizer.json"))
    put(tmp_path, config_json={"model_type": "llama"})
    tok = load_tokenizer(tmp_path)
    tokens, _ = encode(tok, ["a", "a a"])
    assert tokens[:, 0].tolist() == [tok.bos_id] * 2 and tok.encode_plain(["a"])[0][0] != tok.bos_id


def test_saved_padding_and_truncation_are_dropped(tmp_path):
    tok = train_bpe([TEXT], 300)
    tok.backend.enable_truncation(5)
    tok.backend.enable_padding(length=9)
    tok.backend.save(str(tmp_path / "tokenizer.json"))
    assert [len(r) for r in load_tokenizer(tmp_path).encode(["a", TEXT])] != [9, 9]
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode([TEXT])[0]) == TEXT


def test_other_files_go_to_transformers(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##c hello".split()
    folder = put(tmp_path / "bert", vocab_txt="\n".join(words), config_json={"model_type": "bert"},
                 tokenizer__config_json={"tokenizer_class": "BertTokenizer"})  # fmt: skip
    rename(folder)
    tok = load_tokenizer(folder)
    assert tok.encode(["hello bc a"]) == [[8, 6, 7, 5]] and (tok.pad_id, tok.mask_id, tok.vocab_size) == (0, 4, 9)
    assert tok.encode(["a"], special=True) == [[2, 5, 3]]
    assert len(tok.digest) == 64 and tok.digest == load_tokenizer(folder).digest


def test_remote_code_is_never_run(tmp_path):
    auto = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    folder = put(tmp_path / "evil", tokenization__evil_py="raise SystemExit('ran')", evil__vocab_txt="a",
                 tokenizer__config_json={"tokenizer_class": "EvilTokenizer", "auto_map": auto},
                 config_json={"model_type": "evil"})  # fmt: skip
    rename(folder)
    with pytest.raises(UserError, match="transformers cannot open the tokenizer in .*evil without remote code"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer"),
        ({"config_json": {}}, "holds no tokenizer"),
        ({"config_json": {"model_type": "mdlm"}}, "holds no tokenizer: MDLM's is GPT-2's"),
        ({"tokenizer_json": "{"}, "is not a readable tokenizer.json"),
        ({"tokenizer_json": "OK", "config_json": "{"}, "config.json is not valid JSON"),
        ({"tokenizer_json": "OK", "config_json": "[]"}, "config.json holds a list"),
        ({"tokenizer_json": "OK", "tokenizer__config_json": {"padding_side": "top"}}, "padding_side is 'top'"),
        ({"vocab_json": {"a": 0}, "merges_txt": "a b", "config_json": {"model_type": "qwen2"}}, "do not fit together"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    files = {k: train_bpe([TEXT], 300).backend.to_str() if v == "OK" else v for k, v in files.items()}
    folder = put(tmp_path / "bad", **files)
    rename(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_url_is_a_folder(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##c hello".split()
    bert = put(tmp_path / "bert", vocab_txt="\n".join(words), config_json={"model_type": "bert"},
               tokenizer__config_json={"tokenizer_class": "BertTokenizer"})  # fmt: skip
    rename(bert)
    own = put(tmp_path / "own", tokenizer_json=train_bpe([TEXT], 300).backend.to_str(), config_json={"model_type": "llada"})
    rename(own)
    for folder in (bert, own):
        here, there = load_tokenizer(folder), load_tokenizer(f"file://{folder}/")
        assert ids(here) == ids(there) and (here.digest, here.padding_side) == (there.digest, there.padding_side)
        assert here.encode([TEXT]) == there.encode([TEXT])
    for url, message in [
        (f"file://{tmp_path}/none", f"file://{tmp_path}/none holds no tokenizer"),
        ("ftp://host/x", "ftp://host/x cannot be read"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(url)
        assert "\n" not in str(caught.value)


def test_names_that_are_nothing(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where "../x" is nothing
    for name in ("./nowhere", "/no/such/folder", "a/b/c", "../x"):
        with pytest.raises(UserError, match="does not exist: give a pocket name"):
            load_tokenizer(name)
    import huggingface_hub

    asked = []

    def refuse(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"org/model is no folder here and the hub does not give it \(no network\)"):
        load_tokenizer("org/model")
    assert asked[0][0] == "org/model" and not [p for p in asked[0][1] if p.endswith((".py", ".bin", ".safetensors"))]


def test_a_hub_id_is_read_from_its_files(tmp_path, monkeypatch):
    import huggingface_hub

    made = train_bpe([TEXT], 300)
    made.backend.save(str(tmp_path / "tokenizer.json"), pretty=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert load_tokenizer("org/model").digest == made.digest
