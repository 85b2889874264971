#!/usr/bin/env python
"""Our readers and writers of dictionary files against the libraries whose formats they are, both ways.

Random dictionaries of every kind are written here and computed there, and written there (by the library's own saving) and
computed here; what is compared is every activation and every output on the same rows. Prints the largest difference of each
case and fails above 1e-5 of the largest value.

    .venv/bin/python scripts/check_formats.py [saelens] [sparsify] [dictionary_learning]

Makes an environment of its own, .venv-peers (scripts/peers.py).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
from peers import python_of_peers

FORMATS = ("saelens", "sparsify", "dictionary_learning")
D, N, K, OUT = 16, 96, 6, 8
TOLERANCE = 1e-5


# --- ours, in this package's environment


def our_specs(format: str) -> list:
    """What is written here in a format."""
    from dlmscope_jax.dictionaries import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK

    if format == "sparsify":
        plain = [TopK(D, N, K), TopK(D, N, K, subtract=False), TopK(D, N, K, rule="groups"), TopK(D, N, K, multi_topk=True)]
        return plain + [TopK(D, N, K, d_out=D, skip=skip, input_bias=bias) for skip in (False, True) for bias in (False, True)]
    shared = [kind(D, N, subtract=subtract) for kind in (ReLU, JumpReLU, Gated) for subtract in (True, False)]
    shared += [kind(D, N, K, subtract=subtract) for kind in (TopK, BatchTopK, Matryoshka) for subtract in (True, False)]
    if format == "dictionary_learning":
        return [*shared, ReLU(D, N, norm_weighted=True)]
    shared += [TopK(D, N, K, rule="magnitude"), TopK(D, N, K, row_norm="layer_norm"), Gated(D, N, row_norm="unit_rms")]
    wide = [kind(D, N, d_out=OUT, skip=skip, input_bias=skip) for kind in (ReLU, JumpReLU) for skip in (False, True)]
    return shared + wide + [BatchTopK(D, N, K, d_out=OUT), Matryoshka(D, N, K, d_out=OUT, skip=True)]


def write_ours(folder: Path, formats: list[str]) -> None:
    """``ours/FORMAT/i`` in the format, and ``expected.npz`` beside it."""
    import jax.numpy as jnp

    from dlmscope_jax.dictionaries import DictionaryMeta, save_dictionary

    x = jnp.asarray(np.load(folder / "x.npy"))
    meta = DictionaryMeta(model="gpt2", site="resid_post@3", layer=3)
    for format in formats:
        for i, spec in enumerate(our_specs(format)):
            rng = np.random.default_rng(i)
            params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in spec.shapes().items()}
            params |= {"threshold": jnp.abs(params["threshold"])} if "threshold" in params else {}
            at = folder / "ours" / format / str(i)
            save_dictionary(at, spec, params, meta, format=format)
            codes = spec.encode(params, x)
            options = [f"{f.name}={getattr(spec, f.name)}" for f in fields(spec) if f.default not in (MISSING, getattr(spec, f.name))]
            (at / "label.txt").write_text(" ".join([spec.KIND, *options]))
            np.savez(at / "expected.npz", acts=spec.dense(codes), y=spec.decode(params, codes, x=x))


def read_theirs(folder: Path) -> None:
    """``got.npz`` beside everything that the libraries wrote."""
    import jax.numpy as jnp

    from dlmscope_jax.dictionaries import load_dictionary

    x = jnp.asarray(np.load(folder / "x.npy"))
    for expected in sorted((folder / "theirs").rglob("expected.npz")):
        spec, params, _ = load_dictionary(expected.parent)
        codes = spec.encode(params, x)
        np.savez(expected.with_name("got.npz"), acts=spec.dense(codes), y=spec.decode(params, codes, x=x))


def compare(folder: Path) -> bool:
    """Prints one line a case; whether all agree."""
    good, worst = True, {}
    for expected in sorted((*folder.rglob("ours/**/expected.npz"), *folder.rglob("theirs/**/expected.npz"))):
        side, format = expected.relative_to(folder).parts[:2]
        want, got = np.load(expected), np.load(expected.with_name("got.npz"))
        found = []
        for name in ("acts", "y"):
            scale = np.abs(want[name]).max()
            gap = np.abs(got[name] - want[name]).max() / scale if got[name].shape == want[name].shape else np.inf
            good &= bool(gap <= TOLERANCE and scale > 0 and (want["acts"] == 0).any())
            found.append(gap)
        direction = "written here, computed there" if side == "ours" else "written there, computed here"
        label = expected.with_name("label.txt").read_text()
        print(f"{format:20} {direction:30} {label:55} activations {found[0]:.1e}  outputs {found[1]:.1e}")
        key = (format, direction)
        worst[key] = np.maximum(worst.get(key, 0), found)
    print()
    for (format, direction), gaps in worst.items():
        print(f"{format:20} {direction:30} largest: activations {gaps[0]:.1e}  outputs {gaps[1]:.1e}")
    print("all agree" if good else f"FAILED: above {TOLERANCE:g} of the largest value")
    return good


# --- the libraries, in their own environment


def peer(folder: Path, formats: list[str]) -> None:
    """Computes what was written here and writes dictionaries of each library's own."""
    import torch

    torch.manual_seed(0)
    x = torch.tensor(np.load(folder / "x.npy"))
    module = {"saelens": PeerSAELens, "sparsify": PeerSparsify, "dictionary_learning": PeerLearning}
    for format in formats:
        side = module[format](folder / "theirs" / format, x)
        for at in sorted((folder / "ours" / format).iterdir()):
            with torch.no_grad():
                acts, y = side.compute(at)
            np.savez(at / "got.npz", acts=acts.numpy(), y=y.numpy())
        with torch.no_grad():
            side.write()


