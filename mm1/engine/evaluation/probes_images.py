"""Score an image encoder by probes on labelled images: read and encode each image once, and compare layers.

last   the output after the encoder's final norm
all    each block's output by itself; reported is the block whose probe is best on held-out training images
best   the mean of the outputs of consecutive blocks, a quarter of all and at most six, as AIM's probes have it
       (El-Nouby et al. 2024, section 4.2); of all such means the one whose k-NN is best on held-out training images
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from mm1.engine.data.batch import packed_views
from mm1.engine.data.codecs import codec_of
from mm1.engine.data.record import Media, View
from mm1.engine.data.sources import Source
from mm1.engine.evaluation.config import ProbeSettings
from mm1.engine.evaluation.features import FeatureStore, encode_missing, fingerprint
from mm1.engine.evaluation.log import Counter
from mm1.engine.evaluation.probes import attentive, best_of_neighbours, check, knn, linear
from mm1.engine.evaluation.probes_train import Labelled
from mm1.errors import Unreadable, UserError

PATCHES = 4096  # that the model encodes in one call
CHUNK = 256  # images that are read before they are encoded
TEST = 0.2  # share of each class that is the test where no test images are given
MEAN_OF = 6  # blocks at most
Layers = tuple[int, ...] | None  # blocks whose outputs are averaged; None: the output after the final norm


class Images(NamedTuple):
    """Hold the digests and classes of labelled images; unreadable: reasons by key; unlabelled: images without class."""

    digests: list[bytes]
    labels: list[str]
    unreadable: dict[str, str]
    unlabelled: int

    def where(self, chosen: set[bytes]) -> "Images":
        """Return the images whose digests are chosen."""
        pairs = [pair for pair in zip(self.digests, self.labels) if pair[0] in chosen]
        return self._replace(digests=[digest for digest, _ in pairs], labels=[label for _, label in pairs])


class Encoder:
    """Encode the images of sources by a model, and keep the features of each layer in a store of `folder`.

    mask: "full", each patch sees its whole image, or "causal", it sees the patches up to itself.
    """

    def __init__(self, model: Any, folder: Path, mask: str = "full", display: TextIO | None = None):
        self.model, self.folder, self.mask, self.display = model, folder, mask, display
        self.device, self.dtype = next((p.device, p.dtype) for p in model.parameters())
        self.stores: dict[Layers, FeatureStore] = {}
        self.closing = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.close()

    def store(self, layers: Layers) -> FeatureStore:
        """Return the store of the mean output of these blocks."""
        if layers not in self.stores:
            kind = {
                "model": fingerprint(self.model), "config": repr(self.model.config), "dtype": str(self.dtype),
                "layers": layers, "mask": self.mask,
            }  # fmt: skip
            width = self.model.config.vision.width
            self.stores[layers] = self.closing.enter_context(FeatureStore(self.folder, kind, width))
        return self.stores[layers]

    def read(self, source: Source, layers: Sequence[Layers], title: str) -> Images:
        """Read all images of a source, and encode those that a store lacks. Raises UserError without any class."""
        codec, images = codec_of(self.model.config), Images([], [], {}, 0)
        unlabelled, views, keys = 0, list[View](), range(len(source))
        with Counter(title, len(source), 0, self.display) as progress:
            for i in keys:
                place = str(i)
                try:
                    record = source[i]
                    place = f"{record.shard}: {record.key}"
                    label = next((str(part) for part in record.parts if isinstance(part, str)), None)
                    medium = next(part for part in record.parts if isinstance(part, Media))
                    if label is not None:
                        views.append(View(codec.kind, codec.resize(codec.decode(medium.data))))
                        images.labels.append(label)
                    unlabelled += label is None
                except Unreadable as error:
                    images.unreadable[f"{error.shard}: {error.key}" if error.key else place] = error.reason
                if len(views) == CHUNK or (views and i == keys[-1]):
                    images.digests.extend(self._encode(views, layers, codec.patch))
                    views.clear()
                progress.add()
        if not images.labels:
            if not unlabelled:
                raise UserError(f"{title}: all are unreadable, such as {next(iter(images.unreadable.values()))}")
            expected = "a sub-folder for each class, .cls files in tars, or a column label in parquet"
            raise UserError(f"{title} have no classes, expected {expected}")
        return images._replace(unlabelled=unlabelled)

    def labelled(self, images: Images, layers: Layers, names: Sequence[str]) -> Labelled:
        """Return the features of images with their classes as indices of `names`."""
        store = self.store(layers)
        first, lengths = torch.tensor([store.images[digest] for digest in images.digests]).reshape(-1, 2).unbind(1)
        index = {name: i for i, name in enumerate(names)}
        return Labelled(store.rows(), first, lengths, torch.tensor([index[x] for x in images.labels]), tuple(names))

    def average(self, images: Images, layers: tuple[int, ...]) -> None:
        """Store the mean of the features of several blocks, each of which has a store."""
        store, blocks = self.store(layers), [self.store((layer,)) for layer in layers]
        rows = [block.rows().numpy() for block in blocks]
        missing = [digest for digest in dict.fromkeys(images.digests) if digest not in store.images]
        for start in range(0, len(missing), CHUNK):
            means = {}
            for digest in missing[start : start + CHUNK]:
                places = (block.images[digest] for block in blocks)
                means[digest] = np.mean([x[first : first + n] for x, (first, n) in zip(rows, places)], 0)
            store.add(means)

    def _encode(self, views: list[View], layers: Sequence[Layers], patch: int) -> list[bytes]:
        stores = [self.store(chosen) for chosen in layers]
        return encode_missing(stores, views, lambda pixels: self._features(pixels, layers, patch), PATCHES, patch)

    @torch.inference_mode()
    def _features(self, pixels: list[np.ndarray], layers: Sequence[Layers], patch: int) -> list[list[np.ndarray]]:
        """Return for each layer the features float32 [K, D] of each of several images uint8 [H, W, 3]."""
        packed, grids = packed_views(pixels, patch, device=self.device)
        packed = packed.to(self.device)
        prefix = None if self.mask == "full" else torch.ones(len(pixels), dtype=torch.int32, device=self.device)
        lengths, outputs = [h * w for h, w in grids.sizes or ()], dict[Layers, torch.Tensor]()
        rows = grids.to(self.device).with_class_token()[1] if self.model.config.vision.class_token else slice(None)
        with ExitStack() as hooks:  # one pass gives every block's output; model.features would run once for each layer
            for block in {block for chosen in layers for block in chosen or ()}:
                hook = self.model.vision.blocks[block].register_forward_hook(
                    lambda module, inputs, output, block=block: outputs.update({(block,): output[rows].float().cpu()})
                )
                hooks.callback(hook.remove)
            outputs[None] = self.model.features(packed, grids, prefix).float().cpu()
        means = (outputs[None] if c is None else torch.stack([outputs[(i,)] for i in c]).mean(0) for c in layers)
        return [[x.numpy() for x in of_layer.split(lengths)] for of_layer in means]


def probe(
    model: Any, train: Source, test: Source | None, folder: Path, *, kind: str = "attentive", layers: str = "best",
    mask: str = "full", settings: ProbeSettings = ProbeSettings(), display: TextIO | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the report of a probe on a model's features.

    test: None draws a fifth of each class of `train`, equal images together. folder: of the stored features. kind:
    attentive, linear or knn; layers: as in the module's docstring; mask: as in Encoder. Raises UserError for a model
    without features and for images that no probe can be scored on (`probes.check`).
    """
    if not hasattr(model, "features"):
        raise UserError(f"the model is of kind {model.config.kind}, expected one with features of images, such as aim")
    depth = model.config.vision.layers
    sets: list[Layers] = [None] if layers == "last" else [(i,) for i in range(depth)]
    with Encoder(model, folder, mask, display) as encoder:

        def score(images: tuple[Images, Images], chosen: Layers) -> dict[str, Any]:
            names = sorted({*images[0].labels, *images[1].labels})
            known, unseen = (encoder.labelled(part, chosen, names) for part in images)
            result = {
                "attentive": lambda: attentive(known, unseen, model.config.vision.heads, settings, encoder.device),
                "linear": lambda: linear(known, unseen, settings, encoder.device),
                "knn": lambda: knn(known, unseen, seed=settings.seed),
            }[kind]()
            return {"layers": chosen, **result}

        first = encoder.read(train, sets, "training images" if test else "images")
        rest = encoder.read(test, sets, "test images") if test else None
        images = (first, rest) if rest else drawn(first, settings.seed)
        curve: list[dict[str, Any]] = []
        if layers == "best":
            names = sorted({*images[0].labels, *images[1].labels})
            pooled = [encoder.labelled(images[0], chosen, names).pooled() for chosen in sets]
            check(pooled[0], encoder.labelled(images[1], sets[0], names))
            curve = [{"layers": blocks, **row} for blocks, row in windows(pooled, settings.seed)]
            chosen = max(curve, key=lambda row: row["validation"])["layers"]
            for part in images:
                encoder.average(part, chosen)
            result = score(images, chosen)
        else:
            curve = [score(images, chosen) for chosen in sets]
            result = max(curve, key=lambda row: row["validation"])
    seen = {*images[0].digests}
    return {
        "kind": kind, "choice": layers, "mask": mask, **result,
        "training_images": len(images[0].labels), "shared_images": sum(digest in seen for digest in images[1].digests),
        "unlabelled": first.unlabelled + (rest.unlabelled if rest else 0),
        "unreadable": first.unreadable | (rest.unreadable if rest else {}),
        "by_layer": [{name: row.get(name) for name in ("layers", "validation", "accuracy")} for row in curve],
    }  # fmt: skip


