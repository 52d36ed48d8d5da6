"""The training corpus as token windows: the samples z_1..z_N that receive scores.

Documents are tokenized once into one flat array; a *sample* is a window of a document. Short
documents are one sample each; longer ones give windows of `window` tokens every `stride`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tenfold.capabilities import Tokenizes
from tenfold.errors import ConfigError

MIN_SCORED_LENGTH = 2
"""A sample needs two tokens: the first has no loss, so one token gives no score."""
INPUT_IDS = "input_ids"
"""Metadata column of records that are tokens already (see `token_files`)."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document's id, its metadata columns, and where its tokens lie in the flat array."""

    id: str
    start: int
    stop: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Length in tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class TokenDataset:
    """Samples over a flat token array.

    Attributes:
        tokens: `[M]` int32, the tokens of all documents, each once.
        documents: the documents, in corpus order.
        sample_ids: `[N]` unique ids; a document with several windows gives `id#0`, `id#1`, ...
        document_of: `[N]` int64, index into `documents`.
        spans: `[N, 2]` int64, start and stop of each sample in `tokens`.
        dropped: how many windows were left out because they were shorter than `min_tokens`.
    """

    tokens: np.ndarray
    documents: list[Document]
    sample_ids: list[str]
    document_of: np.ndarray
    spans: np.ndarray
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` tokens per sample."""
        return self.spans[:, 1] - self.spans[:, 0]

    @property
    def n_scored(self) -> np.ndarray:
        """`[N]` scored tokens per sample, T_i: the first token has no loss."""
        return np.maximum(self.lengths - 1, 0)

    @property
    def scorable(self) -> np.ndarray:
        """`[N]` bool: samples with at least one scored token; the others score NaN."""
        return self.lengths >= MIN_SCORED_LENGTH

    def ids(self, index: int) -> np.ndarray:
        """Token ids of one sample, `[T]` int32."""
        start, stop = self.spans[index]
        return self.tokens[start:stop]

    def metadata(self, index: int) -> Mapping[str, Any]:
        """Metadata columns of the sample's document."""
        return self.documents[self.document_of[index]].metadata

    def column(self, name: str) -> list[Any]:
        """`[N]` values of a metadata column; `document` and `sample` name the ids themselves.

        Raises:
            ConfigError: no document has such a column.
        """
        if name == "sample":
            return list(self.sample_ids)
        if name == "document":
            return [self.documents[d].id for d in self.document_of]
        known = {key for document in self.documents for key in document.metadata}
        if name not in known:
            raise ConfigError(
                f"the training texts have no column {name!r} "
                f"(they have: {', '.join(sorted(known)) or 'none'}, and always: document, sample)"
            )
        return [self.metadata(i).get(name) for i in range(len(self))]

    def has_column(self, name: str) -> bool:
        """Whether `column(name)` would succeed."""
        return name in ("sample", "document") or any(name in d.metadata for d in self.documents)

    def content_hash(self) -> str:
        """Hash of what scores depend on: tokens, windows and sample ids (not metadata)."""
        digest = hashlib.sha256()
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(self.spans, dtype="<i8").tobytes())
        digest.update("\0".join(self.sample_ids).encode())
        return digest.hexdigest()[:16]

    def subset(self, indices: Sequence[int] | np.ndarray) -> TokenDataset:
        """The dataset of some samples, in the given order; documents stay as they are."""
        chosen = np.asarray(indices, dtype=np.int64)
        return TokenDataset(
            tokens=self.tokens,
            documents=self.documents,
            sample_ids=[self.sample_ids[i] for i in chosen],
            document_of=self.document_of[chosen],
            spans=self.spans[chosen],
        )

    def joined(self, other: TokenDataset) -> TokenDataset:
        """This corpus followed by another one.

        Raises:
            ConfigError: they share a sample id or a document id.
        """
        mine = {*self.sample_ids, *(d.id for d in self.documents)}
        theirs = [*other.sample_ids, *(d.id for d in other.documents)]
        if shared := [name for name in theirs if name in mine]:
            raise ConfigError(
                f"both corpora have a text with the id {shared[0]!r}; ids must be unique"
            )
        shift = len(self.tokens)
        moved = [replace(d, start=d.start + shift, stop=d.stop + shift) for d in other.documents]
        return TokenDataset(
            tokens=np.concatenate([self.tokens, other.tokens]),
            documents=[*self.documents, *moved],
            sample_ids=[*self.sample_ids, *other.sample_ids],
            document_of=np.concatenate([self.document_of, other.document_of + len(self.documents)]),
            spans=np.concatenate([self.spans, other.spans + shift]),
            dropped=self.dropped + other.dropped,
        )

    def deduplicated(self) -> TokenDataset:
        """The dataset without samples whose tokens repeat those of an earlier sample."""
        seen: set[bytes] = set()
        kept = []
        for index in range(len(self)):
            key = self.ids(index).tobytes()
            if key not in seen:
                seen.add(key)
                kept.append(index)
        return self.subset(kept)

    @classmethod
    def from_records(
        cls,
        records: Iterable[Any],
        tokenizer: Tokenizes,
        *,
        window: int | None = None,
        stride: int | None = None,
        min_tokens: int = MIN_SCORED_LENGTH,
    ) -> TokenDataset:
        """Tokenizes `TextRecord`s with the model's own tokenizer, see `from_ids`.

        Records that carry `input_ids` in their metadata are taken as they are. `window`
        defaults to the model's context length.

        Raises:
            ConfigError: `window` exceeds the context, or as in `from_ids`.
        """
        context = tokenizer.context_length
        if window is not None and window > context:
            raise ConfigError(
                f"window is {window} tokens, but the model reads at most {context}",
                hint=f"set window to {context} or less",
            )
        rows = [(record.id, *_tokens(record, tokenizer)) for record in records]
        return cls.from_ids(
            [ids for _, ids, _ in rows],
            ids=[name for name, _, _ in rows],
            metadata=[columns for _, _, columns in rows],
            window=window or context,
            stride=stride,
            min_tokens=min_tokens,
            vocabulary_size=tokenizer.vocabulary_size,
        )

    @classmethod
    def from_ids(
        cls,
        sequences: Sequence[Sequence[int] | np.ndarray],
        *,
        ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        window: int | None = None,
        stride: int | None = None,
        min_tokens: int = MIN_SCORED_LENGTH,
        vocabulary_size: int | None = None,
    ) -> TokenDataset:
        """Cuts token sequences into samples.

        Args:
            sequences: token ids of each document.
            ids: document ids (default: `0`, `1`, ...).
            metadata: metadata columns of each document.
            window: longest sample, in tokens (None: documents are not cut).
            stride: distance of window starts (default: `window`, no overlap).
            min_tokens: shorter windows are dropped, unless they are a document's only one.
            vocabulary_size: when given, token ids are checked against it.

        Raises:
            ConfigError: empty corpus, duplicate ids, ids outside the vocabulary, or a window,
                stride or minimum that makes no sense.
        """
        _check_windowing(window, stride, min_tokens)
        names = list(ids) if ids is not None else [str(i) for i in range(len(sequences))]
        _check_documents(names, sequences)
        flat = _flatten(sequences, names, vocabulary_size)
        columns = metadata if metadata is not None else [{}] * len(names)
        documents, sample_ids, document_of, spans, dropped = [], [], [], [], 0
        position = 0
        for number, (name, sequence) in enumerate(zip(names, sequences, strict=True)):
            stop = position + len(sequence)
            documents.append(Document(name, position, stop, columns[number]))
            windows = _windows(len(sequence), window, stride)
            kept = [w for w in windows if w[1] - w[0] >= min_tokens] or windows[:1]
            dropped += len(windows) - len(kept)
            for k, (first, last) in enumerate(kept):
                sample_ids.append(name if len(kept) == 1 else f"{name}#{k}")
                document_of.append(number)
                spans.append((position + first, position + last))
            position = stop
        return cls(
            tokens=flat,
            documents=documents,
            sample_ids=sample_ids,
            document_of=np.asarray(document_of, dtype=np.int64),
            spans=np.asarray(spans, dtype=np.int64).reshape(-1, 2),
            dropped=dropped,
        )


def _tokens(record: Any, tokenizer: Tokenizes) -> tuple[Sequence[int], Mapping[str, Any]]:
    """A record's token ids, and its metadata without them."""
    given = record.metadata.get(INPUT_IDS)
    if not isinstance(given, list | tuple):
        return tokenizer.encode(record.text), record.metadata
    return given, {k: v for k, v in record.metadata.items() if k != INPUT_IDS}


def _windows(length: int, window: int | None, stride: int | None) -> list[tuple[int, int]]:
    """Windows of a document: the last one is the first that reaches the document's end."""
    if window is None or length <= window:
        return [(0, length)]
    step = stride or window
    count = -(-(length - window) // step) + 1
    return [(k * step, min(k * step + window, length)) for k in range(count)]


def _check_windowing(window: int | None, stride: int | None, min_tokens: int) -> None:
    if window is not None and window < MIN_SCORED_LENGTH:
        raise ConfigError(f"window is {window} tokens; a sample needs at least 2")
    if stride is not None and (stride < 1 or window is None or stride > window):
        raise ConfigError(
            f"stride is {stride}; it must be between 1 and the window length "
            f"({window if window is not None else 'not set'}), or tokens would be skipped"
        )
    if min_tokens < 1:
        raise ConfigError(f"min_tokens is {min_tokens}; it must be at least 1")


def _check_documents(names: Sequence[str], sequences: Sequence[Any]) -> None:
    if not sequences or not any(len(sequence) for sequence in sequences):
        raise ConfigError(
            "the training corpus is empty: there is nothing to attribute to",
            hint="check the `train` dataset's filters and limit",
        )
    if len(names) != len(sequences):
        raise ConfigError(f"{len(sequences)} training texts but {len(names)} ids")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"two training texts have the id {name!r}; ids must be unique")
        seen.add(name)


def _flatten(
    sequences: Sequence[Sequence[int] | np.ndarray], names: Sequence[str], limit: int | None
) -> np.ndarray:
    flat = np.concatenate([np.asarray(s, dtype=np.int64).reshape(-1) for s in sequences])
    if limit is not None and flat.size and (flat.min() < 0 or flat.max() >= limit):
        ends = np.cumsum([len(s) for s in sequences])
        bad = int(np.flatnonzero((flat < 0) | (flat >= limit))[0])
        where = names[int(np.searchsorted(ends, bad, side="right"))]
        raise ConfigError(
            f"training text {where!r} has token id {int(flat[bad])}, but the model's vocabulary "
            f"has {limit} entries (0..{limit - 1})",
            hint="the corpus was tokenized with another tokenizer",
        )
    return flat.astype(np.int32)
