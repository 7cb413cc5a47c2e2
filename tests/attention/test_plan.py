"""The cost rule: who shares a call with whom."""

from casa.attention.plan import make_plan
from casa.windows import WindowLayout


def calls(texts, images, width=512, **more):
    position, insertions = 0, []
    for text, image in zip(texts, images, strict=True):
        insertions.append((position, image))
        position += text
    made = make_plan(WindowLayout.from_insertions([position], [insertions], **more), "both", width, False)
    return [] if made is None else [call.windows for call in made.calls]


def test_equal_windows_share_one_call():
    assert calls([16] * 5, [64] * 5) == [(0, 1, 2, 3, 4)]


def test_near_equal_windows_are_padded_into_one_call():
    assert calls([4, 5, 4], [8, 8, 9]) == [(0, 2, 1)]


def test_windows_far_apart_are_not_padded():
    assert calls([4, 90], [256, 256]) == [(0,), (1,)]


def test_narrow_heads_allow_more_padding():
    assert calls([4, 30], [256, 256], width=512) == [(0,), (1,)]
    assert calls([4, 30], [256, 256], width=16) == [(0, 1)]


def test_windows_without_text_take_no_part():
    assert calls([4, 0], [3, 3]) == [(0,)]
    assert calls([], []) == []


def test_equal_windows_need_one_mask_and_ragged_ones_their_own():
    import torch

    even = WindowLayout.from_insertions([4], [[(0, 2), (2, 2)]])
    odd = WindowLayout.from_insertions([5], [[(0, 2), (2, 2)]])
    cpu = torch.device("cpu")
    for layout, masks in ((even, 1), (odd, 2)):
        made = make_plan(layout, "both", 8, False)
        assert made is not None
        bias = made.calls[0].bias(3, torch.float64, cpu)
        assert bias is not None
        assert bias.shape[0] == masks
        assert bias.shape[2] == 3 * made.calls[0].queries
        assert bias.dtype == torch.float64
