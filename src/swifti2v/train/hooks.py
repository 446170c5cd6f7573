"""Listening to a network's inner layers without changing it. It knows modules, not what is done with what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

Key = TypeVar("Key")


@contextmanager
def listening(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """A dict that holds what each module gave in its last pass, while the context lasts; gradients flow through it."""
    heard: dict[Key, Tensor] = {}

    def listen(key: Key) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            heard[key] = output

        return hook

    with ExitStack() as hooks:
        for key, module in modules.items():
            hooks.enter_context(module.register_forward_hook(listen(key)))
        yield heard
