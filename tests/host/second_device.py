"""A device that no machine needs to have: its tensors are computed on the CPU, and mixing them with the CPU's own raises, as on a GPU.

Inside `with second_device():` PyTorch accepts `DEVICE` everywhere. Results are those of the CPU, bit for bit, so that a model whose weights
lie here and there can be compared with one that lies in one place.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("maia:0")
_CROSSING = ("aten::to", "aten::_to_copy", "aten::copy_", "aten::_copy_from")


class Remote(torch.Tensor):
    """A tensor that says it lies on `DEVICE`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device="cpu"
        )
        made.raw = raw
        return made

    @property
    def device(self):  # PyTorch's own C++ code sees a CPU tensor: it has no code for a device that does not exist
        return DEVICE

    def __repr__(self):
        return f"Remote({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Moves(TorchFunctionMode):
    """What PyTorch's C++ code would leave out, as it takes both devices for the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            return moved(*args, **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], Remote):
            here = args[0].raw.clone()
            return here if func is torch.Tensor.cpu else func(here, *args[1:], **kwargs)
        if func == torch.Tensor.data.__set__ and isinstance(args[0], Remote) != isinstance(args[1], Remote):
            return torch.utils.swap_tensors(args[0], torch.nn.Parameter(args[1], requires_grad=args[0].requires_grad))
        if func in (torch.tensor, torch.as_tensor) and _device(kwargs.get("device")):
            return Remote(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def moved(tensor, *args, **kwargs):
    """`tensor.to(...)`."""
    if not isinstance(tensor, Remote) and not any(_device(one) or isinstance(one, Remote) for one in (*args, *kwargs.values())):
        return tensor.to(*args, **kwargs)
    like = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
    copy = kwargs.pop("copy", False)
    if like is not None:
        device, dtype = like.device, like.dtype
    else:
        named = {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
        listed = [one for one in args if not isinstance(one, bool)]
        device = named.get("device", next((one for one in listed if isinstance(one, torch.device | str)), None))
        dtype = named.get("dtype", next((one for one in listed if isinstance(one, torch.dtype)), None))
    device = tensor.device if device is None else torch.device(device)
    there, is_there = device.type == DEVICE.type, isinstance(tensor, Remote)
    assert there or device.type == "cpu", f"a third device: {device}"
    raw = tensor.raw if is_there else tensor
    made = raw.to(dtype or raw.dtype, copy=copy or there != is_there)
    if made is raw:
        return tensor
    if there and not is_there:
        copied["bytes"] += made.nbytes
    return Remote(made) if there else made


copied = Counter()
"""Bytes that went "to" the device."""


def _device(one):
    return isinstance(one, torch.device | str) and str(one).partition(":")[0] == DEVICE.type


def run(func, args, kwargs):
    flat, spec = tree_flatten((args, kwargs))
    remote = [one for one in flat if isinstance(one, Remote)]
    local = [one for one in flat if isinstance(one, torch.Tensor) and not isinstance(one, Remote)]
    name = func._schema.name
    asked = [one for one in flat if isinstance(one, torch.device)]
    if name == "aten::_has_compatible_shallow_copy_type":
        return not (remote and local)
    crossing = name in _CROSSING
    if remote and any(one.ndim for one in local) and not crossing and name not in ("aten::index", "aten::index_put_"):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    goes_remote = _device(asked[-1]) if asked else bool(remote)
    if crossing and not asked and name == "aten::to" and len(flat) > 1 and isinstance(flat[1], torch.Tensor):  # to another tensor's device
        goes_remote = isinstance(flat[1], Remote)
    if name in ("aten::copy_", "aten::_copy_from"):
        goes_remote = isinstance(flat[0], Remote)
        copied["bytes"] += flat[1].nbytes if goes_remote and not isinstance(flat[1], Remote) else 0
    moves = (
        name in ("aten::to", "aten::_to_copy") and flat and isinstance(flat[0], torch.Tensor) and isinstance(flat[0], Remote) != goes_remote
    )
    if moves and goes_remote:
        copied["bytes"] += flat[0].nbytes
    known = {id(one.raw): one for one in remote}
    raws = [one.raw if isinstance(one, Remote) else torch.device("cpu") if _device(one) else one for one in flat]
    args, kwargs = tree_unflatten(raws, spec)
    if name == "aten::histc" and not args[0].is_floating_point():  # which a GPU counts, and the CPU does not
        out = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    else:
        out = func(*args, **kwargs)
    if moves and isinstance(out, torch.Tensor) and any(out is one for one in raws):  # another device is another tensor
        out = out.clone()
    if not goes_remote:
        return out
    return tree_map(lambda one: (known[id(one)] if id(one) in known else Remote(one)) if isinstance(one, torch.Tensor) else one, out)


@contextmanager
def second_device():
    copied.clear()
    kept = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `param.data = ` is not dispatched
    try:
        with Moves(), Mode():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(kept)
