"""Models larger than the memory: tensors that lie on disk and are in memory only while they are looked at.

Within `paging(folder)`, what is made here lies in files of that folder without a name, which are gone with the process however it ends. To whoever computes they are
tensors like all others: the system fetches their pages when they are touched. `let_go` hands the pages back and changes no value; forgetting it costs memory, never truth.
Outside of `paging` everything here is torch's own, in memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sartor.errors import OutputError

LEAST = 1 << 20  # bytes of a tensor that is worth a file
DONT_NEED = 4  # sys/mman.h: of a shared mapping the file keeps what was written


class _Idle:
    """Tensors on disk that nobody needs for a while and that still are in memory, as many as there is room for.

    Which one goes is drawn: layers are passed through in circles, and whatever has been idle longest is needed next.
    """

    def __init__(self, room: int) -> None:
        self.room, self.total = room, 0
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.order: list[int] = []
        self.draw = random.Random(0)  # of no consequence to any value

    def add(self, storage: torch.UntypedStorage) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self.known:
            self.total -= self.known[at][1]
        else:
            self.order.append(at)
        self.known[at] = StorageWeakRef(storage), size
        self.total += size
        while self.total > self.room:
            self._drop(self.draw.randrange(len(self.order)))

    def _drop(self, n: int) -> None:
        at, self.order[n] = self.order[n], self.order[-1]
        self.order.pop()
        ref, size = self.known.pop(at)
        self.total -= size
        if not ref.expired():  # else somebody else may have its place
            _hand_back(at, size)


_folder: Path | None = None  # of the job that this process is at
_idle = _Idle(0)


@contextmanager
def paging(folder: Path | None, room: int = 0) -> Iterator[None]:
    """Large tensors lie in `folder` while the body runs, and so many bytes of those that nobody needs stay in memory, too; None leaves all in memory."""
    global _folder, _idle
    before = _folder, _idle
    _folder, _idle = folder, _Idle(room)
    try:
        yield
    finally:
        _folder, _idle = before


def on() -> bool:
    return _folder is not None


def zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """A new tensor."""
    folder, many = _folder, math.prod(shape)
    if folder is None or many * dtype.itemsize < LEAST:
        return torch.zeros(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".pages-") as file:  # a new file is full of zeros
        _reserve(file.fileno(), many * dtype.itemsize, folder)
        return torch.from_file(file.name, shared=True, size=many, dtype=dtype).reshape(shape)


def _reserve(file: int, size: int, folder: Path) -> None:
    """Room on the disk now: a mapping that finds none later ends the process without a word."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise OutputError(
            f"the disk of '{folder.name}' is full ({error.strerror}): make room and add --resume, or choose another --out"
        ) from error


def copied(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that shares nothing with `t`."""
    if not on() or t.is_meta:
        return t.detach().to(dtype or t.dtype, copy=True)
    new = zeros(t.shape, dtype or t.dtype).copy_(t.detach())
    let_go(new, t)
    return new


def kept(t: Tensor) -> Tensor:
    """`t`, on disk from now on: for what was just made and is needed later."""
    return copied(t) if on() and t.nbytes >= LEAST and not _paged(t) else t


def let_go(*tensors: Tensor) -> None:
    """These are not needed for a while."""
    for t in tensors:
        if _paged(t):
            _idle.add(t.untyped_storage())


def each(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """One after the other, each let go once the next is asked for."""
    for t in tensors:
        yield t
        let_go(t)


def let_go_of(module: torch.nn.Module) -> None:
    """Its weights are not needed for a while, nor their gradients."""
    let_go(*(t for p in module.parameters() for t in (p.data, p.grad) if t is not None))


def emptied(t: Tensor) -> Tensor | None:
    """A gradient that was used: all zeros where it has a file, to be added to again; None in memory."""
    if not _paged(t):
        return None
    t.zero_()
    let_go(t)
    return t


def _paged(t: Tensor) -> bool:
    """Whether it lies in a file of ours: memory that has none would be lost."""
    return t.untyped_storage().filename is not None


def _found() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform in {"linux", "darwin"} else None


_madvise = _found()


def _hand_back(at: int, size: int) -> None:
    if _madvise is not None:
        _madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), DONT_NEED)


class _Recomputed(torch.autograd.Function):
    """A layer that keeps only what it read, and runs once more on the way back (Chen et al. 2016, arXiv:1604.06174); its weights are let go after either."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], layer: torch.nn.Module, x: Tensor) -> Tensor:
        ctx.run, ctx.layer = run, layer
        ctx.save_for_backward(x)
        y = run(x)
        let_go_of(layer)
        return y

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[None, None, Tensor | None]:
        (saved,) = ctx.saved_tensors
        x = saved.detach().requires_grad_(True)
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, above[0])
        let_go_of(ctx.layer)
        return None, None, x.grad


def one_layer(run: Any, x: Tensor) -> Tensor:
    """transformers' hook for checkpointing (`GradientCheckpointingLayer`), whose `run` is a partial of the layer's own forward: the same result, and afterwards no memory is held but for what it read and said."""
    layer = run.args[0] if run.args else run.func.__self__
    if torch.is_grad_enabled() and x.requires_grad:
        return _Recomputed.apply(run, layer, x)
    y: Tensor = run(x)
    let_go_of(layer)
    return y


def layer_by_layer_(layers: Any) -> None:
    """Where tensors lie on disk, these layers of transformers' are run by `one_layer` from now on, and copies of them too; nothing else of them is in training mode."""
    for layer in layers if on() else ():
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = one_layer


def as_usual_(layers: Any) -> None:
    """These layers are run by transformers alone again."""
    for layer in layers:
        layer.gradient_checkpointing = layer.training = False
