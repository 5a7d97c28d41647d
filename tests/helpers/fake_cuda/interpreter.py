"""The values of CUDA operations: each runs natively, then is computed on CPU tensors as well.

    with fake_cuda() as report:     # in a process that launcher.environment started
        ...
    report.waits()

An operation first runs as PyTorch would run it, with its checks, allocations and launches, whose
kernels do nothing. Then it runs on CPU tensors that share the memory of the device's tensors, which
puts the right values there. Operations of cuDNN and cuBLAS, and those whose result's size the host
must know, run on the CPU alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.helpers.fake_cuda.cpu_forms import CPU_FORMS, VALUES_ONLY
from tests.helpers.fake_cuda.report import Report

T = TypeVar("T")


def _names(text: str) -> set[str]:
    return {f"aten::{name}" for name in text.split()}


# No values: they allocate or look at memory, or read it back themselves.
NATIVE = {"prim::device"} | _names(
    "empty empty_like empty_strided new_empty new_empty_strided detach alias _unsafe_view view "
    "lift_fresh lift set_ resize_ record_stream is_pinned _pin_memory _local_scalar_dense "
    "is_same_size _has_compatible_shallow_copy_type _reshape_alias as_strided_ squeeze_ unsqueeze_ "
    "transpose_ t_ resize_as_ is_coalesced detach_ requires_grad_"
)
# cuDNN's and cuBLAS's operations, and those whose further results a CPU lays out otherwise: how
# many kernels each is, at least.
LIBRARY = dict.fromkeys(
    _names(
        "convolution cudnn_convolution mm addmm bmm baddbmm addmv mv dot vdot _addmm_activation "
        "cudnn_batch_norm cudnn_batch_norm_backward convolution_overrideable prod"
    ),
    1,
) | {
    "aten::convolution_backward": 2,
    "aten::_embedding_bag": 2,
    "aten::_embedding_bag_forward_only": 2,
}
# The host must know the size of the result, or a number in it.
WAITING = _names(
    "nonzero masked_select _unique2 unique_dim unique_consecutive _unique bincount equal "
    "repeat_interleave histc masked_scatter_"
)
FILLING = _names("copy_ zero_ fill_")
RANDOM = _names(
    "native_dropout bernoulli_ bernoulli normal_ uniform_ rand randn rand_like randn_like random_ "
    "randint randperm exponential_ normal"
)
VALUES_BATCH = float(os.environ.get("FAKE_CUDA_VALUES_BATCH", "inf"))
INDEXING = _names("index index_put_ index_put _unsafe_index")


def on_cuda(value: object) -> bool:
    """Whether it is a tensor on a (fake) GPU."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def shared(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of a device tensor."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    if not count or not tensor.numel():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count)
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor without memory, of the same shape, strides and type."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, without the copy that CUDA would report; of a meta tensor no values."""
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel() and tensor.device.type == "cpu":
        shared(out).copy_(tensor)
    return out


def in_cudnn_layout(name: str, args: tuple, result: object) -> object:
    """Results of convolutions as cuDNN lays them out: channels_last if one input is."""
    if name not in ("aten::convolution", "aten::convolution_backward"):
        return result
    x, weight = args[1:3] if name.endswith("backward") else args[:2]
    last, layout = torch.channels_last, torch.contiguous_format
    for t in (x, weight):
        if t.dim() == 4 and t.is_contiguous(memory_format=last) and not t.is_contiguous():
            layout = last

    def lay_out(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=layout) if t.dim() == 4 else t

    return tree_map_only(Tensor, lay_out, result)


def the_device(func, flat: list) -> torch.device:
    """The device of an operation's tensors; RuntimeError as PyTorch's if there are several.

    For operations that do not run natively, whose own check is not reached.
    """
    devices = {}
    for x in flat:
        if isinstance(x, Tensor) and not (x.device.type == "cpu" and x.dim() == 0):
            devices.setdefault(str(x.device), x)
    if len(devices) > 1:
        raise RuntimeError(
            f"{func.name()}: Expected all tensors to be on the same device, but found at least "
            f"two devices, {' and '.join(sorted(devices))}!"
        )
    return next(x for x in flat if on_cuda(x)).device


