"""Published weights on disk become a checkpoint that computes what transformers computes with them."""

import json
import shutil

import pytest
import torch
from conftest import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from small import logits_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import mm1
from mm1.engine.convert import upcycle
from mm1.engine.convert.assemble import assemble
from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document
from mm1.engine.data.text_tokenizer import SPECIAL, TextTokenizer
from mm1.engine.layers.connector import CAbstractor
from mm1.engine.models.mm1_config import DIGITS, MODELS
from mm1.engine.run_config import DIGITS_FOLDER
from mm1.errors import UserError
from mm1.kernels.patches.grids import Grids

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz <>/"
TEXT = "a cab of </s> and <s> and <image>"
DIGITS_TOKENIZER = DIGITS_FOLDER / "tokenizer.json"
ROPE = {"rope_theta": 50_000.0, "rope_type": "default"}
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_parameters": ROPE,
}  # fmt: skip
DECODERS = {
    "llama": ("Llama", {}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
KNOWN = 3 + len(LETTERS) + 2  # ids of the tokenizer below


def source_tokenizer():
    """Bytes apart, two merges, one of which makes the end-of-text of plain text; a template, and a shortest cut."""
    words = ["<unk>", "<s>", "</s>", *LETTERS, "</", "s>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    t = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")], unk_token="<unk>"))
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    t.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    t.enable_truncation(4)
    t.enable_padding(length=9)
    return t


def decoder(folder, name="llama", shard=None, **options):
    """A random decoder of transformers, saved with its tokenizer."""
    kind, more = DECODERS[name]
    torch.manual_seed(len(name))
    c = getattr(transformers, f"{kind}Config")(**SIZES | more | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(c).float().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3 if p.ndim == 1 else 1.5 * p.shape[-1] ** -0.5)
    model.save_pretrained(folder, **{"max_shard_size": shard} if shard else {})
    source_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return model


def clip(folder):
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(5)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=14, image_size=28, **sizes))
    model.float().eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of a CLIP, a Llama in shards and a tied Qwen3, and transformers' models of them."""
    root = tmp_path_factory.mktemp("published")
    truth = {"clip": clip(root / "clip")}
    truth |= {name: decoder(root / name, name, "20KB" if name == "llama" else None) for name in DECODERS}
    assert len(list((root / "llama").glob("model-*.safetensors"))) > 2
    return root, truth


@pytest.fixture(scope="module")
def dense(published, tmp_path_factory):
    """The checkpoint of CLIP and Llama."""
    root, _ = published
    return assemble(
        tmp_path_factory.mktemp("dense") / "mm1", vision=root / "clip", decoder=root / "llama", image_tokens=4
    )


