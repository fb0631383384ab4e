import pytest
import torch
from conftest import gradients, relative_error
from torch import nn

from mm1.engine.connector import AttentionPool, AveragePool, CAbstractor
from mm1.kernels.adaptive_pool import adaptive_pool
from mm1.kernels.conv_block import conv_block, depthwise
from mm1.kernels.grids import Grids

GRIDS = [(5, 40), (13, 11), (1, 1), (12, 12), (27, 27), (3, 2)]


def images(x, grids):
    """Packed rows -> one [1, C, h, w] an image."""
    parts = x[: sum(h * w for h, w in grids)].split([h * w for h, w in grids])
    return [part.T.reshape(1, -1, h, w) for part, (h, w) in zip(parts, grids)]


def rows(image):
    return image.flatten(2)[0].T


@pytest.mark.parametrize("out", [(12, 12), (8, 8), (1, 3)])
def test_pool_has_the_windows_of_torch(out):
    x = torch.randn(sum(h * w for h, w in GRIDS), 6, requires_grad=True)
    y = adaptive_pool(x, GRIDS, out)
    pool = nn.AdaptiveAvgPool2d(out)
    truth = torch.cat([rows(pool(image.double())) for image in images(x, GRIDS)])
    assert relative_error(y, truth) < 1e-6
    assert relative_error(gradients(y, [x])[0], gradients(truth, [x])[0]) < 1e-6


@pytest.mark.parametrize("widths", [(8, 8), (6, 8)], ids=["identity shortcut", "convolved shortcut"])
def test_conv_block_is_timms_bottleneck_image_by_image(widths):
    timm_regnet = pytest.importorskip("timm.models.regnet")
    timm_layers = pytest.importorskip("timm.layers")
    block = timm_regnet.Bottleneck(
        *widths, act_layer=nn.SiLU, norm_layer=timm_layers.LayerNorm2d, group_size=1
    ).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    grids = [(1, 1), (4, 3), (2, 7)]
    x = torch.randn(27, widths[0], requires_grad=True)
    weights = {name: p.detach().float().requires_grad_() for name, p in block.named_parameters()}
    y = conv_block(torch.cat([x, torch.ones(3, widths[0])]), Grids(grids, images=5, patches=30), weights)[:27]
    truth = torch.cat([rows(block(image)) for image in images(x.double(), grids)])
    assert relative_error(y, truth) < 1e-5
    found, expected = gradients(y, [x, *weights.values()]), gradients(truth, [x, *block.parameters()])
    for name, a, b in zip(["x", *weights], found, expected):
        assert relative_error(a, b) < 1e-5, name


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


@pytest.mark.parametrize("tokens", [64, 144])
@pytest.mark.parametrize("kind", [CAbstractor, AttentionPool, AveragePool])
def test_every_connector_makes_its_tokens_of_any_grid_alone_or_packed(kind, tokens):
    options = {"hidden": 16, "depth": 1, "position_grid": (4, 4)} if kind is CAbstractor else {}
    connector = kind(16, 24, tokens=tokens, **options)
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


def test_depthwise_op_contract():
    grids = Grids([(3, 2), (1, 4)])
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    torch.library.opcheck(depthwise, (x, weight, grids.neighbours("cpu")))


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="expected a square"):
        AveragePool(8, 8, tokens=50)
    with pytest.raises(ValueError, match="adaptive_pool: x"):
        adaptive_pool(torch.randn(5, 4), [(2, 2)])