def windows(pooled: Sequence[Labelled], seed: int) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Return the blocks of each window and the best row of its k-NN on held-out training images.

    pooled: the mean features of the same images, for each block.
    """
    count = min(MEAN_OF, max(1, len(pooled) // 4))
    result = []
    for first in range(len(pooled) - count + 1):
        blocks = tuple(range(first, first + count))
        mean = torch.stack([pooled[block].features for block in blocks]).mean(0)
        result.append((blocks, best_of_neighbours(pooled[first]._replace(features=mean), seed)[0]))
    return result


def drawn(images: Images, seed: int) -> tuple[Images, Images]:
    """Return training and test images: a fifth of each class, at least one of several, is the test.

    Images of equal pixels are drawn together, with the class that the first of them has.
    """
    classes: dict[str, list[bytes]] = {}
    first = dict(zip(reversed(images.digests), reversed(images.labels)))
    for digest in dict.fromkeys(images.digests):
        classes.setdefault(first[digest], []).append(digest)
    draw, test = np.random.default_rng(seed), set[bytes]()
    for label in sorted(classes):
        own = classes[label]
        count = min(max(round(TEST * len(own)), 1), len(own) - 1)
        test |= {own[i] for i in draw.permutation(len(own))[:count]}
    return images.where({*images.digests} - test), images.where(test)


def find(data: Path, test: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the paths of training and test images; no test paths: the test is drawn.

    test: the user's paths of test images. A folder with the sub-folders "train" and "test", "val" or "validation" has
    both.
    """
    folders = [data / name for name in ("test", "val", "validation")]
    others = list(test) or [folder for folder in folders if folder.is_dir()][:1]
    if others and (data / "train").is_dir():
        return [data / "train"], others
    return [data], list(test)


