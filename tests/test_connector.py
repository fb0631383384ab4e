import pytest
import torch
from conftest import gradients, not_interpreted, relative_error
from test_adaptive_pool import images, rows
from torch import nn

from mm1.engine.layers.connector import AttentionPool, AveragePool, CAbstractor
from mm1.engine.layers.layer import init_weights
from mm1.kernels.patches.grids import Grids

GRIDS = [(5, 40), (13, 11), (1, 1), (12, 12), (27, 27), (3, 2)]


@pytest.mark.parametrize("in_width", [16, 24])
def test_c_abstractor_is_honeybees(in_width):
    """RegStage → AdaptiveAvgPool2d → RegStage of timm, readout after it, and Honeybee's state dict loads as it is."""
    regnet, layers = pytest.importorskip("timm.models.regnet"), pytest.importorskip("timm.layers")

    def stage(a, b):
        return regnet.RegStage(
            depth=3, in_chs=a, out_chs=b, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=layers.LayerNorm2d
        )

    net = nn.Sequential(stage(in_width, 16), nn.AdaptiveAvgPool2d((3, 3)), stage(16, 16))
    readout = nn.Sequential(nn.Linear(16, 20), nn.SiLU(), nn.Linear(20, 20))
    pos_emb = torch.randn(1, 30, in_width)
    state = {f"net.{k}": v for k, v in net.state_dict().items()} | {"pos_emb": pos_emb}
    state |= {f"readout.{k}": v for k, v in readout.state_dict().items()}
    ours = CAbstractor(in_width, 20, hidden=16, depth=3, tokens=9, position_grid=(5, 6))
    ours.load_state_dict(state)

    x = torch.randn(60, in_width)
    y = ours(x, [(5, 6), (5, 6)])
    truth = torch.cat([readout(rows(net(i))) for i in images(x + pos_emb[0].repeat(2, 1), [(5, 6), (5, 6)])])
    assert relative_error(y, truth) < 1e-5
    parameters = dict(ours.named_parameters())
    found = gradients(y, list(parameters.values()))
    theirs = dict(nn.ModuleDict({"net": net, "readout": readout}).named_parameters())
    expected = dict(zip(theirs, gradients(truth, list(theirs.values()))))
    assert theirs.keys() == parameters.keys() - {"pos_emb"}
    for name, a in zip(parameters, found):
        if name in theirs:
            assert relative_error(a, expected[name]) < 2e-5, name


@pytest.mark.parametrize("tokens", [64, 144])
@pytest.mark.parametrize("kind", [CAbstractor, AttentionPool, AveragePool])
def test_every_connector_makes_its_tokens_of_any_grid_alone_or_packed(kind, tokens):
    options = {"hidden": 16, "depth": 1, "position_grid": (4, 4)} if kind is CAbstractor else {}
    connector = kind(16, 24, tokens=tokens, **options)
    init_weights(connector, 0)
    x = torch.randn(sum(h * w for h, w in GRIDS), 16)
    y = connector(x, GRIDS)
    assert y.shape == (len(GRIDS) * tokens, 24)
    start = 0
    for i, (h, w) in enumerate(GRIDS):
        alone = connector(x[start : start + h * w], [(h, w)])
        assert relative_error(y[i * tokens : (i + 1) * tokens], alone) < 1e-5
        start += h * w
    assert connector(x[:0], []).shape == (0, 24)


@pytest.mark.parametrize("width, patches, millions", [(1024, 576, 37.4), (1280, 729, 39.4)])
def test_c_abstractor_has_honeybees_size(width, patches, millions):
    with torch.device("meta"):
        connector = CAbstractor(width, 4096, position_grid=(patches // 27, 27) if patches == 729 else (24, 24))
    count = sum(p.numel() for p in connector.parameters())
    assert abs(count / (millions * 1e6) - 1) < 0.005


@not_interpreted
def test_compiled_it_takes_other_sizes_without_compiling_again():
    """A loop pads to as many images and patches as it has room for; sizes are then values in tensors."""
    connector = CAbstractor(6, 12, hidden=8, depth=2, tokens=4)
    compiled = torch.compile(connector, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ([(4, 3), (2, 7)], [(5, 5)], [(1, 1), (9, 2), (3, 1)], []):
            x = torch.randn(30, 6, requires_grad=True)
            grids = Grids(sizes, images=4, patches=30)
            given = [x, *connector.parameters()]
            y, truth = compiled(x, grids), connector(x, grids)
            assert relative_error(y, truth) < 1e-5
            for a, b in zip(gradients(y, given), gradients(truth, given)):
                assert relative_error(a, b) < 1e-5


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="expected a square"):
        AveragePool(8, 8, tokens=50)
