"""The meters count what they say: lifetimes of storages, FLOPs on real and meta tensors, resident memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swifti2v.meters import FlopMeter, LiveBytes, current_rss, measure, peak_rss, reset_peak_rss

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="resident size is read from /proc")


def test_a_storage_counts_once_and_until_its_last_view_is_gone() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(1000)
        part = whole[10:]
        grid = part.view(99, 10)
        assert live.current == 4000
        del whole, part
        assert live.current == 4000
        del grid
        assert live.current == 0
    assert live.peak == 4000


def test_what_existed_before_does_not_count() -> None:
    weight = torch.zeros(1000)
    with LiveBytes() as live:
        view = weight.view(10, 100)
        view.add_(1)
        assert live.current == live.peak == 0


def test_the_graph_keeps_what_it_saved() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes() as live:
        y = (x * 2).exp()
        loss = y.sum()
        del y
        assert live.current == 4000 + 4  # exp saves its result
        loss.backward()
        assert live.current == 4000 + 4  # freed; the gradient came
        del loss
        assert live.current == 4000


def test_a_storage_that_grows_is_charged_the_difference() -> None:
    with LiveBytes() as live:
        x = torch.empty(0)
        x.resize_(1000)
        assert live.current == 4000
        del x
        assert live.current == 0


def test_reset_peak_starts_from_what_is_alive() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        torch.zeros(5000)
        live.reset_peak()
        assert live.peak == 4000
        torch.zeros(100)
    assert live.peak == 4400
    assert kept.shape == (1000,)


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_books_balance(script: list[tuple[int, bool]]) -> None:
    """Any sequence of making and dropping tensors: current is the sum of what is held, peak its maximum."""
    held: list[torch.Tensor] = []
    highest = 0
    with LiveBytes() as live:
        for size, drop in script:
            held.append(torch.ones(size))
            highest = max(highest, sum(t.nbytes for t in held))
            if drop:
                held.pop(0)
            assert live.current == sum(t.nbytes for t in held)
        held.clear()
        assert live.current == 0
    assert live.peak == highest


def test_meta_and_real_runs_cost_the_same() -> None:
    def run(device: str) -> tuple[int, int]:
        with torch.device(device):
            net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            x = torch.zeros(32, 64)
        cost = measure(lambda: net(x))
        return cost.flops.total, cost.peak_bytes

    assert run("meta") == run("cpu") == (2 * 2 * 32 * 64 * 256, 2 * 32 * 256 * 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_fused_and_counted(device: str) -> None:
    b, h, length, source, d = 2, 4, 100, 60, 16
    q, k = torch.zeros(b, h, length, d, device=device), torch.zeros(b, h, source, d, device=device)
    cost = measure(lambda: F.scaled_dot_product_attention(q, k, k))
    assert cost.flops.total == cost.flops.attention == 4 * b * h * length * source * d
    assert cost.peak_bytes == b * h * length * (d + 1) * 4  # the result and its log-sum-exp, no scores


def test_attention_keeps_the_layout_that_real_kernels_give() -> None:
    q = torch.zeros(1, 50, 4, 16, device="meta").transpose(1, 2)
    with LiveBytes() as live:
        out = F.scaled_dot_product_attention(q, q, q)
        before = live.current
        out.transpose(1, 2).flatten(2)  # a view, not a copy
        assert live.current == before


def test_convolutions_and_products_are_counted() -> None:
    x, w = torch.zeros(1, 8, 3, 10, 10), torch.zeros(16, 8, 1, 3, 3)
    with FlopMeter() as meter:
        F.conv3d(x, w, padding=(0, 1, 1))
        torch.einsum("bctij,cd->bdtij", x, torch.zeros(8, 5))
    assert meter.count.total == 2 * 16 * 8 * 9 * 300 + 2 * 300 * 8 * 5
    assert meter.count.attention == 0


@LINUX
def test_peak_rss_sees_a_large_block_and_can_start_anew() -> None:
    size = 200 * 2**20
    before = peak_rss()
    assert 0 < current_rss() <= before
    block = torch.ones(size // 4)
    assert peak_rss() >= current_rss() > size
    del block
    if reset_peak_rss():
        assert peak_rss() <= before + size // 4


@LINUX
def test_a_child_does_not_inherit_its_parents_peak() -> None:
    block = torch.ones(200 * 2**20 // 4)
    code = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1024
    assert child < 100 * 2**20 < block.nbytes