def show(report: dict[str, Any]) -> str:
    """Return a report's table as text."""
    settings = ", ".join(f"{name} {value:g}" for name, value in report["chosen"].items())
    low, high = report["interval"]
    lines = [
        f"{report['kind']} probe, {_blocks(report['layers'])}, mask {report['mask']}, {settings}",
        f"  accuracy          {report['accuracy']:>7.2%}  95 % interval {low:.2%} to {high:.2%}",
        f"  mean of classes   {report['mean_of_classes']:>7.2%}",
        f"  most frequent     {report['majority']:>7.2%}",
        f"  images            {report['images']:>7}  of {len(report['classes'])} classes, "
        f"trained on {report['training_images']}",
    ]
    if len(report["by_layer"]) > 1:
        validated = "k-NN" if report["choice"] == "best" else "validation"
        lines.append(f"  {'layers':<16}  {validated:>10}  {'accuracy':>8}")
        for row in report["by_layer"]:
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
            lines.append(f"  {_blocks(row['layers']):<16}  {row['validation']:>10.2%}  {accuracy:>8}".rstrip())
    lines.append(f"  {'class':<16}  {'accuracy':>10}  {'images':>8}")
    lines += [f"  {name:<16}  {row['accuracy']:>10.2%}  {row['images']:>8}" for name, row in report["classes"].items()]
    if diverged := [row["rate"] for row in report["grid"] if row.get("diverged")]:
        lines.append(f"{len(diverged)} of {len(report['grid'])} probes diverged, from rate {min(diverged):g} on")
    rates = [row["rate"] for row in report["grid"] if "rate" in row]
    if rates and max(rates) > min(rates) and report["chosen"]["rate"] == max(rates):
        lines.append("the highest rate is the best: higher ones (--rates) or more --epochs may be better")
    if shared := report["shared_images"]:
        lines.append(f"{shared} test images have the pixels of a training image")
    if report["unlabelled"]:
        lines.append(f"{report['unlabelled']} images without a class: left out")
    if report["unreadable"]:
        key, why = next(iter(report["unreadable"].items()))
        lines.append(f"{len(report['unreadable'])} unreadable images, such as {key} ({why}): left out")
    return "\n".join(lines)


def draw_layers(report: dict[str, Any], file: Path) -> None:
    """Draw the accuracy by layer, of all or best. Raises UserError without matplotlib and for a wrong type of file."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("charts need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    middle = [sum(row["layers"]) / len(row["layers"]) for row in report["by_layer"]]
    for name, colour in (("validation", "#707b84"), ("accuracy", "#12708e")):
        if report["by_layer"][0][name] is not None:
            axes.plot(middle, [100 * row[name] for row in report["by_layer"]], "o-", color=colour, label=name)
    axes.set(xlabel="block", ylabel=f"{report['kind'] if report['choice'] == 'all' else 'k-NN'}, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def _blocks(layers: Layers) -> str:
    """Return the name of blocks: "final norm", "block 3" or "blocks 3 to 5"."""
    if layers is None:
        return "final norm"
    return f"block {layers[0]}" if len(layers) == 1 else f"blocks {layers[0]} to {layers[-1]}"