def randomise(module) -> None:
    """Random numbers in every parameter; thresholds positive."""
    for name, parameter in module.named_parameters():
        parameter.data.normal_()
        if "threshold" in name:
            parameter.data.abs_()


class Peer:
    """One library: how it computes a folder, and what it writes itself."""

    def __init__(self, folder: Path, x):
        self.folder, self.x, self.count = folder, x, 0

    def place(self, label: str, inner: str = ".") -> Path:
        """A new folder for a case."""
        at = self.folder / f"{self.count:02d}" / inner
        at.mkdir(parents=True)
        (at / "label.txt").write_text(label)
        self.count += 1
        return at

    def expect(self, at: Path, acts, y) -> None:
        np.savez(at / "expected.npz", acts=acts.numpy(), y=y.numpy())


class PeerSAELens(Peer):
    def compute(self, at: Path):
        from sae_lens import SAE

        sae = SAE.load_from_disk(at, device="cpu")
        return sae.encode(self.x), sae(self.x)

    def write(self) -> None:
        from sae_lens import SAE
        from sae_lens.registry import get_sae_class, get_sae_training_class
        from sae_lens.saes.sae import SAEMetadata
        from sae_lens.training.activation_scaler import ActivationScaler

        shared = {"d_in": D, "d_sae": N}
        cases = [("standard", {}), ("standard", {"normalize_activations": "layer_norm"}), ("jumprelu", {"apply_b_dec_to_input": False})]
        cases += [("topk", {"k": K}), ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}), ("abstopk", {"k": K}), ("jumprelu", {})]
        cases += [("gated", {"normalize_activations": "constant_norm_rescale"}), ("gated", {"apply_b_dec_to_input": False})]
        kinds = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
        cases += [(kind, {"d_out": OUT, "apply_b_dec_to_input": False}) for kind in kinds]
        for kind, options in cases:
            make, configuration = get_sae_class(kind)
            metadata = SAEMetadata(model_name="gpt2", hook_name="blocks.3.hook_resid_post")
            sae = make(configuration(**shared, **options, metadata=metadata))
            randomise(sae)
            at = self.place(f"{kind} {' '.join(str(v) for v in options.values())}")
            sae.save_model(at)
            self.expect(at, *self.compute(at))
        for kind in ("topk", "batchtopk", "matryoshka_batchtopk", "jumprelu"):
            for scale in (None, 0.3):
                options = {} if kind == "jumprelu" else {"k": K}
                options |= {"matryoshka_widths": [N // 4, N]} if kind.startswith("matryoshka") else {}
                make, configuration = get_sae_training_class(kind)
                norm = "expected_average_only_in" if scale else "none"
                sae = make(configuration(**shared, **options, normalize_activations=norm))
                randomise(sae)
                if hasattr(sae, "topk_threshold"):
                    sae.topk_threshold.fill_(5.0)
                at = self.place(f"{kind} checkpoint{f' scaled by {scale}' if scale else ''}")
                sae.save_model(at)
                if scale:
                    ActivationScaler(scale).save(str(at / "activation_scaler.json"))
                    sae.fold_activation_norm_scaling_factor(scale)
                export = self.place(f"{kind} exported{f' scaled by {scale}' if scale else ''}")
                if sae.cfg.to_dict().get("rescale_acts_by_decoder_norm"):  # as its own runner exports it
                    sae.fold_W_dec_norm()
                sae.save_inference_model(export)
                computed = SAE.load_from_disk(export, device="cpu")
                for where in (at, export):
                    self.expect(where, computed.encode(self.x), computed(self.x))


class PeerSparsify(Peer):
    def compute(self, at: Path):
        import torch
        from sparsify import SparseCoder

        coder = SparseCoder.load_from_disk(at)
        found = coder.encode(self.x)
        dense = torch.zeros(len(self.x), coder.num_latents).scatter(1, found.top_indices, found.top_acts)
        return dense, coder(self.x).sae_out

    def write(self) -> None:
        from sparsify import SparseCoder
        from sparsify.config import SparseCoderConfig

        for activation in ("topk", "groupmax"):
            for transcode in (False, True):
                for skip in (False, True):
                    for width in ({"num_latents": N}, {"num_latents": 0, "expansion_factor": N // D}):
                        options = {"activation": activation, "transcode": transcode, "skip_connection": skip}
                        coder = SparseCoder(D, SparseCoderConfig(k=K, **options, **width))
                        randomise(coder)
                        words = [activation, "transcode" * transcode, "skip" * skip, "factor" * (not width["num_latents"])]
                        at = self.place(" ".join(word for word in words if word), "layers.3.mlp")
                        coder.save_to_disk(at)
                        self.expect(at, *self.compute(at))


class PeerLearning(Peer):
    def __init__(self, folder: Path, x):
        super().__init__(folder, x)
        # the package's own __init__ wants language models; its dictionaries do not
        package = types.ModuleType("dictionary_learning")
        package.__path__ = list(importlib.util.find_spec("dictionary_learning").submodule_search_locations)
        sys.modules["dictionary_learning"] = package
        from dictionary_learning import dictionary
        from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

        places = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
        names = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder")
        names += ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
        self.classes = {name: next(getattr(place, name) for place in places if hasattr(place, name)) for name in names}

    def compute(self, at: Path):
        trainer = json.loads((at / "config.json").read_text())["trainer"]
        options = {"normalize_decoder": False} if trainer["dict_class"] == "AutoEncoder" else {}
        options |= {"k": trainer["k"]} if "k" in trainer else {}
        loaded = self.classes[trainer["dict_class"]].from_pretrained(str(at / "ae.pt"), **options)
        acts = loaded.encode(self.x)
        return acts, loaded.decode(acts)

    def write(self) -> None:
        import torch

        for name, make in self.classes.items():
            selects = name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
            for threshold in (4.0, -1.0) if selects else (None,):
                options = {"k": K} if selects else {}
                options |= {"group_sizes": [N // 4, N // 4, N // 2]} if name.startswith("Matryoshka") else {}
                dictionary = make(D, N, **options)
                randomise(dictionary)
                if threshold is not None:
                    dictionary.threshold.fill_(threshold)
                at = self.place(name + (f" threshold {threshold:g}" if selects else ""))
                torch.save(dictionary.state_dict(), at / "ae.pt")
                trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": 3, "lm_name": "gpt2"}
                (at / "config.json").write_text(json.dumps({"trainer": trainer | ({"k": K} if selects else {}), "buffer": {}}))
                self.expect(at, *self.compute(at))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=list(FORMATS), help=f"which of {', '.join(FORMATS)}; all")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if wrong := [name for name in given.formats if name not in FORMATS]:
        parser.error(f"{wrong[0]!r} is not one of {', '.join(FORMATS)}")
    if given.peer:
        return peer(given.peer, given.formats)
    python = python_of_peers()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(32, D)).astype(np.float32))
        write_ours(folder, given.formats)
        subprocess.run([python, Path(__file__), "--peer", folder, *given.formats], check=True)
        read_theirs(folder)
        sys.exit(not compare(folder))


if __name__ == "__main__":
    main()
