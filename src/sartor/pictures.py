"""The two verbs for pictures: `plan_pictures` decides, `fit_pictures` acts. As `pipeline.py`, and with the same stages, for networks that see; `carving.py` has what their kinds differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from sartor.carving import Told, carving_of, curved, four_grids, held_
from sartor.clock import Clock
from sartor.effort import PictureEffort, picture_effort_of
from sartor.model.network import anatomy, clone
from sartor.model.precision import running
from sartor.plan import LayerPlan, Plan, is_full
from sartor.probing import Tell, sounded
from sartor.stages.allot import Allotment, Costs
from sartor.stages.allot_maps import MapCosts
from sartor.stages.buffer import IN_STEPS, Step, after_steps, buffered, tried
from sartor.stages.masters import InMemory, Kept, Latents, free
from sartor.stages.probe import Effects, Worth, blended, recovered
from sartor.stages.recognition import kl_of, recognize, said_of
from sartor.stages.tokens import sample
from sartor.stages.tune import Course, Lessons, TuneConfig, may_mirror, tune_, views
from sartor.stages.whose import diagnose

silent: Told = lambda share, note: None  # noqa: E731
RHO = 0.3  # share of generic pictures in what is sensed of the adapted network, and in what is fitted


@dataclass(frozen=True)
class Pictures:
    """What the stages see: the user's training and validation pictures with labels, and generic ones. labelled: these are classes of the user's; else clusters, that nothing is to be adapted to."""

    train: UInt8[Tensor, "n 3 s s"]
    labels: Int[Tensor, " n"]
    validation: UInt8[Tensor, "v 3 s s"]
    validation_labels: Int[Tensor, " v"]
    generic: UInt8[Tensor, "g 3 s s"]
    labelled: bool = True

    @property
    def judged(self) -> tuple[Tensor, Tensor]:
        return self.validation, self.validation_labels


@dataclass
class Fitted:
    """A smaller network and everything known about it.

    Attributes:
        model: in fp32. plan: what was done. adapted, trained: courses of adaptation and recovery, or None. teacher: the whole network as it adapted. mirror: it learnt from mirrored pictures too.
        seconds: by stage. pruning: what was cut, and validation before and after. unrecovered: the network as it was cut and fitted, before recovery; None where an earlier run did that, or nothing went.
    """

    model: Any
    plan: Plan
    teacher: Any
    adapted: Course | None
    trained: Course | None
    mirror: bool
    seconds: dict[str, float] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=dict)
    unrecovered: Any = None


def plan_pictures(
    model: Any,
    pictures: Pictures,
    costs: Costs | MapCosts,
    sha256: str,
    effort: str,
    seed: int = 0,
    tell: Tell = lambda stage, share, note: None,
    felt: FeltPictures | None = None,
) -> Plan:
    """Probe, diagnose, allocate.

    Args:
        model: with a head, fp32; never changed. costs: what file and time may be. felt: what the model was found to need, where that was asked before.
    Raises:
        BudgetError: the budget is below what can be reached.
    """
    carving, e = carving_of(model), picture_effort_of(effort)
    carving.refuse(model, costs)
    dense = running(model)
    felt = felt or felt_pictures(dense, pictures, e, seed, partial(tell, "probe"))
    user, generic = needed(felt), felt[2]
    judged = sample(pictures.validation, e.checked, seed)
    worth = carving.check(dense, user, judged, e.checks, seed, partial(_inside, tell, 0.8, 0.1))
    costs = priced(dense, pictures, user, costs, e, seed, partial(_inside, tell, 0.9, 0.1))
    allotment = carving.allot(model, user, costs)
    rho = RHO if generic else 0.0
    plan = _plan(model, user, generic, worth, allotment, costs.budget, sha256, rho, seed)
    return replace(plan, grids=four_grids(model) if allotment.four else {}, curves=costs.curves)


def _inside(tell: Tell, start: float, width: float, share: float, note: str) -> None:
    tell("probe", start + width * share, note)


def priced(
    model: Any,
    pictures: Pictures,
    effects: Effects,
    costs: Costs | MapCosts,
    e: PictureEffort,
    seed: int,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Any:
    """The costs with what cuts were measured to damage (`curves.py`): a third as many pictures are fitted on as felt, half as many judged by as masks are checked on."""
    own, judged = sample(pictures.train, e.felt // 3, seed), sample(pictures.validation, e.checked // 2, seed)
    return curved(model, effects, costs, own, judged, tell)


FeltPictures = tuple[Effects, tuple[Effects, Effects], Effects | None]


def needed(felt: FeltPictures) -> Effects:
    """The user's effects, recovered beside generic ones where there are such pictures."""
    user, halves, generic = felt
    return recovered(user, halves, generic) if generic else user