def batch(lengths=(9, 1, 17)):
    torch.manual_seed(1)
    documents = [Document(torch.randint(3, KNOWN, (n,)).int().numpy(), (), "") for n in lengths]
    tokens = [torch.from_numpy(document.tokens).long() for document in documents]
    return tokens, pack(documents, exact_budget(documents, 14), image_id=KNOWN + 1, patch=14, slots=4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_logits_of_the_sources_tokens_are_transformers(published, tmp_path, name):
    root, truths = published
    model = mm1.load(assemble(tmp_path / "out", vision=root / "clip", decoder=root / name), dtype=torch.float32)
    documents, packed = batch()
    truth = torch.cat([truths[name](tokens[None]).logits[0] for tokens in documents])
    assert truth.std() > 0.1
    assert relative_error(logits_of(model, packed)[:, :KNOWN], truth[:, :KNOWN]) < 1e-4
    assert model.config.connector.tokens == 144


@torch.no_grad()
def test_features_are_transformers(published, dense):
    _, truths = published
    images = torch.randint(256, (2, 28, 28, 3), dtype=torch.uint8)
    vision = mm1.load(dense).vision
    pixels = ((images / 255 - torch.tensor(vision.config.mean)) / torch.tensor(vision.config.std)).permute(0, 3, 1, 2)
    truth = truths["clip"](pixels, output_hidden_states=True).hidden_states[-1][:, 1:].flatten(0, 1)
    assert relative_error(vision(images.reshape(-1, 3), Grids([(2, 2)] * 2)), truth) < 1e-4


def test_a_checkpoint_of_published_weights_generates(dense):
    prompt = ["a cab", Image.new("RGB", (40, 30), (200, 20, 20)), " of"]
    model = mm1.load(dense)
    assert mm1.generate(model, [prompt], max_tokens=8) == mm1.generate(mm1.load(dense), [prompt], max_tokens=8)
    assert sorted(path.name for path in dense.iterdir()) == [
        "COMPLETE", "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


def test_texts_have_the_sources_tokens_whole_and_no_special_ones(dense):
    before, after = source_tokenizer(), TextTokenizer(dense / "tokenizer.json")
    before.no_truncation()
    plain = "a cab of all letters " * 3
    assert after.encode("a") == [3]
    assert after.encode(plain) == before.encode(plain, add_special_tokens=False).ids[: len(plain)]
    assert not set(after.encode(TEXT)) & {after.pad, after.bos, after.eos, after.image}


def test_bos_and_eos_of_the_source_keep_their_trained_rows(dense):
    t = TextTokenizer(dense / "tokenizer.json")
    assert (t.bos, t.eos) == (1, 2)
    assert {t.pad, t.image} == {KNOWN, KNOWN + 1}
    assert t.decode([t.bos, 3, t.image, t.eos]) == "a"


@pytest.mark.parametrize("names, same", [
    ({"bos_token": "</s>", "eos_token": "</s>"}, {"<eos>": 2}),
    ({"bos_token": None, "eos_token": "not there"}, {}),
    (None, {}),
])  # fmt: skip
def test_special_tokens_the_source_does_not_name_are_new(published, tmp_path, names, same):
    root, _ = published
    source_tokenizer().save(str(tmp_path / "tokenizer.json"))
    if names is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    out = assemble(
        tmp_path / "out", vision="digits", decoder=root / "llama", tokenizer=tmp_path / "tokenizer.json",
        image_tokens=4,
    )  # fmt: skip
    t = Tokenizer.from_file(str(out / "tokenizer.json"))
    found = {token: t.token_to_id(token) for token in SPECIAL}
    assert {token: number for token, number in found.items() if number < KNOWN} == same
    assert t.token_to_id("<s>") == 1


@pytest.mark.parametrize("model, unknown", [
    (models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("a", -1.0)], 0), [0]),
    (models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, "<s>"), []),  # a control token, which no text becomes
], ids=["unigram", "words"])  # fmt: skip
def test_tokenizers_of_other_kinds_keep_their_ids(tmp_path, model, unknown):
    t = Tokenizer(model)
    t.add_special_tokens(["<s>", "<pad>"])
    t.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    out = assemble(
        tmp_path / "out", vision="digits", decoder="digits", tokenizer=tmp_path / "tokenizer.json", image_tokens=4
    )
    found = TextTokenizer(out / "tokenizer.json")
    assert (found.bos, found.pad, found.encode("a"), found.encode("zz")) == (1, 3, [2], unknown)


@pytest.mark.parametrize("name, rows", [("llama", ["embedding", "head"]), ("qwen3, tied", ["embedding"])])
def test_new_rows_are_the_mean_of_the_tokens_there_were(published, tmp_path, name, rows):
    root, truths = published
    truth = truths[name]
    out = assemble(tmp_path / "out", vision="digits", decoder=root / name, image_tokens=4)
    state = load_file(out / "model.safetensors")
    assert [row for row in ("embedding", "head") if f"decoder.{row}.weight" in state] == rows
    theirs = {"embedding": truth.model.embed_tokens.weight, "head": truth.lm_head.weight}
    for row in rows:
        found, old = state[f"decoder.{row}.weight"], theirs[row]
        assert len(found) == 128, "the 97 rows of the file, in whole multiples of 64"
        assert torch.equal(found[:KNOWN], old[:KNOWN])
        assert torch.equal(found[KNOWN + 2 : 97], old[KNOWN + 2 :]), "rows of no token"
        for new in (*found[KNOWN : KNOWN + 2], *found[97:]):
            torch.testing.assert_close(new, old[:KNOWN].mean(0))


