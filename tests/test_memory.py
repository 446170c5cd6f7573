"""Where modules live: a choice checked at the door, the dtype decided by the processor alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from swifti2v import machine
from swifti2v.core import UsageError
from swifti2v.memory import DTYPES, MAX_THREADS, choose_placement, matmul_rate, place

X86 = "processor\t: 0\nmodel name\t: Some Xeon(R) 9999\nflags\t\t: fpu sse2 avx2 avx512f {}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (X86.format("avx512_bf16"), "avx512_bf16"),
        (X86.format("amx_bf16 avx512_bf16"), "amx_bf16"),
        (X86.format("avx512_bf16_like"), None),
        (X86.format(""), None),
        (ARM.format("svebf16"), "svebf16"),
        (ARM.format("bf16"), None),
        ("", None),
    ],
)
def test_bfloat16_where_the_processor_says_so(
    text: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_INFO", tmp_path / "cpuinfo")
    assert machine.bfloat16_instructions() == found
    chosen = choose_placement("cpu")
    assert chosen.dtype == (torch.bfloat16 if found else torch.float32)
    assert found is None or found in chosen.reason
    assert machine.cpu_name() and ("Xeon" in machine.cpu_name()) == ("model name" in text)


def test_where_there_is_no_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_INFO", tmp_path / "absent")
    assert machine.bfloat16_instructions() is None and machine.cpu_name()
    assert choose_placement("cpu").dtype == torch.float32


def test_the_choice_is_recorded_and_repeats() -> None:
    first, again = choose_placement("cpu", "auto", 1), choose_placement("cpu", "auto", 1)
    assert first == again and torch.get_num_threads() == 1
    settings = first.settings()
    assert set(settings) == {"device", "dtype", "threads", "dtype_reason"}
    assert all(isinstance(value, str) for value in settings.values())
    # What is recorded chooses the same again: that is how resume restores it.
    restored = choose_placement(settings["device"], settings["dtype"], int(settings["threads"]))
    assert (restored.device, restored.dtype, restored.threads) == (first.device, first.dtype, first.threads)


def test_dtypes_asked_for() -> None:
    for name, dtype in DTYPES.items():
        assert choose_placement("cpu", name).dtype == dtype
    assert choose_placement("cpu", "float32").reason == "asked for"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("toaster",), "use cpu, cuda"),
        (("",), "device"),
        (("cuda:97",), "CUDA devices found"),
        (("meta",), "holds no numbers"),
        (("cpu", "int3"), "use auto, float32"),
        (("cpu", "FLOAT32"), "is not known"),
        (("cpu", "auto", 0), "threads 0"),
        (("cpu", "auto", -3), "threads -3"),
        (("cpu", "auto", MAX_THREADS + 1), f"between 1 and {MAX_THREADS}"),
    ],
)
def test_refused_in_one_line(arguments: tuple[object, ...], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        choose_placement(*arguments)  # type: ignore[arg-type]
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has mps")
def test_mps_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="use cpu"):
        choose_placement("mps")


class Model(nn.Module):
    """A body, a part that its class keeps in float32, and integers."""

    _keep_in_fp32_modules = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.abnormal = nn.Linear(4, 4)  # "norm" is part of the word, not the name
        self.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)


def test_place_casts_all_but_what_is_kept() -> None:
    model, cpu = Model(), torch.device("cpu")
    place(model, cpu)
    assert model.body.weight.dtype == torch.float32
    place(model, cpu, torch.bfloat16)
    assert model.body.weight.dtype == model.abnormal.bias.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32 and model.count.dtype == torch.int64
    place(None, cpu, torch.bfloat16)


def test_float32_asked_for_is_float32_whatever_the_file_holds() -> None:
    model = Model().to(torch.bfloat16)
    place(model, torch.device("cpu"), torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int64}


def test_place_keeps_parameters_the_same_objects() -> None:
    """So that optimizers and hooks that hold them still do."""
    model = Model()
    held = model.body.weight
    place(model, torch.device("cpu"), torch.bfloat16)
    assert model.body.weight is held and held.dtype == torch.bfloat16


def test_matmul_rate_measures() -> None:
    assert matmul_rate(torch.float32, rounds=1) > 0
