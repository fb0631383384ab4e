import dataclasses

import pytest
import torch
from conftest import gradients, relative_error
from small import PATCH, document, documents, logits_of, packed, small_mm1

from mm1.engine.data.batch import exact_budget
from mm1.engine.data.document import Budget
from mm1.engine.models.mm1 import MM1, parameter_counts
from mm1.engine.models.mm1_config import MODELS, peak_lr
from mm1.engine.train.prepare import compile_blocks

ROOMY = Budget(tokens=120, media=9, patches=80, documents=8)


@pytest.mark.parametrize("options", [{"experts": 0}, {"experts": 4}], ids=["dense", "mixture"])
@pytest.mark.parametrize("budget", [None, ROOMY], ids=["full", "padded"])
def test_packed_equals_each_document_alone(options, budget):
    model, docs = small_mm1(**options), documents()
    parameters = list(model.parameters())
    losses = model(packed(docs, budget))
    grads = torch.autograd.grad(losses.loss, parameters)
    alone = [model(packed([doc])).loss for doc in docs]
    truth = torch.autograd.grad(torch.stack(alone).sum(), parameters, allow_unused=True)
    assert relative_error(losses.loss, torch.stack(alone).sum()) < 1e-5
    for (name, _), found, expected in zip(model.named_parameters(), grads, truth):
        assert expected is not None, name
        assert relative_error(found, expected) < 1e-5 or (found - expected).abs().max() < 1e-6, name


def test_the_order_of_documents_changes_nothing():
    model, docs = small_mm1(), documents()
    assert relative_error(model(packed(docs[::-1])).loss, model(packed(docs)).loss) < 1e-6


def test_no_token_sees_a_later_one_or_another_document():
    model, docs = small_mm1(), documents()
    batch = packed(docs)
    logits = logits_of(model, batch)
    changed = batch.tokens.clone()
    row = int(batch.cu_seqlens[2]) - 1  # the last token of the second document
    changed[row] = 4 + (changed[row] - 4 + 1) % 380
    after = logits_of(model, dataclasses.replace(batch, tokens=changed))
    different = (after != logits).any(-1).nonzero().flatten().tolist()
    assert different == [row]


def test_loss_is_on_text_only_and_not_across_documents():
    batch = packed([document(3, (2, 2), 2), document(2)])
    # bos t t t I I I I t t | bos t t
    tokens = batch.tokens.tolist()
    expected = [*tokens[1:4], -100, -100, -100, -100, *tokens[8:10], -100, *tokens[11:13], -100]
    assert batch.targets.tolist() == expected
    assert batch.target_count == sum(t != -100 for t in expected)
    assert batch.positions.tolist() == [*range(10), *range(3)]


def test_text_only_batch_runs_and_gives_the_encoder_zero_gradients():
    model = small_mm1()
    loss = model(packed([document(5)], ROOMY)).loss
    grads = gradients(loss, list(model.parameters()))
    for (name, _), grad in zip(model.named_parameters(), grads):
        if name.startswith(("vision", "connector", "image_norm")):
            assert not grad.any(), name


def test_compiled_blocks_equal_eager_ones():
    eager, compiled = small_mm1(), small_mm1()
    compile_blocks(compiled)
    batch = packed(documents(), ROOMY)
    a, b = eager(batch), compiled(batch)
    assert relative_error(b.loss, a.loss) < 1e-5
    for found, expected in zip(
        gradients(b.loss, list(compiled.parameters())), gradients(a.loss, list(eager.parameters()))
    ):
        assert relative_error(found, expected) < 1e-4 or (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["average", "attention"])
def test_other_connectors_and_a_class_token_train(kind):
    c = small_mm1().config
    c = dataclasses.replace(
        c,
        connector=dataclasses.replace(c.connector, kind=kind),
        vision=dataclasses.replace(c.vision, class_token=True, pre_norm=True, activation="quick_gelu"),
        decoder=dataclasses.replace(c.decoder, tied=False, qk_norm=False),
    )
    model, docs = MM1(c).init_weights(), documents()
    alone = sum(model(packed([doc])).loss for doc in docs)
    assert relative_error(model(packed(docs, ROOMY)).loss, alone) < 1e-5
    grads = gradients(model(packed(docs)).loss, list(model.parameters()))
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("name, billions, tolerance", [
    ("mm1-3b", 3, 0.07), ("mm1-7b", 7, 0.07), ("mm1-30b", 30, 0.07), ("mm1-3b-moe", 64, 0.03),
    ("mm1-7b-moe", 47, 0.03), ("mm1-1b", 1.2, 0.09),
])  # fmt: skip
def test_named_sizes_have_the_papers_totals(name, billions, tolerance):
    assert abs(parameter_counts(MODELS[name])["decoder"] / (billions * 1e9) - 1) < tolerance


def test_encoders_have_their_published_sizes():
    assert abs(parameter_counts(MODELS["mm1-3b"])["vision"] / 632e6 - 1) < 0.01
    assert abs(parameter_counts(MODELS["mm1-1b-vit-l-336"])["vision"] / 304e6 - 1) < 0.01


def test_learning_rate_law_gives_the_papers_values():
    for parameters, rate in [(1.2e9, 8.58e-5), (3e9, 5.83e-5), (7e9, 4.08e-5), (30e9, 2.21e-5)]:
        assert abs(peak_lr(int(parameters)) - rate) < 0.006e-5


def test_exact_budget_leaves_no_padding():
    docs = documents()
    batch = packed(docs)
    assert batch.used_tokens == len(batch.tokens)
    assert batch.media.grids.used == batch.media.grids.patches == exact_budget(docs, PATCH).patches
