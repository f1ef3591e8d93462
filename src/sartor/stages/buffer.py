"""Step buffering: a deep cut in steps of equal entropy allowance; what a step takes can come back until its real damage is known.

For texts and for pictures. Our definition (of arXiv:2408.08684 only the abstract could be had, which names the mechanism and no more). A step senses the network as it is now, takes
the cheapest units of what the whole cut would now remove, heals what is left, and measures. Where the real damage is above the step's allowance, what summed effects
foretold for it, the network of before comes back, only the cheaper half of the step's units goes, and what remains is divided anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch

from sartor.model.network import BLOCK, Anatomy, anatomy, clone
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.stages.decide import settle
from sartor.stages.distil import DistilConfig
from sartor.stages.masters import Kept, free
from sartor.stages.medium import medium_of
from sartor.stages.probe import Effects
from sartor.stages.prune import cut_
from sartor.stages.tune import TuneConfig

IN_STEPS = 0.4  # of the time of recovery, where cuts are made in steps
GONE = -1e-9  # effect of what is no longer there: it is the first to go, and cannot cost anything
T = TypeVar("T", DistilConfig, TuneConfig)
Sense = Callable[[Any], Effects]
Aim = Callable[[Effects, Sequence[int]], Plan]
Layers = tuple[LayerPlan, ...]


def after_steps(recover: T, plan: Plan) -> T:
    """What is left of recovery when the cuts were made in steps."""
    return recover if plan.steps == 1 else recover.part(1 - IN_STEPS)


@dataclass(frozen=True)
class Step:
    """What one step did; damages in nats a prediction on validation data.

    Attributes:
        blocks, groups: what it took. allowed: the damage foretold. real: measured, beyond that before it. kept: False where it was taken back.
    """

    blocks: int
    groups: int
    allowed: float
    real: float
    kept: bool


@dataclass(frozen=True)
class _Unit:
    """A block of channels or a query group (one member) that is to go."""

    layer: int
    block: bool
    members: tuple[int, ...]
    effect: float
    parameters: int


def buffered(
    small: Any,
    plan: Plan,
    sense: Sense,
    heal: Callable[[Any], Any],
    damage: Callable[[Any], float],
    steps: int,
    by_entropy: bool = True,
    tell: Callable[[float, str], None] = lambda share, note: None,
    aim: Aim | None = None,
    kept: Kept | None = None,
) -> tuple[Any, Plan, list[Step]]:
    """Cut in about so many steps; after twice as many the budget rules, whatever it costs.

    Args:
        small: the network before any cut, left as it is. plan: whose bytes are to be saved. sense: effects of a network on the user's data.
        heal: a cut network (it may be changed), healed. damage: of a network, in nats a prediction. by_entropy: equal allowances; else equal numbers of parameters (an ablation).
        aim: (effects, blocks that each layer has lost already) -> what the whole cut would now be; None: `decide.settle`, for language models. kept: where every step ends; an interrupted cut goes on behind its last one.
    Returns:
        (the cut network, the plan of what was done, every step).
    """
    a, most = anatomy(small), 2 * steps if steps > 1 else 1
    aim, unit = aim or (lambda effects, lost: settle(plan, a, effects, lost)), medium_of(small).unit
    small, course = _resumed(small, plan, kept) or (small, _Course(_whole(plan.layers, a), steps, damage(small)))

    def attempt(taken: Sequence[_Unit], of: int) -> tuple[Any, Step]:
        allowed, blocks = sum(u.effect for u in taken), sum(u.block for u in taken)
        trial = heal(_cut(small, plan, course.now, _without(course.now, taken, a)))
        real = damage(trial) - course.before
        said = f"{len(taken)} of {of} units cost {real:.3f} {unit} of {allowed:.3f} foretold"
        tell((course.turn + 1) / most, f"step {course.turn + 1}: {said}")
        return trial, Step(blocks, len(taken) - blocks, allowed, real, real <= allowed)

    while course.turn < most and not course.done:
        effects = _in_place(sense(small), course.now, a)
        lost = [(f - len(x.kept_channels())) // BLOCK for f, x in zip(a.ffn, course.now, strict=True)]
        course.goal = aim(effects, lost)
        rest = _to_go(course.now, course.goal.layers, a, effects)
        if not rest:
            break
        final = course.turn == most - 1
        taken = rest if final else _first(rest, course.left, by_entropy)
        trial, step = attempt(taken, len(rest))
        if step.kept or final or len(taken) == 1:
            course.left = max(1, course.left - 1)
        else:
            course.history.append(step)
            taken = taken[: (len(taken) + 1) // 2]
            trial, step = attempt(taken, len(rest))
        small = trial
        course.took(step, _without(course.now, taken, a), len(taken) == len(rest))
        if kept is not None:
            kept.save(replace(free(small), exact=True), 0.0, course.state())
    done = max(1, sum(s.kept for s in course.history))
    return small, replace(course.goal or plan, layers=course.now, steps=done), course.history


def tried(kept: Kept | None) -> int:
    """Steps that an interrupted cut has tried already."""
    return len(kept.state().get("history", ())) if kept else 0


@dataclass
class _Course:
    """How far the steps have come: what stays `now`, among how many parts what is `left` is divided, the damage `before` the next step, the plan last aimed at."""

    now: Layers
    left: int
    before: float
    history: list[Step] = field(default_factory=list)
    turn: int = 0
    done: bool = False
    goal: Plan | None = None

    def took(self, step: Step, now: Layers, done: bool) -> None:
        self.history.append(replace(step, kept=True))
        self.now, self.before, self.turn, self.done = now, self.before + step.real, self.turn + 1, done

    def state(self) -> dict[str, Any]:
        """As JSON."""
        masks = [[x.groups, x.channels] for x in self.now]
        told = {"now": masks, "left": self.left, "before": self.before, "turn": self.turn, "done": self.done}
        return told | {"history": [asdict(s) for s in self.history], "goal": self.goal.to_json() if self.goal else None}


def _resumed(small: Any, plan: Plan, kept: Kept | None) -> tuple[Any, _Course] | None:
    """The network behind its last step, and the course."""
    told = kept.state() if kept else {}
    saved = kept.load() if kept and told else None
    if saved is None:
        return None
    now = tuple(replace(x, groups=g, channels=c) for x, (g, c) in zip(plan.layers, told["now"], strict=True))
    network = _cut(small, plan, _whole(plan.layers, anatomy(small)), now)
    for name, p in network.named_parameters():
        p.data = saved[0].masters[name].to(p.dtype)
    history = [Step(**s) for s in told["history"]]
    goal = Plan.from_json(told["goal"]) if told["goal"] else None
    return network, _Course(now, told["left"], told["before"], history, told["turn"], told["done"], goal)


def _whole(layers: Layers, a: Anatomy) -> Layers:
    return tuple(
        replace(x, groups=to_mask(range(a.groups[n]), a.groups[n]), channels=to_mask(range(a.ffn[n]), a.ffn[n]))
        for n, x in enumerate(layers)
    )


def _in_place(e: Effects, now: Layers, a: Anatomy) -> Effects:
    """Effects felt by a cut network, with the indices of the whole one."""
    channel = {n: torch.full((f,), GONE) for n, f in enumerate(a.ffn)}
    group = {n: torch.full((g,), GONE) for n, g in enumerate(a.groups)}
    for n, felt in e.channel.items():
        channel[n][now[n].kept_channels()] = felt
    for n, felt in e.group.items():
        group[n][now[n].kept_groups()] = felt
    return replace(e, channel=channel, group=group)


def _to_go(now: Layers, goal: Layers, a: Anatomy, effects: Effects) -> list[_Unit]:
    """What `goal` lacks of `now`, the least effect per parameter first."""
    per_block, per_group = a.unit_parameters()
    found = []
    for n, (here, there) in enumerate(zip(now, goal, strict=True)):
        of_channel, of_group = effects.channel[n], effects.group[n]
        gone = sorted(set(here.kept_channels()) - set(there.kept_channels()), key=lambda c: float(of_channel[c]))
        for at in range(0, len(gone), BLOCK):
            block = tuple(gone[at : at + BLOCK])
            found.append(_Unit(n, True, block, float(of_channel[list(block)].sum()), per_block))
        for g in set(here.kept_groups()) - set(there.kept_groups()):
            found.append(_Unit(n, False, (g,), float(of_group[g]), per_group))
    return sorted(found, key=lambda u: u.effect / u.parameters)


def _first(units: Sequence[_Unit], left: int, by_entropy: bool) -> list[_Unit]:
    """The first of them that make up one of `left` equal parts of all."""
    size = [u.effect if by_entropy else float(u.parameters) for u in units]
    total, taken = 0.0, 0
    while taken < len(units) and total + size[taken] / 2 < sum(size) / left:
        total += size[taken]
        taken += 1
    return list(units[: max(taken, 1)])


def _without(now: Layers, taken: Sequence[_Unit], a: Anatomy) -> Layers:
    gone: dict[tuple[int, bool], set[int]] = {}
    for u in taken:
        gone.setdefault((u.layer, u.block), set()).update(u.members)
    return tuple(
        replace(
            x,
            groups=to_mask(set(x.kept_groups()) - gone.get((n, False), set()), a.groups[n]),
            channels=to_mask(set(x.kept_channels()) - gone.get((n, True), set()), a.ffn[n]),
        )
        for n, x in enumerate(now)
    )


def _cut(small: Any, plan: Plan, now: Layers, after: Layers) -> Any:
    """A copy of the network, which has what `now` keeps, with what `after` keeps."""

    def among(kept: Sequence[int], had: Sequence[int]) -> str:
        there = set(kept)
        return to_mask([i for i, x in enumerate(had) if x in there], len(had))

    layers = tuple(
        replace(
            x,
            groups=among(y.kept_groups(), x.kept_groups()),
            channels=among(y.kept_channels(), x.kept_channels()),
        )
        for x, y in zip(now, after, strict=True)
    )
    copy = clone(small)
    cut_(copy, replace(plan, layers=layers))
    return copy
