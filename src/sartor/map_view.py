"""What channels of a convolutional network cost: bytes of its file, and time as the runtime takes it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from scipy.optimize import nnls
from torch import Tensor

from sartor.export import onnxrt, seen
from sartor.model.graph import INPUT, Graph
from sartor.model.graph_channels import Keep, channel_groups, shrink
from sartor.model.network import clone
from sartor.stages.allot_maps import MapCosts, layers_of, payload, read_by_head
from sartor.stages.eight import byte_grid, reading_bytes, round_, rounded_values
from sartor.stages.maps import block_of

TIMED, THREADS = 8, 2  # pictures, and threads, that time is measured with
MARGIN = 0.04  # of the time asked for: what is measured again in the end is a little different
# of all units, that the networks that are timed have, about: each twice, beside the whole and the smallest one
SHARES = (0.85, 0.7, 0.5, 0.35, 0.2)
# a grid, where only time and size matter; it ends below 6, as those of real networks do: there the runtime needs no step of its own to cut off
STANDS_FOR = (0.02, 0)


def map_costs(graph: Graph, budget: int) -> MapCosts:
    """What bytes are spent on, without time; the file's own are those of one that is written, which are the most: shorter lists have shorter lengths."""
    layers = tuple(layers_of(graph))
    units = tuple(g.units for g in channel_groups(graph))
    costs = MapCosts(layers, units, budget, 0, fixed=read_by_head(graph))
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "whole.onnx"
        seen.write(file, in_eight(graph), "int8")
        return replace(costs, overhead=file.stat().st_size - payload(costs))


def in_eight(graph: Graph) -> Graph:
    """A copy in eight bits that says nothing sensible: for its time and size."""
    new = reading_bytes(clone(graph))
    round_(new, dict.fromkeys(rounded_values(new), STANDS_FOR) | {INPUT: byte_grid(new) or STANDS_FOR})
    return new


def timed_maps(
    graph: Graph, original: Graph, costs: MapCosts, pixels: UInt8[Tensor, "n 3 s s"], faster: float, seed: int = 0
) -> tuple[MapCosts, float]:
    """The costs with time: seconds of a multiplication, of a number made and of a layer are fitted to networks of many widths and depths, measured in the runtime beside the original in fp32.

    Args:
        original: it may read larger pictures.
    Returns:
        (costs with time, how many times as fast the smallest network is).
    """
    rng = np.random.default_rng(seed)
    none, flat = [0] * len(costs.units), [u if n in costs.ends else 0 for n, u in enumerate(costs.units)]
    widths = [none, list(costs.most), *(_fewer(costs, share, rng) for share in (*SHARES, *SHARES))]
    widths += [flat] if costs.ends else []  # which differs from the whole in depth alone
    cut = {str(n): (of_widths(graph, gone), "int8") for n, gone in enumerate(widths)}
    found = seconds_of(cut | {"original": (original, "fp32")}, pixels)
    seconds = np.array([found[str(n)] for n in range(len(widths))])
    work = np.array([[*costs.work(gone), 1.0] for gone in widths])
    work[:, 3] *= bool(costs.ends)  # where none can go, layers are part of what remains whatever goes
    scale = np.maximum(work.max(0), 1.0)
    *prices, beside = nnls(work / scale, seconds)[0] / scale
    whole = (1 - MARGIN) * found["original"]
    timed = replace(costs, prices=tuple(map(float, prices)), limit=whole / faster - beside)  # type: ignore[arg-type]
    return timed, whole / (timed.seconds(costs.most) + beside)


def seconds_of(networks: Mapping[str, tuple[Any, str]], pixels: UInt8[Tensor, "n 3 s s"]) -> dict[str, float]:
    """Of a picture in the runtime, by turns in one run; networks: each with the weights that it is written with."""
    with tempfile.TemporaryDirectory() as tmp:
        files = {name: Path(tmp) / f"{name}.onnx" for name in networks}
        for name, (network, weights) in networks.items():
            seen.write(files[name], network, weights)
        found = onnxrt.speeds(files, pixels[:TIMED].numpy(), THREADS)
    return {name: told["seconds"] for name, told in found.items()}


def _fewer(costs: MapCosts, share: float, rng: np.random.Generator) -> list[int]:
    """How many units of each group are gone, whole blocks, where about this share stays; of some groups more, of others less, and some residual blocks as a whole."""
    found = []
    for n, units in enumerate(costs.units):
        block, levels = block_of(units), costs.levels(n)
        gone = block * round((1 - share * rng.uniform(0.5, 1.5)) * units / block)
        all_of_it = n in costs.ends and rng.random() < (1 - share) / 2
        deepest = max(level for level in levels if level < units)
        found.append(units if all_of_it else min(max(0, gone), deepest))
    return found


def of_widths(graph: Graph, gone: Sequence[int]) -> Graph:
    """The network in eight bits with so many units of every group gone: for its time and size."""
    return in_eight(shrink(graph, first_units(graph, gone)))


def first_units(graph: Graph, gone: Sequence[int]) -> Keep:
    """The first units of every group stay: for its time, not its words."""
    groups = zip(channel_groups(graph), gone, strict=True)
    return {g.name: torch.arange(g.units) < g.units - less for g, less in groups if less}
