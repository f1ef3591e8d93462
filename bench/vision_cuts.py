"""Sartor's cuts of a vision transformer beside published ones, at equal multiplications and equal fine-tuning.

    python bench/vision_cuts.py MODEL --data DIR [--generic DIR] [--removed 0.3 0.5 0.7] [--adapt 1760] [--tune 280 2528] [--side 112] [--seeds 0] [--only Sartor CORP-like]

The network adapts to the user once (cross entropy, `--adapt` pictures). Every arm cuts that network by the same share of multiplications (layers only) and is then tuned on
`--tune` pictures towards what it said (KL of classes and cosine of features on random views, a quarter of them generic pictures); more than one number tunes as often, each from the cut network. Accuracy and nats on the
held-out test photos in PyTorch, before and after tuning, to the adapted network and, picture by picture, to the first arm. With `--side` all of it on smaller pictures. 280 and 2,528 pictures are what 40 seconds and
a standard job's recovery see on two fast cores. Results: a table on stdout.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from vision_rivals import RIVALS, choose, macs, repair_, unit_macs

from sartor.effort import picture_effort_of
from sartor.job import Job
from sartor.model.network import BLOCK, anatomy, clone
from sartor.model.precision import running
from sartor.numerics.metrics import mean_interval
from sartor.picture_job import PreparedPictures
from sartor.picture_view import headed, shrunk, smaller
from sartor.pictures import RHO, Pictures, PictureSurgery, felt_pictures, priced, trained
from sartor.plan import LayerPlan, Plan, from_mask, to_mask
from sartor.sources import resolve
from sartor.stages.allot import Allotment, Costs, allot
from sartor.stages.buffer import IN_STEPS
from sartor.stages.fit import evidence_of, fit
from sartor.stages.masters import free, put_
from sartor.stages.probe import blended
from sartor.stages.prune import cut_
from sartor.stages.recognition import Recognized, recognize
from sartor.stages.tokens import sample
from sartor.stages.tune import Lessons, TuneConfig, may_mirror

FITTED = 192  # of the user's pictures
Kept = list[tuple[list[int], list[int]]]


def as_plan(whole: Any, kept: Kept) -> Plan:
    a = anatomy(whole)
    layers = (LayerPlan(to_mask(h, a.groups[n]), to_mask(c, a.ffn[n])) for n, (h, c) in enumerate(kept))
    return Plan("", a.family, 0, 0, None, None, tuple(layers), {}, 0.0, 0.0, {}, {}, {}, RHO, 0, settled=True)


def kept_of(found: Allotment) -> Kept:
    return [(from_mask(g), from_mask(c)) for g, c in zip(found.groups, found.channels, strict=True)]


@dataclass(frozen=True)
class Arm:
    """What stays, how the rest is repaired ("none", "own": the method's own, "stream", "generic"), and of Sartor's arms what the cut costs; steps: that it is made in while it is tuned."""

    kept: Kept
    repair: str
    costs: Costs | None = None
    steps: int = 1


def ours(whole: Any, pictures: Pictures, share: float, generic_only: bool) -> tuple[Kept, Costs]:
    """The allotment on backward probes, multiplications in the place of bytes."""
    a, tokens = anatomy(whole), whole.config.tokens
    half, e = running(whole), picture_effort_of("standard")
    user, _, generic = felt_pictures(half, pictures, e, 0)
    block, head = unit_macs(a, tokens)
    bytes_of = lambda b: block * sum(b.ffn) // BLOCK + head * sum(b.groups)  # noqa: E731
    effects = generic if generic_only else blended(user, generic, RHO)
    read = (
        replace(pictures, train=pictures.generic[::2], validation=pictures.generic[1::2]) if generic_only else pictures
    )
    costs = priced(half, read, effects, Costs(bytes_of, int((1 - share) * macs(a, tokens))), e, 0)
    return kept_of(allot(a, effects, costs)), costs


def fitted_(small: Any, whole: Any, pictures: Pictures, generic_only: bool) -> None:
    own, others = sample(pictures.train, FITTED, 0), sample(pictures.generic, FITTED // 2, 0)
    half = running(whole)
    evidence = evidence_of(half, own[:0] if generic_only else own, others, RHO)
    put_(small, fit(small, half, evidence, {}))


OURS = {
    "Sartor": (False, "stream", 1),
    "Sartor, four steps": (False, "stream", 4),
    "Sartor, no repair": (False, "none", 1),
    "Sartor, generic calibration": (True, "generic", 1),
}


def arms(whole: Any, pictures: Pictures, share: float, only: Collection[str]) -> dict[str, Arm]:
    a, found = anatomy(whole), dict[str, Arm]()
    chosen = cache(lambda generic_only: ours(whole, pictures, share, generic_only))
    for name, (generic_only, repair, steps) in OURS.items():
        if name in only:
            kept, costs = chosen(generic_only)
            found[name] = Arm(kept, repair, costs, steps)
    for name in (n for n in RIVALS if n in only):
        ranking = RIVALS[name](whole, pictures.train, pictures.labels)
        found[name] = Arm(choose(a, ranking, share), "own" if ranking.repaired else "none")
    return found


def cut(whole: Any, pictures: Pictures, arm: Arm) -> Any:
    """The network without what goes, repaired."""
    small = clone(whole)
    cut_(small, as_plan(whole, arm.kept))
    if arm.repair == "own":
        repair_(small, whole, pictures.train, arm.kept)
    elif arm.repair != "none":
        fitted_(small, whole, pictures, arm.repair == "generic")
    return small


def tuned(small: Any, whole: Any, pictures: Pictures, arm: Arm, mirror: bool, many: int, seed: int) -> Any:
    """A copy of the cut network, tuned; where the cuts are made in steps they are made anew, and their part of the tuning is spent in them."""
    config, network = TuneConfig(math.inf, 2e-3, checks=3, pictures=many), clone(small)
    lessons = Lessons(pictures.train, pictures.labels, mirror, pictures.generic, running(whole))
    if arm.costs and arm.steps > 1:
        plan = replace(as_plan(whole, arm.kept), settled=False, curves=arm.costs.curves, seed=seed)
        e = replace(picture_effort_of("standard"), fitted=FITTED)
        surgery = PictureSurgery(lessons, pictures, arm.costs, e, config, tell_step)
        network, _, _ = surgery.in_steps(clone(whole), plan, arm.steps)
        fitted_(network, whole, pictures, generic_only=False)
        config = config.part(1 - IN_STEPS)
    trained(network, free(network), lessons, pictures, config, seed)
    return network


def tell_step(stage: str, share: float, said: str) -> None:
    print(f"  {said}", flush=True)


def told(found: Recognized, dense: Recognized, first: Recognized | None) -> str:
    """Beside the adapted network, and the first arm beside it."""
    change, (low, high) = apart(found, dense, "right")
    text = f"{said(found)} ({change:+.1%} [{low:+.1%}, {high:+.1%}])"
    if first is None:
        return text
    (right, r), (nats, n) = (apart(first, found, what) for what in ("right", "nats"))
    return f"{text}; the first arm {right:+.1%} [{r[0]:+.1%}, {r[1]:+.1%}], {nats:+.3f} nats [{n[0]:+.3f}, {n[1]:+.3f}]"


def apart(one: Recognized, other: Recognized, what: str) -> tuple[float, tuple[float, float]]:
    """The mean difference of the same pictures, and its interval."""
    difference = (getattr(one, what).double() - getattr(other, what).double()).numpy()
    return float(difference.mean()), mean_interval(difference)


def said(found: Recognized) -> str:
    return f"{found.accuracy:.1%}, {float(found.nats.mean()):.3f} nats"


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Of a script about one network and one user's photos."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--generic")
    return parser


def opened(a: argparse.Namespace) -> tuple[Any, Pictures, tuple[Tensor, Tensor]]:
    """(The network as it came, with its head; what the stages see; test photos and labels), for pictures of `--side`."""
    job = Job(a.model, a.data, "50%", generic=a.generic)
    p = PreparedPictures(job, resolve(a.model), lambda *_: None)
    came_with, pictures, test = p.dense, p.pictures, p.album.test.pixels
    if a.side:
        came_with, pictures, test = headed(p, a.side, 0)[0], shrunk(pictures, a.side), smaller(test, a.side)
    return came_with, pictures, (test, p.labels[2])


def adapted(came_with: Any, pictures: Pictures, mirror: bool, many: int, seed: int) -> Any:
    """A copy trained on so many pictures of the user's."""
    whole = clone(came_with)
    lessons = Lessons(pictures.train, pictures.labels, mirror, pictures.generic)
    trained(whole, free(whole), lessons, pictures, TuneConfig(math.inf, 1e-3, pictures=many), seed)
    return whole


@dataclass(frozen=True)
class Round:
    """One seed: the network adapted with it, what the stages see, whether views are mirrored, test photos with labels, and what the adapted network says of them."""

    seed: int
    whole: Any
    pictures: Pictures
    mirror: bool
    test: tuple[Tensor, Tensor]
    dense: Recognized


def rounds(a: argparse.Namespace, also: Callable[[Any], str] = lambda whole: "") -> Iterator[Round]:
    """A round a seed, told on stdout; also: what else is said of the network."""
    came_with, pictures, test = opened(a)
    mirror = may_mirror(came_with, *pictures.judged)
    for seed in a.seeds:
        whole = adapted(came_with, pictures, mirror, a.adapt, seed)
        dense = recognize(running(whole), *test)
        came = said(recognize(running(came_with), *test))
        print(f"{Path(a.data).name}, seed {seed}: as it came {came}; adapted {said(dense)}{also(whole)}", flush=True)
        yield Round(seed, whole, pictures, mirror, test, dense)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--adapt", type=int, default=1760)
    parser.add_argument("--tune", type=int, nargs="+", default=[280, 2528])
    parser.add_argument(
        "--side", type=int, help="of the pictures, in pixels; as the model wants them where it is left out"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of arms; all where it is left out")
    a = parser.parse_args()
    if unknown := set(a.only or ()) - {*RIVALS, *OURS}:
        parser.error(f"there is no arm '{unknown.pop()}': take some of {', '.join((*OURS, *RIVALS))}")
    for r in rounds(a):
        whole, pictures = r.whole, r.pictures
        for share in a.removed:
            firsts: dict[int, Recognized] = {}
            for name, arm in arms(whole, pictures, share, a.only or (*RIVALS, *OURS)).items():
                small = cut(whole, pictures, arm)
                for many in a.tune if arm.steps > 1 else (0, *a.tune):  # what is cut in steps is cut while it is tuned
                    network = tuned(small, whole, pictures, arm, r.mirror, many, r.seed) if many else small
                    left = macs(anatomy(network), whole.config.tokens) / macs(anatomy(whole), whole.config.tokens)
                    found = recognize(running(network), *r.test)
                    line = told(found, r.dense, firsts.get(many))
                    print(f"{1 - left:.0%} gone: {name:28s} {f'tuned on {many}' if many else 'cut'} {line}", flush=True)
                    firsts.setdefault(many, found)


if __name__ == "__main__":
    main()
