"""Cuts of a convolutional network at equal multiplications and equal fine-tuning, and how fast what they leave is in ONNX Runtime.

    python bench/map_cuts.py mobilenet_v2.onnx --data DIR [--generic DIR] [--removed 0.5 0.75] [--adapt 3000] [--tune 280 2528] [--seeds 0] [--side 160] [--only Sartor ...]

The network, read where its features are clearest, adapts to the user once (cross entropy, `--adapt` pictures). Every arm cuts that network down to the same share of its multiplications, in whole blocks of
channels, in fp32; Sartor's are fitted to what it said; all are tuned on `--tune` pictures towards it, each number from the cut network anew. Accuracy and nats on the held-out test photos in PyTorch, beside the
adapted network and, picture by picture, the first arm; milliseconds a picture of the fp32 files, by turns in one run on two threads, the first of them the adapted network.

    Sartor             curves of what each group of channels costs once its readers are fitted; residual blocks may go as a whole
    no whole blocks    the same, but some channels of every block stay
    sums               by the sums of effects, without curves
    same share         of every group, its channels by effects, fitted as ours
    magnitude          the same share of every group, its channels by the norm of their weights (Li et al. 2017, over all layers of a group as Torch-Pruning does it); not fitted
    Taylor             the same share of every group, its channels by |weight x gradient| (Molchanov et al. 2019); not fitted
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vision_cuts import Round, parser_of, rounds, told

from sartor.carving import MAPS, keep_of
from sartor.effort import picture_effort_of
from sartor.map_view import map_costs, seconds_of
from sartor.model.graph import Graph, macs, shapes
from sartor.model.graph_channels import channel_groups, kept_channels, shrink
from sartor.model.network import clone
from sartor.model.precision import running
from sartor.pictures import RHO, Pictures, felt_pictures, priced, trained
from sartor.plan import LayerPlan, to_mask
from sartor.stages.allot_maps import MapCosts, allot_maps
from sartor.stages.maps import block_of, blocks_of
from sartor.stages.masters import free
from sartor.stages.probe import Effects, blended
from sartor.stages.recognition import Recognized, recognize
from sartor.stages.refit import refit_maps, room_for, seen_of
from sartor.stages.tune import Lessons, TuneConfig

FITTED, BATCH = 192, 16
Masks = tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """What all arms are made of: the adapted network, what it needs, what multiplications may be left and what cuts were measured to cost."""

    whole: Graph
    pictures: Pictures
    effects: Effects
    costs: MapCosts


def subject(whole: Graph, pictures: Pictures, share: float, seed: int) -> Subject:
    """With multiplications in the place of seconds."""
    e, half = picture_effort_of("standard"), running(whole)
    user, _, generic = felt_pictures(half, pictures, e, seed)
    effects = blended(user, generic, RHO) if generic else user
    plain = replace(map_costs(whole, 1 << 60), prices=(1.0, 1.0, 0.0, 0.0))
    limit = (1 - share) * plain.seconds([0] * len(plain.units))
    return Subject(whole, pictures, effects, priced(half, pictures, effects, replace(plain, limit=limit), e, seed))


def by_curves(s: Subject) -> Masks:
    return allot_maps(s.effects, s.costs).channels


def without_whole_blocks(s: Subject) -> Masks:
    layers = tuple(replace(layer, ends={}) for layer in s.costs.layers)
    return allot_maps(s.effects, replace(s.costs, layers=layers)).channels


def by_sums(s: Subject) -> Masks:
    return allot_maps(s.effects, replace(s.costs, curves={})).channels


def same_share(s: Subject, worth: dict[int, Tensor]) -> Masks:
    """The largest share of every group, in whole blocks of the channels that are worth least, that leaves few enough multiplications."""
    blocks = blocks_of(replace(s.effects, channel=worth))[0]
    for percent in range(1, 100):
        gone = [
            0 if n in s.costs.fixed else min(block_of(u) * round(percent / 100 * u / block_of(u)), u - block_of(u))
            for n, u in enumerate(s.costs.units)
        ]
        if s.costs.seconds(gone) <= s.costs.limit:
            break
    kept = (torch.cat(b[less // block_of(u) :]) for b, less, u in zip(blocks, gone, s.costs.units, strict=True))
    return tuple(to_mask(sorted(k.tolist()), u) for k, u in zip(kept, s.costs.units, strict=True))


def magnitude(s: Subject) -> dict[int, Tensor]:
    return _over_weights(s.whole, lambda weight, _: weight.square())


def taylor(s: Subject) -> dict[int, Tensor]:
    """With the gradients of the labels' cross entropy on all training pictures."""
    network, p = clone(s.whole).requires_grad_(True), s.pictures
    for pixels, labels in zip(p.train.split(BATCH), p.labels.split(BATCH), strict=True):
        (nn.functional.cross_entropy(network(pixels), labels, reduction="sum") / len(p.labels)).backward()
    return _over_weights(network, lambda weight, gradient: (weight * gradient).abs())


