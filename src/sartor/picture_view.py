"""What the fitted network will look at: pictures as large as the original's, or smaller ones where time is asked for.

A picture's side is a cut like any other. The heads' reading of each other grows with the fourth power of it, everything else, and all of a convolutional network, with the square; the damage is what the head says worse of
smaller pictures, in nats on pictures left out, and is weighed against the damage foretold of the heads and channels that would have to go instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from sartor.carving import carving_of, four_damage
from sartor.effort import picture_effort_of
from sartor.errors import BudgetError
from sartor.export import onnx_file
from sartor.job import Job
from sartor.map_view import MARGIN, map_costs, of_widths, seconds_of, timed_maps
from sartor.model.checkpoints import load_vision
from sartor.model.graph import Graph
from sartor.model.graph_channels import at_size
from sartor.model.network import BLOCK, Anatomy, anatomy, clone, shrink_attention_, shrink_mlp_
from sartor.model.precision import running
from sartor.picture_job import WEIGHTS, PreparedPictures
from sartor.pictures import RHO, FeltPictures, Pictures, felt_pictures, needed, priced
from sartor.plan import from_mask
from sartor.probing import Tell
from sartor.stages.allot import Costs, Four, left, smallest
from sartor.stages.allot_maps import MapCosts
from sartor.stages.curves import Curves
from sartor.stages.head import Head, choose_head, with_head
from sartor.stages.narrow import Moments, moments_of_heads, narrowed, widths
from sartor.stages.probe import Effects
from sartor.stages.recognition import kl_of, said_of
from sartor.stages.tokens import sample

ENDLESS = 1 << 60  # bytes
CORRECTED = 3  # times that the limit of time is set right, at most, by what the cut network really takes
NEAR = 0.03  # of the time asked for, that a network may take less
CAREFUL = 0.7  # of time that is left, so much is given away at once: the next parts may take more
SHARES = (1.0, 0.875, 0.75)  # of the side of the original's pictures, that are tried where time is asked for
LEAST_SIDE = 0.55  # the same of convolutional networks, down to here
STRIDE = 32  # pixels, in steps of which: maps are halved five times, and every padding stays as it was


@dataclass(frozen=True)
class View:
    """The network to fit, its head, pictures and what it may cost; `sides`: {side of a picture: [nats of its head on pictures left out, damage foretold of what else must go]}.

    keys: {dimensions of every head's queries and keys: [what having no more damages, damage foretold of what else must go]}, where it was asked; looked: pictures that were looked at for it. felt: what the network was found to need, where it was.
    """

    dense: Any
    head: Head
    pictures: Pictures
    costs: Costs | MapCosts
    sides: dict[int, list[float]]
    keys: dict[int, list[float]] = field(default_factory=dict)
    looked: int = 0
    felt: FeltPictures | None = None

    @property
    def side(self) -> int:
        found: int = self.dense.size
        return found

    @property
    def key_dim(self) -> int | None:
        """Dimensions that heads compare patches by; None where there are no heads."""
        return None if isinstance(self.dense, Graph) else anatomy(self.dense).key_dim

    @property
    def narrow(self) -> float:
        """What it is foretold to damage that heads compare patches by so many dimensions, in nats a picture."""
        return self.keys.get(self.key_dim or 0, [0.0])[0]

    def decided(self) -> dict[str, Any]:
        """What `view_again` needs, for JSON."""
        c = self.costs
        limit = None if c.limit == float("inf") else c.limit
        told: dict[str, Any] = {"side": self.side, "sides": self.sides, "limit": limit}
        if isinstance(c, MapCosts):
            return told | {"prices": c.prices, "curves": c.curves}
        told["four"] = c.four.damage if c.four else None
        told |= {"keys": self.dense.config.keys, "tried": self.keys, "pictures": self.looked, "curves": c.curves}
        return told | {"block_seconds": c.block_seconds, "head_seconds": c.head_seconds}

    def seen(self, pixels: UInt8[Tensor, "n 3 s s"]) -> UInt8[Tensor, "n 3 r r"]:
        return smaller(pixels, self.side)


def smaller(pixels: UInt8[Tensor, "n 3 s s"], side: int) -> UInt8[Tensor, "n 3 r r"]:
    """Pictures with fewer pixels."""
    if pixels.shape[-1] == side or not len(pixels):
        return pixels if len(pixels) else pixels.new_zeros(0, 3, side, side)
    parts = (
        nn.functional.interpolate(part.float(), size=side, mode="bicubic", antialias=True) for part in pixels.split(64)
    )
    return torch.cat([p.round_().clamp_(0, 255).to(torch.uint8) for p in parts])


def view_of(p: PreparedPictures, job: Job, tell: Tell) -> View:
    """The view of least damage within the job's bytes and time.

    Raises:
        BudgetError: not even the smallest pictures are fast enough.
    """
    carving_of(p.dense).refuse(p.dense, _priced(p, p.dense, 0.0))  # before any work is done
    four = cache(lambda: _four_damage(p, job, tell))  # it takes a minute, and is not always asked
    if job.faster is None:
        return _keyed(p, View(p.dense, p.head, p.pictures, _priced(p, p.dense, four()), {}), job, tell)
    sides, views = sides_of(p.whole), list[View]()
    felt, effects, curves, fastest, e = None, None, Curves(), 0.0, picture_effort_of(job.effort)
    for n, r in enumerate(sides[::-1]):  # the smallest first: what is felt of it takes the least time
        told = lambda note, n=n: tell("view", 0.5 * n / len(sides), note)  # noqa: E731
        told(f"pictures of {r} pixels a side: what the head says of them")
        dense, head = headed(p, r, job.seed)
        pictures = shrunk(p.pictures, r)
        told(f"pictures of {r} pixels a side: how long its parts take in the runtime")
        costs, most = timed(p, dense, _priced(p, dense, None), job.faster)
        fastest = max(fastest, most)
        if effects is None:
            told("what the photos need of the network's parts")
            half = running(dense)
            felt = felt_pictures(half, pictures, e, job.seed)
            effects = needed(felt)
            told("what fewer of them cost")
            curves = priced(half, pictures, effects, costs, e, job.seed).curves
        costs = replace(costs, curves=curves)
        if isinstance(costs, Costs) and not _time_decides(dense, effects, costs):
            costs = replace(costs, four=_priced(p, dense, four()).four)
        damages = {r: [head.nats, _damage(dense, effects, costs)]}
        views.append(View(dense, head, pictures, costs, damages, felt=felt if n == 0 else None))
    best = min(views, key=lambda v: sum(v.sides[v.side]))
    if sum(best.sides[best.side]) == float("inf"):
        raise BudgetError(
            f"{job.faster:g} times as fast as the original cannot be reached: the smallest network that Sartor would make is {fastest:.1f} times as fast, with pictures of {sides[-1]} pixels a side; ask for that or less with --faster"
        )
    best = replace(best, sides={r: found for v in views for r, found in v.sides.items()})
    return _in_time(p, _keyed(p, best, job, tell), job, job.faster, tell)


def sides_of(whole: Any) -> list[int]:
    """Sides of pictures that are tried where time is asked for, the original's first."""
    size: int = whole.size
    if isinstance(whole, Graph):
        smaller = range(size - STRIDE, ceil(LEAST_SIDE * size) - 1, -STRIDE) if size % STRIDE == 0 else ()
        return [size, *(r for r in smaller if at_size(whole, r) is not None)]
    patch = whole.config.patch
    return [patch * round(share * size / patch) for share in SHARES]


def _keyed(p: PreparedPictures, view: View, job: Job, tell: Tell) -> View:
    """The view with as many dimensions to compare tokens by as are best, together with what else must go then; as many as there are where nobody says what the network adapts to, which heals it."""
    if not p.labelled or isinstance(p.whole, Graph):  # which has no heads
        return view
    e, half = picture_effort_of(job.effort), running(view.dense)
    told = lambda share, note: tell("view", 0.5 + 0.3 * share, note)  # noqa: E731
    felt = view.felt or felt_pictures(half, view.pictures, e, job.seed, told)
    effects = needed(felt)
    costs = priced(half, view.pictures, effects, view.costs, e, job.seed, told)
    tried = {anatomy(half).key_dim: [0.0, _damage(view.dense, effects, costs)]}
    views, judged = [view], sample(view.pictures.validation, e.checked, job.seed)
    if sum(*tried.values()):
        tell("view", 0.9, "what fewer dimensions to compare patches by cost")
        moments = _moments(view, e.felt, job.seed)
        networks = {keys: narrowed(view.dense, moments, keys) for keys in widths(view.dense)}
        quicker = _head_seconds(p, view.dense, networks, costs) if job.faster else {}
        said = said_of(half, judged)
        for keys, dense in networks.items():
            seconds, own = quicker.get(keys, costs.head_seconds), _priced(p, dense, costs.four and costs.four.damage)
            fewer = replace(costs, bytes_of=own.bytes_of, four=own.four, head_seconds=seconds)
            tried[keys] = [kl_of(running(dense), judged, said), _damage(dense, effects, fewer)]
            views.append(replace(view, dense=dense, costs=fewer))
    best = min(zip(tried.values(), views, strict=True), key=lambda x: sum(x[0]))[1]
    costs = costs if best is view else best.costs
    return replace(best, costs=costs, keys=tried, looked=e.felt, felt=felt if best is view else None)


def _in_time(p: PreparedPictures, view: View, job: Job, faster: float, tell: Tell) -> View:
    """The view with a limit set right by what the network, cut as foretold, takes in the runtime more, or less, than was asked for: parts are not quite worth the same in every network."""
    costs = view.costs
    felt = view.felt or felt_pictures(running(view.dense), view.pictures, picture_effort_of(job.effort), job.seed)
    effects = needed(felt)
    enough: Any = None  # costs of the largest network that was fast enough
    for n in range(CORRECTED):
        tell("view", 0.91 + 0.03 * n, "how long the network takes in the runtime once it is cut")
        small, planned, least = _as_planned(view.dense, effects, costs)
        times = seconds_of({"cut": (small, WEIGHTS), "original": (p.whole, "fp32")}, p.album.train.pixels)
        wanted = (1 - MARGIN) * times["original"] / faster
        over = times["cut"] - wanted
        if over <= 0:
            enough = costs if enough is None or costs.limit > enough.limit else enough
            if over > -NEAR * wanted or planned < (1 - NEAR) * costs.limit:  # near enough, or bytes decide
                break
        elif planned <= 1.01 * least:
            break
        costs = replace(costs, limit=max(planned - (over if over > 0 else CAREFUL * over), 1.01 * least))
    return replace(view, costs=enough or costs, felt=felt)


def _as_planned(dense: Any, effects: Effects, costs: Any) -> tuple[Any, float, float]:
    """(a network of the sizes that are to be left, for its time; seconds that it is foretold to take; those of the smallest one)."""
    found = carving_of(dense).allot(dense, effects, costs)
    if isinstance(costs, MapCosts):
        gone = [units - len(from_mask(kept)) for units, kept in zip(costs.units, found.channels, strict=True)]
        return of_widths(dense, gone), costs.seconds(gone), costs.seconds(costs.most)
    a = anatomy(dense)
    small = left(a, found.steps)
    return resized(dense, small), costs.seconds(small), costs.seconds(smallest(a))


def _head_seconds(p: PreparedPictures, dense: Any, networks: Mapping[int, Any], costs: Costs) -> dict[int, float]:
    """Of a picture's time, what a head takes in each of these narrowed networks: beside the whole one in the same run."""
    named = {"whole": dense} | {str(keys): network for keys, network in networks.items()}
    times = seconds_of({name: (network, WEIGHTS) for name, network in named.items()}, p.album.train.pixels)
    gained = {keys: (times["whole"] - times[str(keys)]) / sum(anatomy(dense).groups) for keys in networks}
    return {keys: max(costs.head_seconds - less, 0.0) for keys, less in gained.items()}


def _moments(view: View, many: int, seed: int) -> Moments:
    return moments_of_heads(view.dense, sample(view.pictures.train, many, seed))


def view_again(p: PreparedPictures, job: Job, saved: dict[str, Any]) -> View:
    """The view of a resumed job, as it was decided and measured (`View.decided`): time is not taken again."""
    side = int(saved["side"])
    limit = saved["limit"] if saved["limit"] is not None else float("inf")
    dense, head = headed(p, side, job.seed)
    sides = {int(r): found for r, found in saved.get("sides", {}).items()}
    view = View(dense, head, shrunk(p.pictures, side), _priced(p, dense, saved.get("four")), sides)
    curves = saved.get("curves", {})
    if isinstance(view.costs, MapCosts):
        return replace(view, costs=replace(view.costs, prices=(*saved["prices"], 0.0)[:4], limit=limit, curves=curves))
    if keys := saved.get("keys"):
        dense = narrowed(view.dense, _moments(view, saved["pictures"], job.seed), keys)
        view = replace(view, dense=dense, costs=_priced(p, dense, saved.get("four")))
    seconds = {k: saved[k] for k in ("block_seconds", "head_seconds")}
    costs = replace(view.costs, limit=limit, curves=curves, **seconds)
    tried = {int(k): x for k, x in saved.get("tried", {}).items()}
    return replace(view, costs=costs, looked=saved.get("pictures", 0), keys=tried)


def shrunk(pictures: Pictures, side: int) -> Pictures:
    """The same pictures, smaller."""
    parts: dict[str, Any] = {k: smaller(getattr(pictures, k), side) for k in ("train", "validation", "generic")}
    return replace(pictures, **parts)


def _damage(dense: Any, effects: Any, costs: Costs | MapCosts) -> float:
    """Foretold of what must go; infinite where it is never enough for the time. Too few bytes are an error for any side."""
    try:
        return carving_of(dense).allot(dense, effects, costs).damage
    except BudgetError as error:
        if error.nearest is not None:
            raise
        return float("inf")


def _time_decides(dense: Any, effects: Effects, costs: Costs) -> bool:
    """Whether what is fast enough has few enough bytes at eight bits a weight already: four take no less time."""
    try:
        return carving_of(dense).allot(dense, effects, replace(costs, budget=ENDLESS)).size <= costs.budget
    except BudgetError:  # nothing is fast enough
        return True


def headed(p: PreparedPictures, side: int, seed: int) -> tuple[Any, Head]:
    """The network for pictures of this side, read behind the same layer, and its head."""
    if side == p.whole.size:
        return p.dense, p.head
    network = at_size(p.whole, side) if isinstance(p.whole, Graph) else load_vision(p.source.folder, side)
    train, depth = smaller(p.album.train.pixels, side), p.head.depth
    head = choose_head(network, train, p.labels[0], p.classes, seed, first=depth, last=depth, own=p.own)
    return with_head(network, head), head


def bytes_of(dense: Any, weights: str = WEIGHTS) -> Callable[[Anatomy], int]:
    """Exact bytes of the ONNX file of a model of given sizes."""
    return lambda a: onnx_file.file_bytes(dense.config, a, weights)


def _priced(p: PreparedPictures, dense: Any, four: float | None) -> Any:
    """Costs without time; four: what four bits damage, None where they are not to be taken."""
    if isinstance(dense, Graph):
        return map_costs(dense, p.budget_bytes)
    told = None if four is None else Four(bytes_of(dense, "int4"), four)
    return Costs(bytes_of(dense), p.budget_bytes, four=told)


def _four_damage(p: PreparedPictures, job: Job, tell: Tell) -> float | None:
    """What four bits a weight damage, measured where the bytes do not suffice for eight; else None."""
    if isinstance(p.dense, Graph) or bytes_of(p.dense)(anatomy(p.dense)) <= p.budget_bytes:
        return None
    tell("view", 0.0, "what four bits a weight damage")
    e, generic = picture_effort_of(job.effort), p.pictures.generic
    own, others = sample(p.pictures.train, e.felt // 2, job.seed), sample(generic, e.felt // 4, job.seed)
    judged = sample(p.pictures.validation, e.checked, job.seed)
    return four_damage(p.dense, own, others, judged, RHO if len(generic) else 0.0)


def timed(p: PreparedPictures, dense: Any, costs: Any, faster: float) -> tuple[Any, float]:
    """What heads and blocks of channels of a transformer (for convolutions, `timed_maps`) cost in the runtime, measured on files of this network: whole, with few channels, with few heads; beside the original in fp32.

    What they may take is the original's time by `faster`, less what the file takes beside them, and a MARGIN.

    Args:
        costs: without time.
    Returns:
        (costs with time, how many times as fast the smallest network is).
    """
    if isinstance(dense, Graph):
        return timed_maps(dense, p.whole, costs, p.album.train.pixels, faster)
    a = anatomy(dense)
    few = smallest(a)
    sizes = {"whole": a, "channels": replace(a, ffn=few.ffn), "heads": replace(a, groups=few.groups)}
    networks = {name: (resized(dense, size), WEIGHTS) for name, size in sizes.items()}
    second = seconds_of(networks | {"original": (p.whole, "fp32")}, p.album.train.pixels)
    block = (second["whole"] - second["channels"]) / (sum(a.ffn) - sum(few.ffn)) * BLOCK
    head = (second["whole"] - second["heads"]) / (sum(a.groups) - sum(few.groups))
    costs = replace(costs, block_seconds=max(block, 0.0), head_seconds=max(head, 0.0))
    beside = second["whole"] - costs.seconds(a)
    whole = (1 - MARGIN) * second["original"]
    return replace(costs, limit=whole / faster - beside), whole / max(costs.seconds(few) + beside, 1e-9)


def resized(model: Any, a: Anatomy) -> Any:
    """A copy with the first heads and channels of each layer: for its time, not its words."""
    small = clone(model)
    for n in range(a.layers):
        shrink_attention_(small, n, range(a.groups[n]))
        shrink_mlp_(small, n, torch.arange(a.ffn[n]))
    return small
