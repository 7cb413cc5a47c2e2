"""Token compressors: what a cell holds, what stands at the edges, and that no image sees another."""

from itertools import product

import pytest
import torch
from torch import Tensor

from casa.errors import UserError
from casa.vision.connector import cells, make_compressor, parse_compressor

# whole cells, odd sides, smaller than a cell, two alike
GRIDS = [(4, 6), (3, 5), (1, 1), (3, 5), (1, 4), (2, 2)]
SPECS = ("pool:2", "pool:3", "pixel_shuffle:2", "pixel_shuffle:3", "q_former:3")
WIDTH = 8


def _tokens(grids: list[tuple[int, int]], seed: int = 0) -> Tensor:
    count = sum(rows * columns for rows, columns in grids)
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _pictures(tokens: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
    """(rows, columns, WIDTH) of each image."""
    parts = tokens.split([rows * columns for rows, columns in grids])
    return [part.unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]


@pytest.fixture(params=SPECS)
def compressor(request):
    torch.manual_seed(1)
    made = make_compressor(request.param, WIDTH).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.mark.parametrize("side", [2, 3])
def test_pooling_is_the_mean_of_the_tokens_that_are_there(side):
    tokens = _tokens(GRIDS)
    found, grids = make_compressor(f"pool:{side}", WIDTH)(tokens, GRIDS)
    wanted = []
    for picture in _pictures(tokens, GRIDS):
        starts = product(range(0, picture.shape[0], side), range(0, picture.shape[1], side))
        wanted += [picture[row : row + side, column : column + side].mean(dim=(0, 1)) for row, column in starts]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-14, atol=1e-14)
    assert grids == [(-(-rows // side), -(-columns // side)) for rows, columns in GRIDS]


@pytest.mark.parametrize("side", [2, 3])
def test_pixel_shuffle_joins_a_cell_with_edges_repeated(side):
    compressor = make_compressor(f"pixel_shuffle:{side}", WIDTH).double()
    weight = torch.randn_like(compressor.join.weight)
    bias = torch.randn_like(compressor.join.bias)
    compressor.load_state_dict({"join.weight": weight, "join.bias": bias})
    tokens = _tokens(GRIDS)
    found, grids = compressor(tokens, GRIDS)
    wanted = []
    for picture, (down, across) in zip(_pictures(tokens, GRIDS), grids, strict=True):
        rows, columns = (torch.arange(count * side) for count in (down, across))
        full = picture[rows.clamp(max=picture.shape[0] - 1)][:, columns.clamp(max=picture.shape[1] - 1)]
        for row, column in product(range(0, down * side, side), range(0, across * side, side)):
            wanted.append(weight @ full[row : row + side, column : column + side].flatten() + bias)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)


def test_pixel_shuffle_starts_as_the_mean_of_whole_cells():
    tokens, grids = _tokens([(4, 6)]), [(4, 6)]
    compressor = make_compressor("pixel_shuffle:2", WIDTH).double()
    pooled, _ = make_compressor("pool:2", WIDTH)(tokens, grids)
    torch.testing.assert_close(compressor(tokens, grids)[0], pooled, rtol=1e-12, atol=1e-12)
    torch.nn.init.ones_(compressor.join.weight)
    compressor.reset_parameters()
    torch.testing.assert_close(compressor(tokens, grids)[0], pooled, rtol=1e-12, atol=1e-12)


def test_cells_repeat_the_edge_and_say_so():
    source, real = cells([(2, 3), (1, 1)], 2)
    assert source.tolist() == [[0, 1, 3, 4], [2, 2, 5, 5], [6, 6, 6, 6]]
    assert real.int().tolist() == [[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]]


def test_together_is_alone_in_any_order(compressor):
    tokens = _tokens(GRIDS)
    together, grids = compressor(tokens, GRIDS)
    alone = [
        compressor(picture.flatten(0, 1), [grid]) for picture, grid in zip(_pictures(tokens, GRIDS), GRIDS, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat([found for found, _ in alone]), rtol=1e-12, atol=1e-12)
    assert grids == [grid for _, (grid,) in alone] == compressor.grids(GRIDS)
    assert len(together) == sum(rows * columns for rows, columns in grids)


def test_no_image_touches_another(compressor):
    tokens = _tokens(GRIDS)
    before, grids = compressor(tokens, GRIDS)
    changed = tokens.clone()
    changed[:24] = -tokens[:24]  # the first image
    after, _ = compressor(changed, GRIDS)
    first = grids[0][0] * grids[0][1]
    assert torch.equal(before[first:], after[first:])
    assert not torch.isclose(before[:first], after[:first]).all(dim=1).any()


def test_gradients_flow_to_every_token_and_weight(compressor):
    tokens = _tokens(GRIDS).requires_grad_()
    found, _ = compressor(tokens, GRIDS)
    (found * torch.randn_like(found)).sum().backward()
    for tensor in (tokens, *compressor.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
    assert (tokens.grad.abs().sum(dim=1) > 0).all()


def test_gradients_are_right(compressor):
    grids = [(2, 3), (1, 2), (2, 3)]
    tokens = _tokens(grids, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: compressor(given, grids)[0], tokens, fast_mode=True)


def test_no_images_are_no_tokens(compressor):
    found, grids = compressor(_tokens([]), [])
    assert found.shape == (0, WIDTH)
    assert grids == compressor.grids([]) == []


def test_a_q_former_knows_where_its_tokens_stood():
    torch.manual_seed(0)
    compressor = make_compressor("q_former:4", WIDTH).double()
    tokens = _tokens([(2, 3)])
    here, grids = compressor(tokens, [(2, 3)])
    there, _ = compressor(tokens, [(3, 2)])
    assert grids == [(1, 4)]
    assert (here - there).abs().max() > 1e-3


def test_a_q_former_keeps_its_queries_apart():
    torch.manual_seed(0)
    found, _ = make_compressor("q_former:6", WIDTH).double()(_tokens([(3, 4)]), [(3, 4)])
    assert torch.pdist(found).min() > 1e-2


def test_fresh_weights_can_be_asked_for():
    torch.manual_seed(0)
    compressor = make_compressor("q_former:4", 128)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.zero_()
    compressor.reset_parameters()
    assert all(parameter.abs().sum() > 0 for name, parameter in compressor.named_parameters() if "bias" not in name)


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (128, 2), (100, 1), (200, 2), (768, 12), (2048, 12)])
def test_heads_divide_the_inner_width(width, heads):
    with torch.device("meta"):
        assert make_compressor("q_former:2", width).blocks[0].look_around.heads == heads


def test_specs_are_read():
    assert parse_compressor("pool:2") == ("pool", 2)
    assert parse_compressor("pixel_shuffle:3") == ("pixel_shuffle", 3)
    assert parse_compressor("q_former:128") == ("q_former", 128)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("poll:2", "did you mean 'pool'"),
        ("qformer:32", "did you mean 'q_former'"),
        ("convolution:2", "the known ones are: pool, pixel_shuffle, q_former"),
        ("", "the known ones are"),
        (None, "the known ones are"),
        ("pool", "needs a number of tokens per side of a cell, 2 or more"),
        ("pool:", "needs a number"),
        ("pool:1", "2 or more, as in 'pool:2'"),
        ("pixel_shuffle:2.5", "needs a number"),
        ("pixel_shuffle:-2", "needs a number"),
        ("q_former:0", "queries per image, 1 or more"),
        ("q_former:²", "needs a number"),
        ("pool:2:2", "needs a number"),
    ],
)
def test_other_specs_are_refused(spec, words):
    with pytest.raises(UserError, match=words):
        parse_compressor(spec)
    with pytest.raises(UserError, match=words):
        make_compressor(spec, WIDTH)


def test_heads_that_do_not_divide_are_refused():
    for heads in (0, 3):
        with pytest.raises(UserError, match=f"width 8 cannot have {heads} heads"):
            make_compressor("q_former:2", WIDTH, heads=heads)
