"""PyTorch's CUDA path on a machine without a GPU: launcher.py starts a process that has one.

fakecuda.c stands in for the CUDA runtime and driver (LD_PRELOAD): a device is main memory, a kernel
is counted and does nothing. Tensors are PyTorch's own CUDA tensors, so the dispatcher, device
checks, the caching allocator, pinned memory, random states, torch.save and out-of-memory errors are
PyTorch's code. interpreter.py then computes each operation on CPU tensors that share the memory, so
that values are right, and counts what makes the host wait for the device.

It sees devices, waits, launches, memory and values. It does not see speed, races between streams,
the numerics of real kernels, CUDA graphs, or NCCL, which gloo replaces.
"""
