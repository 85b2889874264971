"""What is kept of one latent: a small versioned record that the report, look-ups and exports read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of one block around a row where the latent fires; token ids are kept, so nothing is tokenised again.

    Attributes:
      group: ``"top"`` (largest activations) or ``"sampled"`` (one of ten equal-count groups of the rows where it fires).
      document: name of the document of the peak row.
      position: position of the peak row in its block.
      rate: corruption rate of the block, None in a store that knows none.
      tokens: what the model read.
      original: what stood there; differs from ``tokens`` where it is masked.
      is_masked: 1 where the model read the mask.
      activations: the latent at each of these positions, 0 where it does not fire.
      peak: index of the row that the window is about.
      decile: of a sampled window, 0 (weakest) to 9.
    """

    group: str
    document: str
    position: int
    rate: float | None
    tokens: tuple[int, ...]
    original: tuple[int, ...]
    is_masked: tuple[int, ...]
    activations: tuple[float, ...]
    peak: int
    decile: int | None = None


@dataclasses.dataclass(frozen=True)
class FeatureRecord:
    """One latent as it showed itself on test rows of its own kind.

    Attributes:
      model, site, latent: which latent of which dictionary.
      select: the kind of rows that density, activations and windows are over (what the dictionary was trained on).
      rows: how many such rows were read.
      density: share of them where it fires.
      density_masked, density_visible: the same over all masked and all visible rows; None where there are none.
      density_by_rate: bins of the corruption rate, ``{low, high, rows, density}``; empty for clean text.
      decile: which tenth of the living latents it belongs to by density, 0 the rarest.
      max_activation, mean_activation: the largest, and the mean where it fires.
      windows: top ones first, then sampled ones.
      logit_lens: ``{"top": [[token, value], ...], "bottom": ...}``, the decoder row through the last norm's weight and the output head; the
        direct effect only. Empty for sites outside of the residual stream's width.
      enriched: ``[[token, z, count], ...]``, original tokens that stand where it fires more often than elsewhere (log-odds with an
        informative Dirichlet prior, Monroe et al. 2008). A statistic, not an explanation.
      neighbours: ``[[latent, cosine], ...]`` by decoder rows.
      pieces: text of every token id above.
      description: words about it, by whoever gives some; None here.
      version: of this layout.
    """

    model: str
    site: str
    latent: int
    select: str
    rows: int
    density: float
    density_masked: float | None
    density_visible: float | None
    density_by_rate: tuple[dict[str, Any], ...]
    decile: int
    max_activation: float
    mean_activation: float
    windows: tuple[Window, ...]
    logit_lens: dict[str, list[list[float]]]
    enriched: tuple[tuple[int, float, int], ...]
    neighbours: tuple[tuple[int, float], ...] = ()
    pieces: dict[int, str] = dataclasses.field(default_factory=dict)
    description: str | None = None
    version: int = VERSION


def records_to_result(records: list[FeatureRecord], **about: Any) -> dict:
    """The records of one dictionary as one result for ``json``: what the report reads.

    The texts of tokens are put together into one table, ``pieces``.

    Args:
      records: of one dictionary.
      about: what else to say (``dead_share``, ``side``, ``seed``, ``selection``, ``mask_id``, ...).

    Raises:
      UserError: when the records are of several dictionaries.
    """
    owners = {(record.model, record.site) for record in records}
    if len(owners) > 1:
        raise UserError(f"records of several dictionaries cannot be one result: {', '.join(f'{m} {s}' for m, s in sorted(owners))}")
    pieces: dict[str, str] = {}
    rows = []
    for record in records:
        pieces |= {str(token): text for token, text in record.pieces.items()}
        row = dataclasses.asdict(record)
        del row["pieces"]
        rows.append(row)
    first = {key: rows[0][key] for key in ("model", "site", "select", "rows")} if rows else {}
    whole = {"kind": "features", "version": VERSION, **first, **about, "pieces": pieces, "records": rows}
    return json.loads(json.dumps(whole, allow_nan=False))  # so that tuples are lists: what is returned is what is read back


def records_from_result(result: dict) -> list[FeatureRecord]:
    """The inverse of ``records_to_result``.

    Raises:
      UserError: for another kind of result, another version, or keys that a record does not have.
    """
    if result.get("kind") != "features" or result.get("version") != VERSION:
        given = f"{result.get('kind')!r} version {result.get('version')!r}"
        raise UserError(f"this is {given}; feature records are 'features' version {VERSION}")
    pieces = {int(token): text for token, text in result.get("pieces", {}).items()}
    records = []
    for row in result.get("records", ()):
        try:
            windows = tuple(_window(w) for w in row["windows"])
            used = {t for w in windows for t in (*w.tokens, *w.original)}
            used |= {int(t) for side in row["logit_lens"].values() for t, _ in side} | {int(e[0]) for e in row["enriched"]}
            lists = {name: tuple(map(tuple, row[name])) for name in ("enriched", "neighbours")}
            fields: dict[str, Any] = {**row, **lists, "windows": windows, "density_by_rate": tuple(row["density_by_rate"])}
            records.append(FeatureRecord(**fields, pieces={t: pieces[t] for t in sorted(used) if t in pieces}))
        except (KeyError, TypeError) as error:
            raise UserError(f"latent {row.get('latent')}: not a feature record of version {VERSION} ({error})") from None
    return records


def _window(row: dict[str, Any]) -> Window:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Window(**fields)


def read_records(path: str | Path) -> list[FeatureRecord]:
    """Records from a ``results/*.json`` file of a run.

    Raises:
      UserError: when the file is missing or holds something else.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; feature records are in a run's results folder") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return records_from_result(result)
