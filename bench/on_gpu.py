"""A script of this folder, on a GPU: for comparisons that count rows or pictures and not seconds.

    python bench/on_gpu.py bench/cuts.py MODEL --data DIR ...

Sartor itself computes on the processor, as its users' machines do. Here networks lie on torch's first accelerator and new tensors are made there; what is drawn at random is drawn on the processor and then
moved, so that every row, seed and start is the one that it is without a GPU. Matrices are multiplied in TF32 (ten bits of digits; numbers between products are fp32). Times that the script prints are the GPU's.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sartor.stages.masters import Adam

DRAWING = ("rand", "randn", "randint", "randperm")
PART = 16  # rows or pictures in one pass, which is otherwise few for the sake of memory: all of a batch


def drawn_on_cpu(draw: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """`draw`, whose numbers are those of a processor's generator."""

    def drawn(*args: Any, **named: Any) -> Tensor:
        if named.get("generator") is None:
            return draw(*args, **named)
        return draw(*args, **named | {"device": "cpu"}).to(device)

    return drawn


def read_on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor's method that numpy calls, of a copy on the processor."""
    return lambda self, *args, **named: method(self.detach().cpu(), *args, **named)


def moved(load: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A loader of a network, or of one and what goes with it, whose network lies on the device."""

    def loaded(*args: Any, **named: Any) -> Any:
        found = load(*args, **named)
        return (found[0].to(device), *found[1:]) if isinstance(found, tuple) else found.to(device)

    return loaded


@torch.no_grad()
def update_(named: Mapping[str, Any], optimizers: Mapping[str, Adam], rate: float) -> None:
    """`masters.update_`, all tensors at once instead of one after the other: a GPU waits for the calls, not for the numbers."""
    named = {n: p for n, p in named.items() if p.grad is not None}
    of = [optimizers[n] for n in named]
    gradients = [p.grad.float() for p in named.values()]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, (1.0 / norm.clamp_min(1e-12)).clamp_max(1.0))
    states = [o.optimizer.state[o.moved] for o in of]
    steps = [s["step"] for s in states]
    torch._foreach_add_(steps, 1)
    rules = of[0].optimizer.param_groups[0]
    torch._fused_adamw_(
        [o.moved for o in of], gradients, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], steps,
        lr=rate, beta1=rules["betas"][0], beta2=rules["betas"][1], weight_decay=rules["weight_decay"], eps=rules["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
    for o in of:
        if o.size is not None:
            o.master.addcmul_(o.moved, o.size)
            o.moved.zero_()
    for p in named.values():
        p.grad = None


def settle(device: str) -> None:
    """Everything that follows in this process is computed on the device."""
    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")
    for name in DRAWING:
        setattr(torch, name, drawn_on_cpu(getattr(torch, name), device))
    from_numpy = torch.from_numpy
    torch.from_numpy = lambda array: from_numpy(array).to(device)
    for name in ("numpy", "__array__"):
        setattr(Tensor, name, read_on_cpu(getattr(Tensor, name)))
    from sartor.model import precision

    precision.running_dtype = lambda: torch.float32  # before others take it from there
    from sartor import job, picture_job, picture_view
    from sartor.stages import distil, tune

    for place, name in ((job, "load_dense"), (picture_job, "load_seer"), (picture_view, "load_vision")):
        setattr(place, name, moved(getattr(place, name), device))
    for training in (distil, tune):
        training.update_, training.PART = update_, PART


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("on_gpu: name a script of bench/ and its arguments, as bench/cuts.py MODEL --data DIR")
    if not torch.accelerator.is_available():
        sys.exit(
            "on_gpu: torch finds no GPU here: leave on_gpu.py out of the command, and the script runs on the processor"
        )
    sys.argv = sys.argv[1:]
    settle(str(torch.accelerator.current_accelerator()))
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
