"""Settings of the data of a run."""

from dataclasses import dataclass
from typing import Annotated

from mm1.engine.data.sources import KINDS
from mm1.engine.settings import Count, CountOrZero, OneOf, Positive, check, expect


@dataclass(frozen=True)
class Source:
    """One data set of a mixture. weight: its share of the tokens drawn, relative to the others."""

    # "captions" (WebDataset tars), "interleaved" (OBELICS-type json/jsonl/parquet), "text", or "conversations"
    # (LLaVA-type json/jsonl, of which answers alone are trained on)
    kind: Annotated[str, OneOf(*KINDS)]
    paths: tuple[str, ...]
    weight: Positive = 1.0

    def __post_init__(self):
        check(self, "data.sources")
        expect(len(self.paths) > 0, "data.sources.paths", self.paths, "at least one file")


@dataclass(frozen=True)
class Data:
    """sources, and the static budgets of one packed sequence."""

    sources: tuple[Source, ...] = ()
    tokenizer: str = ""  # a tokenizer.json
    tokens: Count = 4096
    images: Count = 16
    patches: CountOrZero = 0  # 0: images · patches of a full image
    documents: CountOrZero = 0  # 0: tokens / 16, or as many as the source of the shortest ones needs
    buffer: CountOrZero = 0  # tokens of the documents that the packer chooses from, a sequence at least; 0: 4 · tokens
    workers: CountOrZero = 0  # loader processes; 0 decodes in threads of this one
    # Packers that the records are dealt to; a run goes on with any number of data-parallel processes that divides it.
    streams: CountOrZero = 0  # 0: one, or four for each process that there is at the start
    max_bad: Count = 100  # unreadable records in a row that stop the run

    def __post_init__(self):
        check(self, "data")