def test_more_tokens_than_the_model_has_rows_get_rows(tmp_path):
    truth = decoder(tmp_path / "llama", vocab_size=KNOWN - 5)
    out = assemble(tmp_path / "out", vision="digits", decoder=tmp_path / "llama", image_tokens=4)
    found, old = load_file(out / "model.safetensors")["decoder.embedding.weight"], truth.model.embed_tokens.weight
    assert found.shape == (64, 48)
    assert torch.equal(found[: KNOWN - 5], old)
    torch.testing.assert_close(found[KNOWN - 5 :], old.mean(0).expand(64 - KNOWN + 5, -1))


@pytest.mark.parametrize("k", [1, 2, 5])
@torch.no_grad()
def test_an_upcycled_decoder_computes_what_the_dense_one_did(dense, tmp_path, k):
    out = assemble(tmp_path / "out", source=dense, experts=5, experts_per_token=k)
    before, after = mm1.load(dense), mm1.load(out)
    _, packed = batch()
    assert relative_error(logits_of(after, packed), logits_of(before, packed)) < 1e-5
    assert [block.mlp.__class__.__name__ for block in after.decoder.blocks] == ["MLP", "Experts"] * 2
    assert after.decoder.blocks[1].mlp.k == k
    assert after.tokenizer.encode(TEXT) == before.tokenizer.encode(TEXT)


@torch.no_grad()
def test_upcycle_returns_a_copy_that_computes_the_same_as_the_dense_model(dense, tmp_path):
    before = mm1.load(dense)
    after = upcycle(before, 5, 2, experts_per_token=3, seed=4)
    written = load_file(
        assemble(tmp_path / "out", source=dense, experts=5, experts_per_token=3, seed=4) / "model.safetensors"
    )
    assert after.state_dict().keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in after.state_dict().items())
    _, packed = batch()
    truth = logits_of(before, packed)
    assert relative_error(logits_of(after, packed), truth) < 1e-5
    assert after.tokenizer is before.tokenizer
    for p in after.parameters():  # an expert is no view of the MLP, nor of another expert
        p.zero_()
    assert torch.equal(logits_of(before, packed), truth)
    assert upcycle(before.bfloat16(), 4).decoder.blocks[1].mlp.down.dtype == torch.bfloat16
    with pytest.raises(UserError, match="the decoder has 5 experts already, expected a dense one"):
        upcycle(after, 2)


def test_routers_of_upcycled_layers_are_random_as_a_fresh_models(dense, tmp_path):
    one, same, other = (
        load_file(assemble(tmp_path / name, source=dense, experts=64, moe_every=1, seed=seed) / "model.safetensors")
        for name, seed in [("one", 1), ("same", 1), ("other", 2)]
    )
    routers = [name for name in one if "router" in name]
    assert len(routers) == 4
    for name in routers:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])
        assert one[name].shape == (64, 48)
        assert one[name].std().item() == pytest.approx(48**-0.5, rel=0.05)
    assert not torch.equal(one[routers[0]], one[routers[1]])


@torch.no_grad()
def test_parts_can_be_named_sizes_with_random_weights(published, tmp_path):
    root, truths = published
    out = assemble(tmp_path / "out", vision=root / "clip", decoder="digits", tokenizer=DIGITS_TOKENIZER, image_tokens=4)
    model = mm1.load(out)
    assert model.config.decoder == DIGITS.decoder
    truth = truths["clip"].state_dict()["encoder.layers.1.mlp.fc1.weight"]
    assert torch.equal(model.vision.blocks[1].fc1.weight, truth)
    assert model.decoder.embedding.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert mm1.generate(model, [["a"]], max_tokens=2) is not None