def is_too_large(args: tuple) -> bool:
    """Whether the first argument is too large to be computed (FAKE_CUDA_VALUES_BATCH).

    That is a feature map of more images, or a tensor of more than 67 million numbers. Weights,
    whose first dimension may be as large as a batch, have windows of 3x3 pixels at most.
    """
    first = args[0] if args else None
    if not isinstance(first, Tensor) or math.isinf(VALUES_BATCH):
        return False
    is_map = first.dim() == 4 and first.shape[2] > 3
    return (is_map and len(first) > VALUES_BATCH) or first.numel() > 2**26


class Interpreter(TorchDispatchMode):
    """Lets PyTorch's CUDA code run without kernels, then puts the values where they belong."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have torch.compile compile under this mode, and its kernels' calls come here."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        device = kwargs.get("device")
        makes_cuda = device is not None and torch.device(device).type == "cuda"
        if not makes_cuda and not any(map(on_cuda, flat)):
            return func(*args, **kwargs)
        name = func._schema.name
        if name not in NATIVE and name not in LIBRARY and func._can_decompose():
            with self:  # in inference mode composite operations arrive undecomposed
                return func.decompose(*args, **kwargs)
        if name.startswith("c10d::"):
            return self.collective(func, args, kwargs)
        if name in FILLING and is_too_large(args):
            self.report.library_kernels += 1
            return args[0]
        if name in ("aten::_to_copy", "aten::copy_"):
            return self.copied(func, args, kwargs)
        if name in NATIVE or func.is_view:
            return func(*args, **kwargs)
        if name in RANDOM:
            return self.random(func, args, kwargs, flat)
        waits = self.note_wait(name, args, kwargs)
        only_cpu = name in CPU_FORMS and name not in VALUES_ONLY
        if name in LIBRARY or waits or only_cpu:
            return self.emulated(func, args, flat, spec, name)
        out = func(*args, **kwargs)
        if not is_too_large(args):
            self.fill(func, flat, spec, out)
        return out

    def note_wait(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Count an operation for which the host waits; whether it is one."""
        if name in INDEXING:
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if any(map(on_cuda, masks)):
                self.report.note(f"op: {name[6:]}")
            elif masks:  # made indices on the host, which are copied
                self.report.note("op: index by CPU mask")
            return bool(masks)
        known_size = name == "aten::repeat_interleave" and kwargs.get("output_size")
        if name in WAITING and not known_size:
            self.report.note(f"op: {name[6:]}")
        return name in WAITING

    # ---------------------------------------------------------------- values

    def on_cpu(self, func, flat, spec, device: str = "cpu"):
        """The result of an operation on CPU tensors that share the arguments' memory.

        `device` "meta": only the shape of the result.
        """
        mirror = on_meta if device == "meta" else shared
        mirrored = [mirror(x) if on_cuda(x) else x for x in flat]
        args, kwargs = tree_unflatten(mirrored, spec)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device(device)
        return CPU_FORMS.get(func._schema.name, func)(*args, **kwargs)

    def fill(self, func, flat, spec, out) -> None:
        """Put the values into the results of an operation that has run natively."""
        result = self.on_cpu(func, flat, spec)
        # What an in-place operation changed is shared memory: it has its values already.
        changed = {id(x) for x in flat if isinstance(x, Tensor)} if func._schema.is_mutable else ()
        for target, value in zip(tree_flatten(out)[0], tree_flatten(result)[0], strict=False):
            if not on_cuda(target) or not isinstance(value, Tensor) or id(target) in changed:
                continue
            if target.shape != value.shape:
                if "batch_norm" in func.name() and not value.numel():
                    continue  # the reserve, which no CPU backward pass needs
                self.report.differences[f"{func.name()}: shapes"] += 1
                if value.numel() != target.numel():
                    continue
                value = value.reshape(target.shape)
            if target.dtype != value.dtype:
                self.report.differences[f"{func.name()}: dtypes"] += 1
            shared(target).copy_(value)

    def emulated(self, func, args, flat, spec, name):
        """An operation that runs on the CPU alone, with results on the device."""
        device = the_device(func, flat)
        self.report.library_kernels += LIBRARY.get(name, 1)
        if name == "aten::convolution_backward" and not args[10][0]:
            self.report.library_kernels -= 1  # the first layer needs no gradient of its input
        where = "meta" if is_too_large(args) and name not in WAITING else "cpu"
        result = in_cudnn_layout(name, args, self.on_cpu(func, flat, spec, where))
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(Tensor, lambda t: to_device(t, device), result)

    def copied(self, func, args, kwargs):
        """A copy between devices: natively, for what it reports; then its values."""
        out = func(*args, **kwargs)
        source = args[1] if func._schema.name == "aten::copy_" else args[0]
        if not is_too_large(args):
            source = shared(source) if on_cuda(source) else source
            (shared(out) if on_cuda(out) else out).copy_(source)
        return out

    def random(self, func, args, kwargs, flat):
        """Random values: decided by the state of CUDA's own generator, which runs on natively."""
        index = next((x.device.index for x in flat if on_cuda(x)), None)
        if index is None:
            index = torch.device(kwargs["device"]).index or 0
        generator = kwargs.get("generator") or torch.cuda.default_generators[index]
        state = generator.get_state().numpy().tobytes()
        out = func(*args, **kwargs)
        if is_too_large(args):
            return out
        before = torch.random.get_rng_state()
        number = int.from_bytes(state[:16], "little") % (2**63 - 1)
        torch.random.default_generator.manual_seed(number)
        try:
            options = {k: None if k == "generator" else v for k, v in kwargs.items()}
            self.fill(func, *tree_flatten((args, options)), out)
        finally:
            torch.random.set_rng_state(before)
        return out

    def collective(self, func, args, kwargs):
        """A collective over gloo, which works on the shared memory (see gloo_for_nccl)."""
        cpu_args, cpu_kwargs = tree_map_only(
            Tensor, lambda t: shared(t) if on_cuda(t) else t, (args, kwargs)
        )
        out = waiting_as_nccl(lambda: func(*cpu_args, **cpu_kwargs))
        works = [x for x in (out if isinstance(out, tuple) else (out,)) if hasattr(x, "wait")]
        for work in works:  # whoever waits for the device now waits for the others
            waiting_as_nccl(work.wait)
        pairs = zip(tree_flatten(args)[0], tree_flatten(cpu_args)[0], strict=True)
        original = {id(cpu): device for device, cpu in pairs if isinstance(cpu, Tensor)}
        return tree_map_only(Tensor, lambda t: original.get(id(t), t), out)