def _over_weights(graph: Graph, of: Callable[[Tensor, Any], Tensor]) -> dict[int, Tensor]:
    """Of every group's units, summed over the rows that make them and the columns that read them."""
    found = {}
    for n, group in enumerate(channel_groups(graph)):
        worth = torch.zeros(group.units)
        for parts, axis in ((group.rows, 0), (group.columns, 1)):
            for name, part in parts.items():
                weight: Any = graph.layers[name].weight
                each = of(weight.detach(), weight.grad).transpose(0, axis).flatten(1).sum(1)
                worth.index_add_(0, part.unit, each[part.at])
        found[n] = worth
    return found


@dataclass(frozen=True)
class Arm:
    masks: Callable[[Subject], Masks]
    fitted: bool


ARMS = {
    "Sartor": Arm(by_curves, True),
    "no whole blocks": Arm(without_whole_blocks, True),
    "sums": Arm(by_sums, True),
    "same share": Arm(lambda s: same_share(s, dict(s.effects.channel)), True),
    "magnitude": Arm(lambda s: same_share(s, magnitude(s)), False),
    "Taylor": Arm(lambda s: same_share(s, taylor(s)), False),
}


def cut(s: Subject, arm: Arm) -> Graph:
    keep = keep_of(s.whole, tuple(LayerPlan("0:0", mask) for mask in arm.masks(s)))
    small, p = shrink(s.whole, keep), s.pictures
    if not arm.fitted:
        return small
    room = min(room_for(s.whole, shapes(s.whole)), FITTED + FITTED // 2)
    seen = seen_of(p.train[:FITTED], p.generic[: FITTED // 2], RHO, room)
    return refit_maps(small, s.whole, kept_channels(s.whole, keep)[0], seen, eight=False)


def compared(s: Subject, a: Any, r: Round) -> None:
    p, files, firsts = s.pictures, {"adapted": (s.whole, "fp32")}, dict[int, Recognized]()
    whole = sum(macs(s.whole).values())
    lessons = Lessons(p.train, p.labels, r.mirror, p.generic, running(s.whole))
    for name in a.only:
        small = cut(s, ARMS[name])
        files[name] = small, "fp32"
        blocks = MAPS.gone(s.whole, small).get("residual_blocks", 0)
        left = sum(macs(small).values()) / whole
        for many in (0, *a.tune):
            network: Any = clone(small)
            if many:
                config = TuneConfig(math.inf, 2e-3, checks=3, pictures=many)
                trained(network, free(network), lessons, p, config, r.seed)
            found = recognize(running(network), *r.test)
            line = told(found, r.dense, firsts.get(many))
            print(
                f"{1 - left:.1%} gone, {blocks} whole blocks: {name:16s} {f'tuned on {many}' if many else 'cut'} {line}",
                flush=True,
            )
            firsts.setdefault(many, found)
    times = seconds_of(files, r.test[0])
    print(
        "ms a picture, fp32: "
        + ", ".join(f"{name} {1e3 * t:.2f} ({times['adapted'] / t:.2f}x)" for name, t in times.items()),
        flush=True,
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--adapt", type=int, default=3000)
    parser.add_argument("--tune", type=int, nargs="+", default=[280, 2528])
    parser.add_argument("--side", type=int, help="of the pictures, in pixels; the model's own where it is left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    a = parser.parse_args()
    for r in rounds(a, lambda whole: f"; {sum(macs(whole).values()) / 1e6:.1f} M multiplications"):
        for share in a.removed:
            compared(subject(r.whole, r.pictures, share, r.seed), a, r)


if __name__ == "__main__":
    main()