def felt_pictures(
    model: Any,
    pictures: Pictures,
    e: PictureEffort,
    seed: int,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> FeltPictures:
    """Backward probes: (the user's effects, those of two halves, generic effects where there are such pictures). The user's pictures are felt as views that training never showed."""
    generator = torch.Generator().manual_seed(seed + 1)
    own = sample(pictures.train, e.felt, seed)
    own = torch.cat([views(p, generator, mirror=False).round_().to(torch.uint8) for p in own.split(32)])
    user, *halves = sounded(model, own, e.known, seed, lambda s: tell(0.4 * s, "gradients on your pictures"))
    if not len(pictures.generic):
        return user, (halves[0], halves[1]), None
    others = sample(pictures.generic, e.felt, seed)
    generic = sounded(model, others, e.known, seed, lambda s: tell(0.4 + 0.4 * s, "gradients on generic pictures"))[0]
    return user, (halves[0], halves[1]), generic


def _plan(
    model: Any,
    user: Effects,
    generic: Effects | None,
    worth: Worth,
    found: Allotment,
    budget: int,
    sha256: str,
    rho: float,
    seed: int,
) -> Plan:
    said = diagnose(user, generic, worth) if generic else []
    layers = []
    for n, (groups, channels) in enumerate(zip(found.groups, found.channels, strict=True)):
        mine, theirs, verdict = said[n] if said else ({k: v[n] for k, v in user.parts.items()}, {}, {})
        layers.append(LayerPlan(groups, channels, mine, theirs, verdict))
    told = {"masks": worth.masks, "r2": worth.r2, "spearman": worth.spearman, "factor": worth.factor}
    told |= {"user_pictures": user.tokens, "generic_pictures": generic.tokens if generic else 0, "known": user.known}
    return Plan(
        sha256,
        model.family,
        budget,
        found.size,
        None,
        None,
        tuple(layers),
        {},
        found.damage,
        found.price,
        {name: [float(s)] for name, s in found.steps.items()},
        {k: float(v) for k, v in told.items()},
        {},
        rho,
        seed,
    )


def fit_pictures(
    model: Any,
    plan: Plan,
    pictures: Pictures,
    costs: Costs | MapCosts,
    effort: str,
    training: tuple[TuneConfig, TuneConfig] | None = None,
    tell: Tell = lambda stage, share, note: None,
    kept: Callable[[str], Kept] | None = None,
    settled: Callable[[Plan], None] = lambda plan: None,
    steps: int = 1,
) -> Fitted:
    """Adapt, settle the cuts, prune, fit what is left, recover.

    Args:
        model: with its head, fp32; never changed. training: of adaptation and recovery; None for the effort's own.
        kept: where the best weights of a training ("adapt", "recover") are kept; what is there already is not done again. settled: told the plan whose cuts the adapted network has decided.
        steps: that the cuts of a transformer are made in (`buffer.py`).
    """
    e, clock = picture_effort_of(effort), Clock()
    adapt, recover = training or (e.adapt, e.recover)
    kept = kept or (lambda stage: InMemory())
    mirror = may_mirror(model, *pictures.judged)
    small = clone(model)
    lessons = Lessons(pictures.train, pictures.labels, mirror, pictures.generic)
    adapt = adapt if pictures.labelled else replace(adapt, seconds=0.0)
    if (whole := keeps_all(model, plan)) and adapt.seconds:  # nothing to recover from: all time is adaptation's
        adapt = replace(adapt, seconds=adapt.seconds + recover.seconds)
    told = partial(tell, "adapt")
    adapted = trained(small, free(small), lessons, pictures, adapt, plan.seed, told, kept("adapt"))
    clock.lap("adapt")
    teacher, pruning, carving = running(small), dict[str, Any](), carving_of(small)
    if whole:
        return Fitted(small, replace(plan, settled=True), teacher, adapted, None, mirror, clock.seconds)
    unrecovered, lessons = None, replace(lessons, teacher=teacher)
    if (anew := kept("recover").load() is None) and plan.steps > 1:  # what those steps healed is kept with them
        plan = replace(plan, settled=steps == 1, steps=1)
    if anew or carving.rounds:
        surgery = PictureSurgery(lessons, pictures, costs, e, recover, tell, kept("steps"))
        small, plan, done = surgery.cut(small, plan, steps)
        if plan.steps == 1:
            settled(plan)
        clock.lap("prune")
        small, latents = surgery.fitted(small, plan, e.fitted, partial(tell, "fit"))
        pruning = done | {"validation_fitted": _judged(running(small), pictures)}
        if plan.steps > 1:  # what they have healed is kept only now
            settled(plan)
        clock.lap("fit")
        unrecovered = clone(small)
    else:
        small = carving.cut(small, plan)
        latents, pruning = free(small), carving.gone(teacher, small)
    recover, told = after_steps(recover, plan), partial(tell, "recover")
    course = trained(small, latents, lessons, pictures, recover, plan.seed, told, kept("recover"))
    clock.lap("recover")
    return Fitted(small, plan, teacher, adapted, course, mirror, clock.seconds, pruning, unrecovered)


def keeps_all(model: Any, plan: Plan) -> bool:
    """Whether the network stays as it is, but for eight bits that are nearly free."""
    masks = (mask for layer in plan.layers for mask in (layer.groups, layer.channels))
    return all(map(is_full, masks)) and not plan.grids and not carving_of(model).rounds


@dataclass(frozen=True)
class PictureSurgery:
    """What a cut is made by; `surgery.Surgery` for networks that see.

    Attributes:
        lessons: with the teacher, the whole network as it adapted. costs: what file and time may be. training: of recovery. kept: where a cut in steps ends each of them.
    """

    lessons: Lessons
    pictures: Pictures
    costs: Costs | MapCosts
    effort: PictureEffort
    training: TuneConfig
    tell: Tell
    kept: Kept | None = None

    def cut(self, small: Any, plan: Plan, steps: int) -> tuple[Any, Plan, dict[str, Any]]:
        """(The network without what goes, chosen anew where the plan is not settled; the plan as it was done; what went, and what validation says of it)."""
        teacher, done = self.lessons.teacher, dict[str, Any]()
        if not plan.settled and steps > 1:
            small, plan, taken = self.in_steps(small, plan, steps)
            done["steps"] = [asdict(step) for step in taken]
        else:
            plan = plan if plan.settled else self._settled(plan)
            small = carving_of(small).cut(small, plan)
        done |= carving_of(small).gone(teacher, small)
        said = {"whole": _judged(teacher, self.pictures), "cut": _judged(running(small), self.pictures)}
        return small, plan, done | {f"validation_{name}": found for name, found in said.items()}

    def in_steps(self, small: Any, plan: Plan, steps: int) -> tuple[Any, Plan, list[Step]]:
        """A transformer's cuts in about so many steps of equal damage (`buffer.py`), each healed by the fit and a little of recovery, of which IN_STEPS is spent here.

        Args:
            small: as it adapted, in fp32. plan: not settled.
        Returns:
            (the cut network, the plan of what was done, every step).
        """
        carving, teacher = carving_of(small), self.lessons.teacher
        held = sample(self.pictures.validation, self.effort.checked, plan.seed)
        said, whole_needs, done_before = said_of(teacher, held), self._needed(teacher, plan), tried(self.kept)
        felt = [] if done_before else [whole_needs]  # the first step is of the whole network
        priced: Any = replace(self.costs, curves=plan.curves)
        at_once = carving.allot(teacher, whole_needs, priced)
        whole, priced = _as_allotted(plan, teacher, at_once), priced.at(at_once.four)  # bits are decided once
        left = list(range(steps - done_before))  # trainings, one for each step, however many are tried

        def heal(network: Any) -> Any:
            network, latents = self.fitted(network, replace(plan, grids={}), self.effort.fitted // 2)
            if left:
                part, seed = self.training.part(IN_STEPS / steps), plan.seed + 1 + left.pop()
                trained(network, latents, self.lessons, self.pictures, part, seed)
            return network

        small, done, taken = buffered(
            small,
            whole,
            lambda network: felt.pop() if felt else self._needed(running(network), plan),
            heal,
            lambda network: kl_of(running(network), held, said),
            steps,
            tell=partial(self.tell, "prune"),
            aim=lambda effects, lost: _masked(whole, carving.allot(teacher, effects, priced)),
            kept=self.kept,
        )
        return small, replace(done, predicted_bytes=priced.bytes_of(anatomy(small))), taken

    def fitted(self, small: Any, plan: Plan, many: int, told: Told = silent) -> tuple[Any, Latents]:
        """What is left fitted to the whole network's stream on so many pictures of the user's and half as many generic ones, as training goes on with it."""
        own, others = (
            sample(p, n, plan.seed) for p, n in ((self.pictures.train, many), (self.pictures.generic, many // 2))
        )
        return carving_of(small).fit(small, self.lessons.teacher, own, others, plan, told)

    def _needed(self, network: Any, plan: Plan, told: Told = silent) -> Effects:
        """What a network that has adapted needs, for the user's pictures and, by the plan's share, for generic ones."""
        user, _, generic = felt_pictures(network, self.pictures, self.effort, plan.seed, told)
        return blended(user, generic, plan.rho) if generic else user

    def _settled(self, plan: Plan) -> Plan:
        """The plan with its cuts chosen anew, within the same costs, by what the network needs now that it has adapted."""
        teacher = self.lessons.teacher
        told = lambda share, note: self.tell("prune", share, f"the adapted network's {note}")  # noqa: E731
        effects, measured = self._needed(teacher, plan, told), replace(self.costs, curves=plan.curves)
        return _as_allotted(plan, teacher, carving_of(teacher).allot(teacher, effects, measured))


def _masked(plan: Plan, found: Allotment) -> Plan:
    layers = zip(plan.layers, found.groups, found.channels, strict=True)
    return replace(plan, layers=tuple(replace(layer, groups=g, channels=c) for layer, g, c in layers))


def _as_allotted(plan: Plan, whole: Any, found: Allotment) -> Plan:
    steps = {name: [float(s)] for name, s in found.steps.items()}
    return replace(
        _masked(plan, found),
        predicted_bytes=found.size,
        predicted_damage=found.damage,
        price=found.price,
        ladders=steps,
        grids=four_grids(whole) if found.four else {},
        settled=True,
    )


def _judged(model: Any, pictures: Pictures) -> dict[str, float]:
    found = recognize(model, *pictures.judged)
    return {"accuracy": found.accuracy, "nats": float(found.nats.mean())}


def trained(
    model: Any,
    latents: Latents,
    lessons: Lessons,
    pictures: Pictures,
    config: TuneConfig,
    seed: int,
    tell: Callable[[float, str], None] = lambda share, note: None,
    kept: Kept | None = None,
) -> Course | None:
    """Train the fp32 network in place; what was trained before an interruption is not trained again.

    Args:
        latents: its weights as they are now.
    """
    kept = kept or InMemory()
    latents, before = kept.load() or (latents, 0.0)
    latents.exact = True
    course = None
    if before < config.seconds:
        tell(0.0, "the first step")
        course = tune_(running(model), latents, lessons, pictures.judged, config, seed, tell, kept, before)
        kept.save(latents, config.seconds)
    held_(model, latents)
    return course
