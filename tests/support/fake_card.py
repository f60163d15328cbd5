"""What cases on the pretend GPU need: models and values on the card, and whatever waits for it.

    with card() as watch:
        model = on_card(model)           # a copy, all of whose tensors are fake ones on cuda:0
        with watch.counting() as synchronisations:
            step()

Inside, tensors on the host have numbers as everywhere, and are computed with. Those on the card
have none: where code reads one, the reading is noted and 1 is returned, so that a case goes on and
shows all that would wait.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.utils import import_utils

from veneer.adapter import experts
from veneer.kernels import choice
from veneer.quant.stack import QuantizedStack
from veneer.quant.weight import QuantizedWeight

CARD = torch.device("cuda:0")
# The card that it is; kernels of Triton would need a true one.
HOPPER, HOST = choice.Device("cuda", (9, 0), flash=True), choice.Device("cpu")
aten = torch.ops.aten
# Operations that look on the host at whether they have worked.
CHECKED = {"_linalg_check_errors", "_linalg_svd", "_linalg_eigh", "linalg_eig"}
WAITING_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
NOT_WAITING = {"aten::repeat_interleave.Tensor": "output_size"}  # where this is given
OURS = ("/src/veneer/", "/site-packages/transformers/")


@contextmanager
def card() -> Iterator[Watch]:
    """Let tensors be on cuda:0 as fake ones, and yield what watches over them."""
    state = torch.zeros(16, dtype=torch.uint8)
    with (
        # With fake tensors transformers leaves out readings that it does with true ones.
        patch.object(import_utils, "is_fake_tensor", lambda tensor: False),
        patch.object(choice, "device_of", lambda device: HOPPER if device == CARD else HOST),
        patch.object(torch.cuda, "get_device_capability", lambda *args: HOPPER.capability),
        patch.object(torch.accelerator, "current_stream", lambda *args: torch.Stream(CARD)),
        # In inference mode an empty tensor is made where fake tensors do not see it.
        patch.object(torch, "inference_mode", _without_gradients),
        patch.object(torch.cuda, "get_rng_state", lambda *args: state),
        patch.object(torch.cuda, "set_rng_state", lambda *args: None),
        FakeTensorMode(allow_non_fake_inputs=True),
        Watch() as watch,
    ):
        yield watch


def _without_gradients(mode: bool = True) -> AbstractContextManager[Any]:
    return torch.no_grad() if mode else nullcontext()


def on_card(value: Any) -> Any:
    """Return a deep copy of a value, a model or a model and what refers to it, on the card.

    Parameters are replaced one by one: `to` does not exchange true tensors for fake ones.
    """

    def quantized(weight: QuantizedWeight, memo: dict[int, Any]) -> QuantizedWeight:
        return memo.setdefault(id(weight), weight.to(CARD))

    def stacked(stack: QuantizedStack, memo: dict[int, Any]) -> QuantizedStack:
        each = [quantized(weight, memo) for weight in stack.experts]
        return QuantizedStack(each, transposed=stack.transposed)

    memo: dict[int, Any] = {}
    with (
        patch.object(QuantizedWeight, "__deepcopy__", quantized),
        patch.object(QuantizedStack, "__deepcopy__", stacked),
        _ToCard(),
    ):
        copied = copy.deepcopy(value, memo)
        # What was proven of a module by numbers holds for its copy, which has none.
        for module, proven in list(experts._PROVEN.items()):
            if (other := memo.get(id(module))) is not None:
                experts._PROVEN[other] = copy.deepcopy(proven, memo)
    return copied


class _ToCard(TorchFunctionMode):
    """Lets a deep copy of a tensor be a fake one on the card."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch._C.TensorBase.clone:  # by which a parameter is copied
            return _fake(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _fake(tensor).requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        return func(*args, **kwargs)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CARD, requires_grad=False
    )


