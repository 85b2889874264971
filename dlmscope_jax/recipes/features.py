"""What the report shows of a dictionary's latents: their records, and one of them steered while the model writes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.analysis import collect_records, firing, records_to_result, steer, steered_generation, stratified
from dlmscope_jax.analysis.match import raw, written_site
from dlmscope_jax.diffusion import ARSampler, DreamSampler, LLaDASampler
from dlmscope_jax.training import Progress

from .work import Work

Dictionary = tuple[Any, Any, Any]


def record_features(work: Work, name: str, key: str, dictionary: Dictionary, inputs: dict[str, Any]) -> tuple[dict, bool]:
    """The records of one dictionary's latents as a result, and whether they had to be made now.

    Args:
      name: the language model.
      key: the dictionary's folder below ``dictionaries/``.
      dictionary: ``(spec, params, meta)``.
      inputs: what the records depend on beside the report's configuration.
    """
    run = work.run
    inputs = {**inputs, "latents": run.report.latents}
    found = work.read("features", key, inputs)
    if found is not None:
        return found, False
    store = ActivationStore.open(work.store_url(name, "test"))
    model, params = work.model(name)
    names = None if run.data.stream else work.blocks(name, "test").names
    with Progress(f"records {key}", total=2 * store.rows, unit="rows") as bar:
        counted = firing(dictionary, store, progress=bar.advance)
        records = collect_records(
            model, params, dictionary, store, work.tokenizer(name), latents=stratified(counted, run.report.latents, run.seed).tolist(),
            documents=names, counted=counted, seed=run.seed, progress=bar.advance,
        )  # fmt: skip
    about = {
        "k": getattr(dictionary[0], "k", None), "side": "test", "seed": run.seed, "dead_share": counted.dead_share,
        "selection": "equally many from each tenth of the living latents by density, at random",
        "mask_id": None if model.diffusion is None else model.diffusion.mask_id,
    }  # fmt: skip
    result = records_to_result(records, **about)
    work.write("features", key, inputs, result)
    return result, True


def steer_one(work: Work, name: str, key: str, dictionary: Dictionary, recorded: dict, inputs: dict[str, Any]) -> bool:
    """One generation with and without a latent of ``record_features``' result; whether it had to be made now."""
    wanted = work.run.report
    inputs = {**inputs, **dataclasses.asdict(wanted)}
    if work.read("steered_generation", key, inputs) is not None:
        return False
    record = _to_steer(recorded["records"])
    latent = record["latent"]
    model, params = work.model(name)
    tokenizer = work.tokenizer(name)
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode_plain([wanted.prompt])[0]
    sampler = sampler_for(model, wanted.new_tokens)
    spec, weights, _ = raw(dictionary)
    edit = steer(
        spec, weights, latent, written_site(dictionary, model.config), wanted.strength, scale="corpus_max", maximum=record["max_activation"]
    )
    result = steered_generation(
        model, params, jnp.asarray([ids], jnp.int32), sampler, edit, dictionary, latent, key=jax.random.key(work.run.seed),
        tokenizer=tokenizer,
    )  # fmt: skip
    work.write("steered_generation", key, inputs, {**result, "prompt": wanted.prompt, "scale": "corpus_max", "sampler": str(sampler)})
    return True


def sampler_for(model: Any, new_tokens: int) -> Any:
    """A sampler without randomness, about a token a step: Dream's where the model predicts the next token, else LLaDA's."""
    if model.diffusion is None:
        return ARSampler(new_tokens)
    if model.diffusion.shift:
        return DreamSampler(steps=new_tokens, max_new_tokens=new_tokens, algorithm="entropy")
    return LLaDASampler(steps=new_tokens, gen_length=new_tokens, block_length=new_tokens)


def _to_steer(records: list[dict]) -> dict:
    """A latent that is neither rare nor everywhere, and strong where it fires: the choice is for show and supports no number."""
    middle = [record for record in records if 3 <= record["decile"] <= 8] or records
    return max(middle, key=lambda record: abs(record["max_activation"]))