def test_random_parts_come_from_the_seed_with_rows_for_every_token(tmp_path):
    Tokenizer(models.WordLevel({str(n): n for n in range(400)}, "0")).save(str(tmp_path / "tokenizer.json"))
    one, same, other = (
        load_file(
            assemble(
                tmp_path / name, vision="digits", decoder="digits", tokenizer=tmp_path / "tokenizer.json",
                image_tokens=4, seed=seed,
            ) / "model.safetensors"
        )
        for name, seed in [("one", 1), ("same", 1), ("other", 2)]
    )  # fmt: skip
    assert one["decoder.embedding.weight"].shape == (448, 96)
    for name in ("decoder.embedding.weight", "connector.readout.0.weight", "vision.patch_weight"):
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_one_file_with_its_config_beside_it_is_a_source(published, tmp_path):
    root, _ = published
    one = assemble(
        tmp_path / "one", vision=root / "clip" / "model.safetensors", decoder=root / "qwen3, tied", image_tokens=4
    )
    two = assemble(tmp_path / "two", vision=root / "clip", decoder=root / "qwen3, tied", image_tokens=4)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_image_size_is_set_beside_a_kept_table_of_positions(dense, tmp_path):
    out = assemble(tmp_path / "out", source=dense, image_size=70)
    before, after = mm1.load(dense), mm1.load(out)
    assert (before.config.image_size, before.config.image_patches) == (28, 4)
    assert (after.config.image_size, after.config.image_patches) == (70, 25)
    assert torch.equal(after.vision.positions, before.vision.positions)
    prompt = ["a", Image.new("RGB", (9, 9))]
    assert mm1.generate(after, [prompt], max_tokens=2) is not None


def test_pixels_are_normalised_as_the_encoder_was_trained(published, tmp_path):
    root, _ = published
    shutil.copytree(root / "clip", tmp_path / "clip")
    fields = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 0.25]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(fields))
    vision = mm1.load(
        assemble(tmp_path / "out", vision=tmp_path / "clip", decoder=root / "llama", image_tokens=4)
    ).config.vision
    assert (vision.mean, vision.std) == ((0.5, 0.25, 0.125), (0.5, 0.5, 0.25))


@pytest.mark.parametrize("whole", [False, True])
def test_connector_is_read_of_its_file_or_of_all_of_honeybees(published, tmp_path, whole):
    root, _ = published
    truth = CAbstractor(128, 48, hidden=16, depth=1, tokens=4, position_grid=(2, 2))
    for p in truth.parameters():
        torch.nn.init.normal_(p)
    state = truth.state_dict()
    if whole:
        state = {f"abstractor.{name}": value for name, value in state.items()}
        state["language_model.lm_head.weight"] = torch.ones(1)
    save_file(state, tmp_path / "honeybee.safetensors")
    out = assemble(
        tmp_path / "out", vision=root / "clip", decoder=root / "llama", image_tokens=4,
        connector=tmp_path / "honeybee.safetensors",
    )  # fmt: skip
    found = load_file(out / "model.safetensors")
    for name, value in truth.state_dict().items():
        assert torch.equal(found[f"connector.{name}"], value)


def edited(**fields):
    """Change fields of the decoder's config.json; None takes one out."""

    def edit(folder):
        path = folder / "decoder" / "config.json"
        values = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return edit


def cut(name):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return edit


def removed(name):
    return lambda folder: (folder / name).unlink()


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


def renamed(name, other):
    return lambda folder: (folder / name).rename(folder / other)


