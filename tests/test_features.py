"""Stored features return as they were, are computed once an image, and survive a kill at any byte."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mm1.engine.data.record import View, view_digest
from mm1.engine.evaluation.features import ENTRY, FeatureStore, encode_missing
from mm1.errors import UserError

WIDTH = 5
KIND = {"model": "of-a-test", "layers": [1], "mask": "full"}


def images(count, first=0):
    """Views of 1 × 1 to 3 × 2 patches of 2 pixels, each of one value."""
    return [View("image", np.full((2 * (1 + i % 3), 2 * (1 + i % 2), 3), first + i, np.uint8)) for i in range(count)]


def encode(pixels):
    """A row for each patch: the image's value, and the number of the patch."""
    return [
        np.array([[x[0, 0, 0], i, 0, 0, 1] for i in range(x.shape[0] * x.shape[1] // 4)], np.float32) for x in pixels
    ]


def fill(store, views):
    encode_missing([store], views, lambda pixels: [encode(pixels)], 100, 2)


def contents(store):
    rows = store.rows()
    return {digest: rows[first : first + count].numpy() for digest, (first, count) in store.images.items()}


def expected(views):
    return {view_digest(view): rows for view, rows in zip(views, encode([view.values for view in views]))}


def assert_equal(found, truth):
    assert found.keys() == truth.keys()
    for digest, rows in truth.items():
        np.testing.assert_array_equal(found[digest], rows)


def test_features_return_as_they_were(tmp_path):
    views = images(7)
    with FeatureStore(tmp_path, KIND, WIDTH) as store:
        assert store.rows().shape == (0, WIDTH)
        fill(store, views[:4])
        assert_equal(contents(store), expected(views[:4]))
        fill(store, views)
        assert_equal(contents(store), expected(views))
    with FeatureStore(tmp_path, KIND, WIDTH) as store:
        assert_equal(contents(store), expected(views))
        rows = store.rows()
        rows += 1  # pages of this process alone
        assert_equal(contents(store), expected(views))
        assert rows.dtype == torch.float32


def test_each_image_is_encoded_once_within_the_limit_of_patches(tmp_path):
    calls = []

    def counted(pixels):
        calls.append([x.shape[0] * x.shape[1] // 4 for x in pixels])
        return encode(pixels), [10 * rows for rows in encode(pixels)]

    views = images(6)
    with FeatureStore(tmp_path, KIND, WIDTH) as store, FeatureStore(tmp_path, {}, WIDTH) as other:
        digests = encode_missing([store, other], [*views, *views[::-1]], counted, 5, 2)
        assert calls == [[1, 4], [3, 2], [2], [6]]
        assert digests == [view_digest(view) for view in [*views, *views[::-1]]]
        encode_missing([store, other], views, counted, 5, 2)
        encode_missing([store, other], [], counted, 5, 2)
        assert len(calls) == 4
        fill(store, images(1, first=50))
        encode_missing([store, other], images(1, first=50), counted, 5, 2)  # for the other alone
        truth = expected([*views, *images(1, first=50)])
        assert_equal(contents(store), truth)
        assert_equal(contents(other), {digest: 10 * rows for digest, rows in truth.items()})


@pytest.mark.parametrize("change", [{"model": "other"}, {"layers": [2]}, {"mask": "causal"}])
def test_other_settings_have_other_features(tmp_path, change):
    with FeatureStore(tmp_path, KIND, WIDTH) as store:
        fill(store, images(3))
    for settings, width in ((KIND | change, WIDTH), (KIND, WIDTH + 1)):
        with FeatureStore(tmp_path, settings, width) as store:
            assert not store.images


def test_a_kill_at_any_byte_loses_only_what_was_not_complete(tmp_path):
    views = images(6)
    with FeatureStore(tmp_path, KIND, WIDTH) as store:
        folder = store.folder
        for view in views:  # each is added by itself
            fill(store, [view])
    rows, index = ((folder / name).read_bytes() for name in ("rows", "index"))
    ends = np.cumsum([view.patches(2) for view in views]) * 4 * WIDTH
    for size in range(0, len(rows) + 1, 11):
        for entries in {0, 1, int((ends <= size).sum()) * ENTRY.itemsize + 7, len(index)}:
            (folder / "rows").write_bytes(rows[:size])
            (folder / "index").write_bytes(index[:entries])
            whole = min(int((ends <= size).sum()), entries // ENTRY.itemsize)
            with FeatureStore(tmp_path, KIND, WIDTH) as store:
                assert_equal(contents(store), expected(views[:whole]))
                fill(store, views)
            with FeatureStore(tmp_path, KIND, WIDTH) as store:
                assert_equal(contents(store), expected(views))


def test_damage_that_no_kill_leaves_is_one_line(tmp_path):
    with FeatureStore(tmp_path, KIND, WIDTH) as store:
        folder = store.folder
        fill(store, images(2))
        with pytest.raises(ValueError, match=r"features are \[2, 4\], expected \[K, 5\]"):
            store.add({b"x" * 32: np.zeros((2, 4), np.float32)})
        fill(store, images(3))
        assert_equal(contents(store), expected(images(3)))
    (folder / "index").write_bytes(np.zeros(2, ENTRY).tobytes())
    with pytest.raises(UserError, match="is not a folder of image features: index has an image without rows"):
        FeatureStore(tmp_path, KIND, WIDTH)
    (folder / "settings.json").write_text("{}")
    with pytest.raises(UserError, match=r"settings\.json has other settings"):
        FeatureStore(tmp_path, KIND, WIDTH)
    with pytest.raises(UserError, match="Not a directory"):
        FeatureStore(folder / "rows", KIND, WIDTH)


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    views = images(5)
    with FeatureStore(tmp_path, KIND, WIDTH) as store:
        fill(store, views[:2])
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                fill(store, views[3:])
        fill(store, views)
        assert_equal(contents(store), expected(views))
    with FeatureStore(tmp_path, KIND, WIDTH) as store:
        assert_equal(contents(store), expected(views))


def test_a_store_is_open_in_one_process(tmp_path):
    code = (
        "import sys, pathlib\nfrom mm1.engine.evaluation.features import FeatureStore\n"
        f"FeatureStore(pathlib.Path(sys.argv[1]), {KIND!r}, {WIDTH})"
    )
    with FeatureStore(tmp_path, KIND, WIDTH):
        result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
        assert "is in use by process" in result.stderr
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 0
