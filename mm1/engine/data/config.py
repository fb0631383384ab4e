"""Define the settings of a run's data."""

from dataclasses import dataclass
from typing import Annotated

from mm1.engine.data.sources import KINDS
from mm1.engine.settings import Count, CountOrZero, OneOf, Positive, check
from mm1.errors import require


@dataclass(frozen=True)
class Source:
    """Set one data set of the mixture; in a TOML file each has its own [[data.sources]]."""

    kind: Annotated[str, OneOf(*KINDS)]
    """Format of the files: "captions" (WebDataset tars), "interleaved" (as OBELICS: json, jsonl or parquet), "text",
    "conversations" (as LLaVA's json or jsonl; answers are learned), or for AIM "images" (folders, tars or parquet)."""
    paths: tuple[str, ...]
    """Files, as names or patterns such as "shard-{000..127}.tar" and "text/*.txt", relative to the TOML file; of images
    also folders."""
    weight: Positive = 1.0
    """Share of the trained tokens, relative to the other sources' weights."""

    def __post_init__(self):
        check(self, "data.sources")
        require(len(self.paths) > 0, "setting data.sources.paths", self.paths, "at least one file")


@dataclass(frozen=True)
class Data:
    """Set the data sets, the tokenizer, and the fixed sizes of a packed sequence."""

    sources: tuple[Source, ...] = ()
    """Data sets that are mixed; training needs at least one."""
    tokenizer: str = ""
    """A tokenizer.json, as `mm1 tokenizer` makes it; empty: that of the checkpoint train.init. AIM has none."""
    tokens: Count = 4096
    """Tokens of a packed sequence, image slots included; MM1's pre-training has 4096. AIM has none: its
    tokens are patches."""
    images: Count = 16
    """Maximum number of images in a packed sequence; MM1's pre-training has up to 16."""
    patches: CountOrZero = 0
    """Maximum number of image patches in a packed sequence; 0: data.images times the patches of a full image."""
    documents: CountOrZero = 0
    """Maximum number of documents in a packed sequence; 0: a sixteenth of data.tokens, or as many as the source with
    the shortest documents needs if that is more."""
    buffer: CountOrZero = 0
    """Tokens of the documents that the packer chooses from, at least data.tokens; a larger buffer fills sequences
    better and uses more host memory; 0: four sequences."""
    workers: CountOrZero = 0
    """Processes that load and decode data, for each training process; 0: threads of the training process."""
    streams: CountOrZero = 0
    """Packers among which the records are divided. A run can continue on any number of data-parallel processes that
    divides it; 0: one for a single process, else four for each process at the start."""
    max_bad: Count = 100
    """Unreadable records of one source in a row that stop the run; fewer are skipped and listed."""

    def __post_init__(self):
        check(self, "data")