class Watch(TorchDispatchMode):
    """Notes what would wait for the card, and computes on the host what is there.

    It waits to read a value that an argument, a shape or a copy to the host needs, and to copy to
    the card what is not in pinned memory (or is, and is not sent with `non_blocking`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[str] | None = None
        self._pinned: dict[int, Any] = {}  # storages, which stay, so that no other has their number

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """Yield a list of what waits for the card meanwhile: the operation, and where it is."""
        before, self._noted = self._noted, []
        try:
            yield self._noted
        finally:
            self._noted = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
        if func in (aten.is_pinned.default, aten._pin_memory.default):
            return self._pins(func, args[0])
        pins = kwargs.pop("pin_memory", None) if "pin_memory" in kwargs else None
        if self._is_of_host(tensors, kwargs):
            with _disable_current_modes():
                result = func(*args, **kwargs)
        else:
            result = self._on_card(func, args, kwargs, tensors)
        if pins and isinstance(result, Tensor):
            self._remember(result)
        return result

    def _is_of_host(self, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        device = kwargs.get("device")
        if any(isinstance(x, FakeTensor) or x.device.type != "cpu" for x in tensors):
            return False
        return device is None or torch.device(device).type == "cpu"

    def _on_card(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        is_card = any(x.device.type == CARD.type for x in tensors)
        name = func.name()
        if func is aten._local_scalar_dense.default:
            if is_card:
                self._note(name)
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is aten.equal.default:
            self._note(name)
            return True
        if func is aten.nonzero.default:
            self._note(name)
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # It loops over the experts, whose sizes it reads (GroupedBlas.cpp); what computes its
            # shape takes nothing but bf16.
            self._note(name)
            x, weight, *others = args
            return func(x.bfloat16(), weight.bfloat16(), *others, **kwargs).to(x.dtype)
        if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            return self._index(func, args, kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            self._copy(func, args, kwargs)
            if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
                with _disable_current_modes():
                    return args[0].fill_(1)  # memory of the host, whose numbers are read
        elif is_card and (
            (WAITING_TAGS & set(func.tags) and kwargs.get(NOT_WAITING.get(name, "")) is None)
            or name.removeprefix("aten::") in CHECKED
        ):
            self._note(name)
        return func(*args, **kwargs)

    def _index(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, indices = args[0], [i for i in args[1] if i is not None]
        if x.device.type == CARD.type and any(i.device.type == "cpu" and i.ndim for i in indices):
            self._note(f"{func.name()} by a tensor of the host")
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return func(*args, **kwargs)
        if func is aten.index.Tensor:
            self._note(f"{func.name()} by a mask")
            assert args[1][0] is masks[0]
            return x.new_empty(masks[0].numel(), *x.shape[masks[0].ndim :])
        if args[2].numel() != 1:  # of one value it is masked_fill
            self._note(f"{func.name()} by a mask")
        return x

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if func is aten.copy_.default:
            to, source = args[0].device, args[1]
            is_async = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            is_async &= self.is_pinned(args[0] if to.type == "cpu" else source)
        else:
            source = args[0]
            to = torch.device(kwargs.get("device") or source.device)
            is_async = bool(kwargs.get("non_blocking"))
            # To the host it takes pinned memory by itself.
            is_async &= to.type == "cpu" or self.is_pinned(source)
        kinds = source.device.type, to.type
        if source.numel() and not is_async and kinds in ((CARD.type, "cpu"), ("cpu", CARD.type)):
            self._note(f"{func.name()} to the {'host' if to.type == 'cpu' else 'card'}")

    def _pins(self, func: Any, tensor: Tensor) -> Any:
        if func is aten.is_pinned.default:
            return self.is_pinned(tensor)
        with _disable_current_modes():
            result = tensor.clone()
        self._remember(result)
        return result

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in memory that would be pinned."""
        return tensor.untyped_storage()._cdata in self._pinned

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage

    def _note(self, what: str) -> None:
        if self._noted is not None:
            self._noted.append(f"{what} in {_place()}")


def _place() -> str:
    """Return the innermost place in our code or transformers', as file:line function."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        for folder in OURS:
            if folder in path:
                file = path.partition(folder)[2]
                return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "other code"
