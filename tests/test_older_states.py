"""Show that data states of older checkpoints are still read: a run continues with the same batches after an update.

STATE, IDENTITY and DIGESTS were written by the version that knew images only, before media had a kind.
"""

import dataclasses
import io
import json
import tarfile

import numpy as np
from small import small_run

from mm1.engine.data.config import Source
from mm1.engine.data.identity import differences
from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.data.tokenizer import byte_level_bpe

STATE = json.loads("""
{"taken": 6, "streams": {"0": {"position": 64, "waiting": [[22, 0, 0], [54, 0, 0], [0, 0, 0], [14, 0, 0], [28,
0, 0], [36, 0, 0], [42, 0, 0], [48, 0, 0], [50, 0, 0], [62, 0, 0], [46, 0, 0], [52, 0, 0], [32, 0, 0], [40, 0,
0], [58, 0, 0], [12, 0, 0], [20, 0, 0], [24, 0, 0], [26, 0, 0], [30, 0, 0]], "skipped": 6, "in_a_row": [[3,
4]]}, "1": {"position": 73, "waiting": [[67, 0, 0], [31, 0, 0], [39, 0, 0], [45, 0, 0], [53, 0, 0], [59, 0, 0],
[65, 0, 0], [3, 0, 0], [7, 0, 0], [13, 0, 0], [21, 0, 0], [27, 0, 0], [1, 1, 0], [35, 0, 0], [41, 0, 0], [47, 0,
0], [49, 0, 0], [55, 0, 0], [61, 0, 0], [63, 0, 0]], "skipped": 8, "in_a_row": [[3, 1]]}}}
""")
IDENTITY = json.loads("""
{"train.seed": 0, "data.tokens": 160, "data.images": 4, "data.patches": 64, "data.documents": 24, "data.buffer":
640, "data.streams": 2, "model.vision.patch": 4, "model.image_mode": "native", "model.image_size": 24,
"model.image_patches": 64, "model.image_parts": 1, "model.connector.tokens": 4, "data.sources[0].kind":
"captions", "data.sources[0].files": [["captions.tar", 92160, 40]], "data.sources[0].weight": 4.0,
"data.sources[0].mean_length": 34.25, "data.sources[0].order": "sorted by a hash", "data.sources[1].kind":
"text", "data.sources[1].files": [["text.txt", 9575, 60]], "data.sources[1].weight": 3.0,
"data.sources[1].mean_length": 160.48333333333332, "data.sources[1].order": "sorted by a hash",
"data.sources[2].kind": "conversations", "data.sources[2].files": [["talks.json", 2030, 20]],
"data.sources[2].weight": 2.0, "data.sources[2].mean_length": 38.5, "data.sources[2].order": "sorted by a hash",
"data.sources[3].kind": "text", "data.sources[3].files": [["broken.jsonl", 30, 2]], "data.sources[3].weight":
1.0, "data.sources[3].mean_length": 7.0, "data.sources[3].order": "sorted by a hash"}
""")
DIGESTS = [2533922900, 217436801, 2377600212, 1677211889, 1028655463, 786061062, 869841425, 3360590976]


def run_in(folder):
    """Write captions, conversations and text whose bytes depend on no library: images are PPM of whole patches."""
    draw = np.random.default_rng(0)
    with tarfile.open(folder / "captions.tar", "w") as archive:
        for i in range(40):
            h, w = (int(n) for n in draw.integers(1, 4, 2) * 4)
            image = b"P6 %d %d 255\n" % (w, h) + draw.integers(0, 256, (h, w, 3), np.uint8).tobytes()
            for name, data in ((f"{i}.ppm", image), (f"{i}.txt", b"number %d " % i * (1 + i % 5))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (folder / "text.txt").write_text("".join(f"line {i} " * (1 + i * 7 % 40) + "\n" for i in range(60)))
    talks = [{"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": "a number"}]}
             for i in range(20)]  # fmt: skip
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "broken.jsonl").write_text('{"text": "whole"}\n{"text": 3}\n')
    (folder / "tokenizer.json").write_text(byte_level_bpe(["text"], 260).to_str())
    run = small_run()
    sources = (
        Source("captions", (str(folder / "captions.tar"),), 4), Source("text", (str(folder / "text.txt"),), 3),
        Source("conversations", (str(folder / "talks.json"),), 2), Source("text", (str(folder / "broken.jsonl"),), 1),
    )  # fmt: skip
    data = dataclasses.replace(
        run.data, sources=sources, tokenizer=str(folder / "tokenizer.json"), images=4, patches=64, streams=2
    )
    return dataclasses.replace(run, data=data)


def streams(folder, **options):
    run = run_in(folder)
    return make_streams(run, TextTokenizer(run.data.tokenizer), None, lambda message: None, **options)


def test_a_stored_state_continues_with_the_same_batches(tmp_path):
    resumed = streams(tmp_path)
    resumed.restore(json.loads(json.dumps(STATE)))
    assert [next(resumed).digest for _ in DIGESTS] == DIGESTS
    assert resumed.state().keys() == STATE.keys()
    assert resumed.state()["streams"]["0"].keys() == STATE["streams"]["0"].keys()


def test_a_stored_identity_is_that_of_the_same_data(tmp_path):
    now = streams(tmp_path).identity
    assert differences(IDENTITY | {"data.tokenizer": now["data.tokenizer"]}, now) == []
    assert {name: value for name, value in now.items() if name != "data.tokenizer"} == IDENTITY
