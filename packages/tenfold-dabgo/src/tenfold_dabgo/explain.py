"""One training sample and one query: which of the sample's tokens carry its score?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tenfold.errors import ConfigError, nearest
from tenfold.lm.tokenizer import token_pieces
from tenfold.report import Badges, Block, Heading, Preformatted, TokenHeat

from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.describe import number
from tenfold_dabgo.queries import Query


@dataclass(frozen=True)
class Explanation:
    """Token scores of one sample for one query; `values[t]` is None without a loss."""

    query_id: str
    query_text: str
    sample_id: str
    pieces: list[str]
    values: list[float | None]
    score: float
    metadata: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary; the sign convention goes with it."""
        return {
            "query": self.query_id,
            "completion": self.query_text,
            "sample": self.sample_id,
            "score": number(self.score),
            "unit": "nats/token",
            "sign": "positive: supports the query (proponent); negative: opposes it",
            "tokens": self.pieces,
            "token_scores": self.values,
            "metadata": dict(self.metadata),
        }

    def blocks(self) -> list[Block]:
        """As blocks of a report."""
        return [
            Badges({"query": self.query_id, "sample": self.sample_id, "score": self.score}),
            Heading("Generated text"),
            Preformatted(self.query_text),
            Heading("Training text"),
            TokenHeat(
                self.pieces, self.values, f"{self.score:+.4g} nats/token on average.",
                positive="supports", negative="opposes",
            ),
        ]  # fmt: skip


def sample_index(dataset: TokenDataset, sample_id: str) -> int:
    """Place of a sample by id; the first window of a document by the document's id.

    Raises:
        ConfigError: there is none.
    """
    if sample_id in dataset.sample_ids:
        return dataset.sample_ids.index(sample_id)
    if f"{sample_id}#0" in dataset.sample_ids:
        return dataset.sample_ids.index(f"{sample_id}#0")
    raise ConfigError(
        f"the corpus has no sample {sample_id!r}{nearest(sample_id, dataset.sample_ids)}"
    )


def explain(
    attributor: BidirectionalAttributor, model: Any, query: Query, index: int
) -> Explanation:
    """Perturbs for the query and reads one sample's token losses.

    Only that sample is evaluated, with the step that the whole corpus would get.
    """
    dataset, perturbation = attributor.dataset, attributor.perturbation
    size = perturbation.dataset_size or len(dataset)
    alone = replace(
        attributor,
        dataset=dataset.subset([index]),
        perturbation=replace(perturbation, dataset_size=size),
        prefilter=None,
        all_tokens=True,
        work_dir=None,
    )
    result = alone.score(query)
    scores = result.tokens.get(0, np.full(int(dataset.lengths[index]), np.nan))
    return Explanation(
        query.id,
        model.decode(query.completion_ids),
        dataset.sample_ids[index],
        token_pieces(model, dataset.ids(index).tolist()),
        [number(v, 6) for v in scores],
        float(result.values[0]),
        dataset.metadata(index),
    )


def from_item(values: Mapping[str, Any], sample_id: str | None) -> Explanation | None:
    """What a recorded item of `dabgo:attribution` knows of a sample (without a name: its best
    proponent); None when its tokens were not kept."""
    rows = [*values.get("proponents", ()), *values.get("opponents", ())]
    for row in rows:
        named = sample_id is None or row["id"] in (sample_id, f"{sample_id}#0")
        if named and "token_scores" in row and len(row["pieces"]) == row["tokens"]:
            signed = row["signed"]
            return Explanation(
                values["query"]["id"],
                values["query"]["completion"],
                row["id"],
                list(row["pieces"]),
                list(row["token_scores"]),
                float("nan") if signed is None else float(signed),
                row["metadata"],
            )
    return None
