"""The pretraining text of an RL run: a seeded, resumable stream, and a fixed held-out part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsys.config import PtxConfig, RunConfig
from rlsys.data.example_encoding import EncodedExample, ExampleEncoder
from rlsys.data.example_readers import ExampleSource, read_texts
from rlsys.data.example_stream import ExampleBatch, ExampleStream
from rlsys.data.examples import PlainText, examples_digest
from rlsys.data.held_out import hold_out_by
from rlsys.data.synthetic_texts import synthetic_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SourcedTexts:
    """The texts of one run before they become tokens; empty where there are none."""

    train: Sequence[PlainText]
    held_out: Sequence[PlainText]
    notices: tuple[str, ...] = ()  # about these data, for the user

    def describe(self) -> str:
        """Return how many texts there are."""
        return f"{len(self.train)} training and {len(self.held_out)} held-out texts"


@dataclass(frozen=True, kw_only=True)
class LoadedTexts:
    """The texts of one run as tokens."""

    train: ExampleStream | None = None  # None: the run trains on no text
    held_out: ExampleBatch | None = None  # None: no evaluation
    notices: tuple[str, ...] = ()  # about these data, for the user


def source_texts(config: RunConfig) -> SourcedTexts:
    """Read or generate the texts that a run needs.

    Raises:
        ValueError: see `read_texts` and `hold_out_by`; ptx.train is not a source.
    """
    ptx, seed = config.ptx, config.trainer.seed
    if ptx.train == "auto":
        raise ValueError("ptx.train: 'auto' is a value of ptx.eval. Give a source of text, or off.")
    if not config.reads_text:
        return SourcedTexts(train=(), held_out=())

    notices: list[str] = []
    train: Sequence[PlainText] = ()
    held_out: Sequence[PlainText] = ()
    splits = ptx.eval == "auto"  # held-out texts come from the training texts
    if ptx.train == "synthetic":
        train, held_out = _split(synthetic_texts(seed), ptx, "ptx.train", notices)
    elif ptx.train != "off" and (ptx.trains or splits):
        train = _read(ptx.train, "ptx.train", ptx, notices)
        if splits:
            train, held_out = _split(train, ptx, "ptx.train", notices)

    if ptx.eval == "synthetic":
        _, held_out = _split(synthetic_texts(seed), ptx, "ptx.eval", notices)
    elif ptx.eval == "off":
        held_out = ()
    elif not splits:
        held_out = _read(ptx.eval, "ptx.eval", ptx, notices)

    held_out = held_out[: ptx.eval_limit or None]
    train = train if ptx.trains else ()
    notices += _shared_notices(train, held_out)
    return SourcedTexts(train=train, held_out=held_out, notices=tuple(notices))


def _read(source: str, field: str, ptx: PtxConfig, notices: list[str]) -> list[PlainText]:
    described = ExampleSource(
        source=source, field=field, on_dropped=notices.append, columns_field="ptx.columns"
    )
    return read_texts(described, ptx.columns)


def _split(
    texts: Sequence[PlainText], ptx: PtxConfig, field: str, notices: list[str]
) -> tuple[list[PlainText], list[PlainText]]:
    """Hold out a fraction of the distinct texts, the same ones in every run."""
    try:
        split = hold_out_by(
            lambda text: text.prompt_key, texts, fraction=ptx.held_out, limit=ptx.eval_limit
        )
    except ValueError as error:
        raise ValueError(
            f"ptx.eval: {ptx.eval!r} holds texts out of {field}, which has fewer than two "
            "different ones. Give ptx.eval a file, or set it to off."
        ) from error
    if split.copies:
        notices.append(f"{field}: {split.copies} further copies of held-out texts are left out")
    return split.train, split.held_out


def _shared_notices(train: Sequence[PlainText], held_out: Sequence[PlainText]) -> Iterator[str]:
    trained = {text.prompt_key for text in train}
    shared = sum(text.prompt_key in trained for text in held_out)
    if shared:
        yield (
            f"ptx.eval: WARNING: {shared} of its {len(held_out)} texts are also in ptx.train, so "
            "their loss is not held out. Drop them from one of the two, or set ptx.eval to auto"
        )


def load_texts(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: SourcedTexts,
    end_tokens: frozenset[int],
) -> LoadedTexts:
    """Tokenize the texts.

    Raises:
        ValueError: the tokenizer names no end token, or leaves no token of the texts.
    """
    if not texts.train and not texts.held_out:
        return LoadedTexts(notices=texts.notices)

    ptx = config.ptx
    encoder = ExampleEncoder("plain", tokenizer, chat=False, end_tokens=end_tokens)
    notices = [*texts.notices]
    stream, batch = None, None
    if texts.train:
        pieces = _pieces(texts.train, encoder, ptx, "ptx.train")
        if ptx.examples_per_step > len(pieces):
            notices.append(
                f"ptx.examples_per_step: WARNING: {ptx.examples_per_step} is more than the "
                f"{len(pieces)} training texts, so each step holds the same text several times. "
                "Lower it"
            )
        stream = ExampleStream(
            pieces,
            examples_per_step=ptx.examples_per_step,
            seed=config.trainer.seed,
            shuffle=True,
            digest=f"{examples_digest(texts.train)} in pieces of {ptx.max_tokens}",
            field="ptx.train",
        )
    if texts.held_out:
        batch = ExampleBatch.of(-1, _pieces(texts.held_out, encoder, ptx, "ptx.eval"), 0)
    return LoadedTexts(train=stream, held_out=batch, notices=tuple(notices))


def _pieces(
    texts: Sequence[PlainText], encoder: ExampleEncoder, ptx: PtxConfig, field: str
) -> list[EncodedExample]:
    pieces = [piece for text in texts for piece in encoder.text(text, ptx.max_tokens)]
    if not pieces:
        raise ValueError(
            f"{field}: the tokenizer leaves no token of its {len(texts)} texts. Give other texts."
        )
    return pieces