WEIGHTS, INDEX = "decoder/model.safetensors", "decoder/model.safetensors.index.json"
BOTH = {"vision": "clip", "decoder": "decoder"}
REFUSED = {
    "no folder": (None, BOTH | {"vision": "nowhere"}, r"vision is '\S+nowhere', expected a folder, a file or a named"),
    "one part alone": (None, {"vision": "clip"}, "expected either a checkpoint, or both vision and decoder"),
    "no config": (removed("clip/config.json"), BOTH, "no such file: .*clip/config.json"),
    "broken config": (replaced("clip/config.json", "{"), BOTH, "clip/config.json: Expecting"),
    "config of another shape": (replaced("clip/config.json", "[]"), BOTH, "clip/config.json is not a JSON object"),
    "missing field": (edited(num_hidden_layers=None), BOTH, "decoder config: num_hidden_layers is missing"),
    "Qwen2.5": (edited(model_type="qwen2"), BOTH, "model_type is 'qwen2', expected 'llama' or 'mistral' or"),
    "attention bias": (edited(attention_bias=True), BOTH, "attention_bias is True, expected False"),
    "window": (
        edited(model_type="mistral", use_sliding_window=True, sliding_window=32), BOTH | {"context": 33},
        "sliding_window is 32, expected 33 or more",
    ),
    "no weights": (removed(WEIGHTS), BOTH, "no such file of weights: .*decoder/model.safetensors"),
    "weights as code": (
        renamed(WEIGHTS, "decoder/pytorch_model.bin"), BOTH, "_model.bin: convert it to safetensors; .* run code",
    ),
    "connector as code": (
        replaced("honeybee.bin", ""), BOTH | {"connector": "honeybee.bin"}, "honeybee.bin: convert it to safetensors",
    ),
    "no connector": (None, BOTH | {"connector": "a.safetensors"}, "no such file of weights: .*/a.safetensors"),
    "foreign connector": (
        None, BOTH | {"connector": "clip/model.safetensors"}, "connector: tensors net.0.b…, readout.… are missing",
    ),
    "half a file": (cut(WEIGHTS), BOTH, "decoder/model.safetensors is not a complete safetensors file"),
    "missing shard": (
        lambda f: (removed(WEIGHTS)(f), replaced(INDEX, '{"weight_map": {"a": "model-1.safetensors"}}')(f)), BOTH,
        "no such file of weights: .*decoder/model-1.safetensors",
    ),
    "empty index": (
        lambda f: (removed(WEIGHTS)(f), replaced(INDEX, "{}")(f)), BOTH, "index.json: weight_map is missing",
    ),
    "a tower for a decoder": (
        None, BOTH | {"decoder": "clip", "tokenizer": DIGITS_TOKENIZER},
        "decoder config: model_type is 'clip_vision_model', expected 'llama' or",
    ),
    "no tokenizer": (removed("decoder/tokenizer.json"), BOTH, "no such file: .*decoder/tokenizer.json"),
    "broken tokenizer": (replaced("decoder/tokenizer.json", "{}"), BOTH, "tokenizer.json is not a tokenizer"),
    "size without tokenizer": (None, BOTH | {"decoder": "mm1-1b"}, "the size mm1-1b has no tokenizer: set --tokenizer"),
    "parts beside a checkpoint": (None, {"source": "clip", "vision": "clip"}, "a checkpoint has its own vision"),
    "no checkpoint": (None, {"source": "nowhere"}, "no checkpoint at .*nowhere"),
    "another checkpoint": (None, {"source": "clip"}, "clip is not a complete checkpoint"),
    "image tokens": (None, BOTH | {"image_tokens": 5}, "model.connector.tokens is 5, expected a square number"),
    "image size": (None, BOTH | {"image_size": 30}, "model.image_size is 30, expected a multiple of the patch size 14"),
    "too few experts": (None, BOTH | {"experts": 1}, "experts_per_token is 2, expected at most the 1 experts"),
    "too few layers": (None, BOTH | {"experts": 4, "moe_every": 5}, "moe_every is 5, expected at most .* 4 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_one_line(published, tmp_path, case):
    edit, arguments, message = REFUSED[case]
    root, _ = published
    shutil.copytree(root / "clip", tmp_path / "clip")
    shutil.copytree(root / "qwen3, tied", tmp_path / "decoder")
    if edit is not None:
        edit(tmp_path)
    paths = {"vision", "decoder", "source", "connector"}
    arguments = {
        name: tmp_path / value if name in paths and value not in MODELS else value for name, value in arguments.items()
    }
    with pytest.raises(UserError, match=message) as caught:
        assemble(tmp_path / "out", **{"image_tokens": 4} | arguments if "vision" in arguments else arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refuses_to_write_over_anything(dense):
    before = (dense / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        assemble(dense, source=dense, experts=4)
    assert (dense / "model.safetensors").read_bytes() == before


def test_refuses_experts_for_a_mixture(published, tmp_path):
    root, _ = published
    with pytest.raises(UserError, match="the decoder has 4 experts already"):
        assemble(tmp_path / "out", vision="digits", decoder=root / "mixtral", experts=4)
