"""Show that a second kind of media, with a codec of some twenty lines, passes through everything that images do."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from small import FOLDER, IMAGE, PATCH, SLOTS, small_mm1
from test_generate import picture

from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.codecs import Codec
from mm1.engine.data.document import Budget, Document, DocumentEncoder, document_of
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.packing import Loader
from mm1.engine.data.record import Media, Record, View
from mm1.engine.data.shards import JsonShard
from mm1.engine.data.sources import Source
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.infer.cache import PAGE, page_names
from mm1.engine.infer.detokenizer import TextStream
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.features import Features
from mm1.engine.infer.prompts import encode_prompts, with_views
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import Sampling
from mm1.errors import Unreadable, UserError

TOKENIZER = TextTokenizer(FOLDER / "tokenizer.json")
BUDGET = Budget(tokens=64, media=4, patches=16, documents=8, max_patches=8)


@dataclass(frozen=True)
class Tones:
    """Decode tones: bytes of loudness, 4 x 4 for each patch, at most 8 patches side by side in one view."""

    kind: ClassVar[str] = "tone"
    empty: ClassVar[View] = View("tone", np.zeros((0, 0, 1), np.float32))
    patch: int = PATCH
    max_views: int = 1
    max_patches: int = 8

    def decode(self, data):
        if not data or len(data) % 16:
            raise Unreadable(f"a tone of {len(data)} samples, expected a multiple of 16")
        return np.frombuffer(data, np.uint8)

    def check(self, medium):
        if not isinstance(medium, np.ndarray):
            raise UserError(f"a tone is an array of samples, not {type(medium).__name__}")
        return medium

    def views(self, medium):
        return [(medium.astype(np.float32) / 255).reshape(PATCH, -1, 1)]


class Sounds(Source):
    """Read another format of data: a list of {"tone": hexadecimal digits, "is": text}."""

    readers: ClassVar = {".json": JsonShard}

    def parts(self, item, folder):
        tone = (Media("tone", bytes.fromhex(item["tone"])),) if "tone" in item else ()
        return (*tone, item["is"])


def samples(patches, seed=0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, 16 * patches, np.uint8).tobytes()


def encoder(codec: Codec = Tones()) -> DocumentEncoder:
    return DocumentEncoder(TOKENIZER, codec, SLOTS, BUDGET)


def values(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, np.uint8) / np.float32(255)).reshape(PATCH, -1, 1)


def loader(source) -> Loader:
    mixture = Mixture([source], [1.0], encoder(), 0)
    return Loader(mixture, BUDGET, image_id=IMAGE, patch=PATCH, slots=SLOTS, buffer=128, empty=Tones.empty)


def test_tones_of_a_file_become_batches_of_their_values(tmp_path):
    tones = {f"tone {i}": samples(1 + i % 5, i) for i in range(12)}
    (tmp_path / "a.json").write_text(json.dumps([{"tone": data.hex(), "is": name} for name, data in tones.items()]))
    batches, names = loader(Sounds(tmp_path / "a.json")), set()
    for _ in range(8):
        batch = next(batches)
        assert batch.media.kind == "tone"
        patches = [h * w for h, w in batch.media.grids.sizes or ()]
        by_name, first = {}, 0
        for i, count in enumerate(patches):
            by_name[batch.media.slots[i * SLOTS].item()] = batch.media.values[first : first + 16 * count]
            first += 16 * count
        assert (batch.tokens[batch.media.slots[: len(patches) * SLOTS]] == IMAGE).all()
        assert (batch.media.slots[len(patches) * SLOTS :] == BUDGET.tokens).all()
        for start, end in batch.cu_seqlens.unfold(0, 2, 1).tolist():
            if start < end:
                name = TOKENIZER.decode(batch.tokens[start:end].tolist())
                np.testing.assert_array_equal(by_name[start + 1], values(tones[name]).reshape(-1, 1))
                names.add(name)
    assert names == set(tones)


def test_a_batch_without_tones_has_their_kind_dtype_and_channels(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"is": "silence"}] * 9))
    media = next(loader(Sounds(tmp_path / "a.json"))).media
    assert (media.kind, tuple(media.values.shape), media.values.dtype) == ("tone", (0, 1), torch.float32)


def test_a_prompts_tone_is_the_same_encoded_and_decoded():
    data = samples(3)
    media: list[Any] = [Media("tone", data), np.frombuffer(data, np.uint8)]
    encoded, decoded = (
        document_of(TOKENIZER, SLOTS, with_views(Tones(), ["hear ", medium, "what?"])) for medium in media
    )
    t = TOKENIZER
    truth = [t.bos, *t.encode("hear "), *[IMAGE] * SLOTS, *t.encode("what?")]
    assert encoded.tokens.tolist() == decoded.tokens.tolist() == truth
    assert encoded.digests == decoded.digests
    np.testing.assert_array_equal(encoded.media[0].values, values(data))


def test_a_prompts_image_may_be_encoded():
    from io import BytesIO

    model, image, file = small_mm1().eval(), picture(12, 24), BytesIO()
    image.save(file, "PNG")
    encoded, decoded = encode_prompts(model, [[Media("image", file.getvalue()), "a"], [image, "a"]])
    assert encoded.tokens.tolist() == decoded.tokens.tolist()
    assert encoded.digests == decoded.digests


def test_media_of_two_kinds_with_the_same_bytes_share_neither_pages_nor_features():
    pixels = np.zeros((PATCH, 2 * PATCH, 3), np.uint8)
    tokens = np.array([1, *[5] * PAGE, *[IMAGE] * SLOTS, *[6] * PAGE], np.int32)
    image, tone = (Document(tokens, (View(kind, pixels),), "") for kind in ("image", "tone"))
    pages = [page_names(document.tokens, document.digests, IMAGE, SLOTS) for document in (image, tone)]
    assert pages[0][0] == pages[1][0], "the page before the medium"
    assert pages[0][1] != pages[1][1]
    model = small_mm1().eval()
    features = Features(model, 2048, 1 << 20)
    for document, encoded in ((image, 1), (tone, 2), (image, 2), (tone, 2)):
        request = Request(document, Sampling(), TextStream(TOKENIZER, (), None))
        request.media_rows, request.due = np.flatnonzero(tokens == IMAGE), len(tokens)
        features.rows([request])
        assert features.encoded == encoded


def test_media_of_another_kind_are_refused_in_one_line():
    model, tone = small_mm1().eval(), Media("tone", samples(1))
    with pytest.raises(Unreadable, match="a medium of kind 'tone', expected 'image': batches have one kind of media"):
        encoder(ImagePolicy(PATCH, "native", 24, 64))(Record((tone, "a"), "0", "a.json"))
    with pytest.raises(UserError, match="the prompt has a medium of kind 'tone', expected 'image'"):
        encode_prompts(model, [[tone, "a"]])
    with pytest.raises(UserError, match="a tone is an array of samples, not Image"):
        with_views(Tones(), [picture(), "a"])
    (document,) = encoder()(Record((tone, "a"), "0", "a.json"))
    with pytest.raises(UserError, match="the prompt has media of kind 'tone', expected 'image'"):
        Engine(model, tokens=64).submit(document)
    with pytest.raises(ValueError, match="pack: media of kind 'tone', expected 'image'"):
        pack([document], exact_budget([document], PATCH), image_id=IMAGE, patch=PATCH, slots=SLOTS)


def test_a_tone_that_is_broken_or_too_long_is_unreadable():
    with pytest.raises(Unreadable, match="a tone of 17 samples, expected a multiple of 16"):
        encoder()(Record((Media("tone", bytes(17)), "a"), "0", "a.json"))
    with pytest.raises(Unreadable, match="one tone of 1 views and 17 patches exceeds the packing budget"):
        encoder()(Record((Media("tone", samples(17)), "a"), "0", "a.json"))


FORMAT = '''
from functools import partial

from mm1.engine.data import sources
from mm1.engine.data.shards import LinesShard, decode_utf8


class Csv(sources.Source):
    """Lines of number,text."""

    readers = {".csv": partial(LinesShard, parse=decode_utf8)}

    def parts(self, item, folder):
        return (item.partition(",")[2],)


sources.KINDS["csv"] = Csv  # the line in the table

from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.data.tokenizer import texts_of
from mm1.engine.run_config import load_run

run = load_run("run.toml")
tokenizer = TextTokenizer(run.data.tokenizer)
batch = next(make_streams(run, tokenizer, None))
print(sorted(texts_of(["a.csv"])))
print({tokenizer.decode(batch.tokens[a:b].tolist()) for a, b in batch.cu_seqlens.unfold(0, 2, 1).tolist() if a < b})
'''


def test_a_new_format_of_data_is_a_class_and_a_line_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("1,one\n2,two\n")
    (tmp_path / "run.toml").write_text(
        f'model = "digits"\n[data]\ntokenizer = "{FOLDER / "tokenizer.json"}"\n'
        '[[data.sources]]\nkind = "csv"\npaths = ["a.csv"]\n[train]\nsteps = 2\nwarmup = 0\n'
    )
    root = Path(__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n{FORMAT}"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stderr == ""
    texts, documents = run.stdout.splitlines()
    assert texts == "['one', 'two']"
    assert documents in ("{'one', 'two'}", "{'two', 'one'}")