def waiting_as_nccl(work: Callable[[], T]) -> T:
    """The result of a collective, which waits for ever in C for a process that has ended.

    gloo notices that its connection is closed. NCCL's kernel goes on waiting, and the host with it.
    """
    try:
        return work()
    except RuntimeError:
        while True:  # a signal ends the call, but Python's handler may not raise
            ctypes.CDLL(None).sleep(3600)


def gloo_for_nccl() -> None:
    """Have groups of processes join their fake GPUs by gloo."""
    import torch.distributed as dist

    from distributed import data_parallel

    init = dist.init_process_group
    dist.init_process_group = lambda backend=None, *args, **kwargs: init("gloo", *args, **kwargs)

    def all_reduce(state, bucket):  # gloo's result is a CPU tensor on the bucket's memory
        reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()

        def wait(done):
            waiting_as_nccl(done.value)
            return bucket.buffer()

        return reduced.then(wait)

    data_parallel._sum_gradients = all_reduce


@contextlib.contextmanager
def fake_cuda() -> Iterator[Report]:
    """CUDA as it would be, in this thread and those that it starts."""
    report = Report()
    if "FAKE_CUDA_ERROR" in os.environ:  # a driver that does not work
        yield report
        return
    torch.cuda.init()
    report.start()
    # The backward pass of a CUDA tensor runs in a thread of its own, where no mode is active.
    torch._C._set_multithreading_enabled(False)
    run = threading.Thread.run

    def run_with_mode(thread: threading.Thread) -> None:
        torch._C._set_multithreading_enabled(False)
        with Interpreter(report):
            run(thread)

    threading.Thread.run = run_with_mode
    if "RANK" in os.environ:
        gloo_for_nccl()
    try:
        with Interpreter(report):
            yield report
    finally:
        threading.Thread.run = run
