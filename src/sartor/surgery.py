"""What is cut of the adapted network, and what is left fitted onto its grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sartor.effort import effort_of
from sartor.model.network import anatomy
from sartor.model.precision import running
from sartor.plan import Plan
from sartor.probing import Tell, felt
from sartor.stages.buffer import IN_STEPS, buffered, tried
from sartor.stages.decide import settle
from sartor.stages.distil import Anchor, DistilConfig, distil_
from sartor.stages.fit import evidence_of, fit
from sartor.stages.likelihood import kl_of, top_of
from sartor.stages.masters import Kept, Latents, put_
from sartor.stages.measure import score
from sartor.stages.probe import Effects, blended
from sartor.stages.prune import cut_, gone, share_gone
from sartor.stages.tokens import Window, sample

WORTH_SETTLING = 0.02  # of the layers' weights go: for less it is not asked anew which


@dataclass(frozen=True)
class Surgery:
    """What a cut is made by.

    Attributes:
        whole: the network before it, in bf16; adapted, where there is training. learned, unseen, generic: rows; of the user those it adapted to and those kept back. validation: of the user.
        said: what the adapted network and the original say, or None where nothing is trained. training: of recovery. kept: where a cut in steps ends each of them.
    """

    whole: Any
    learned: Tensor
    unseen: Tensor
    generic: Tensor
    validation: Sequence[Window]
    said: Anchor | None
    training: DistilConfig
    effort: str
    tell: Tell
    kept: Kept

    def cut(self, small: Any, plan: Plan, steps: int, held: Tensor) -> tuple[Any, Plan, dict[str, Any]]:
        """Settle what goes on the adapted network, and take it out.

        Args:
            small: in fp32; changed or not. held: rows of the user's validation text, that steps are judged by.
        Returns:
            (the cut network, the plan as it was done, what went and what validation says of it before the last repair).
        """
        before, done = anatomy(small), dict[str, Any]()
        if self.said is not None and (not plan.settled or (steps > 1 and tried(self.kept))):
            if steps > 1:
                small, plan, done["steps"] = self._in_steps(small, plan, steps, held)
            elif share_gone(plan, before) >= WORTH_SETTLING:
                plan = settle(plan, before, self._sense(self.whole, plan, self.tell))
        if anatomy(small) == before:
            cut_(small, plan)
        if what := gone(before, anatomy(small)):
            done |= what | {"validation_cut": score(running(small), self.validation).bits_per_byte}
            self.tell("prune", 1.0, f"validation {done['validation_cut']:.3f} bits per byte")
        return small, plan, done

    def _in_steps(self, small: Any, plan: Plan, steps: int, held: Tensor) -> tuple[Any, Plan, list[dict[str, Any]]]:
        reference = top_of(self.whole, held)
        left = steps - tried(self.kept)  # trainings, one for each step, however many are tried
        time = [self.training.part(IN_STEPS / steps)] * left
        silent: Tell = lambda stage, share, note: None  # noqa: E731
        small, plan, done = buffered(
            small,
            plan,
            lambda network: self._sense(running(network), plan, silent),
            lambda network: self._healed(network, plan, time.pop() if time else None),
            lambda network: kl_of(running(network), held, reference),
            steps,
            tell=partial(self.tell, "prune"),
            kept=self.kept,
        )
        return small, plan, [asdict(step) for step in done]

    def _sense(self, network: Any, plan: Plan, tell: Tell) -> Effects:
        """Effects on both texts, by the plan's share: the user's alone are too few to know rare activations by (docs/log.md)."""
        told = lambda share, note: tell("prune", 0.8 * share, f"the adapted network's {note}")  # noqa: E731
        user, generic = felt(network, (self.unseen, self.generic), self.effort, plan.seed, told)
        return blended(user, generic, plan.rho)

    def _healed(self, network: Any, plan: Plan, training: DistilConfig | None) -> Any:
        """Repaired in closed form, then a little distillation."""
        few = effort_of(self.effort).fit_rows // 2
        latents = self.fitted(network, replace(plan, grids={}), few, lambda share, note: None)
        if training and training.seconds and self.said is not None:
            distil_(running(network), latents, None, self.said, self.validation, training, plan.seed)
        put_(network, latents)
        return network

    def fitted(self, small: Any, plan: Plan, many: int, told: Callable[[float, str], None]) -> Latents:
        """The cut network on the plan's grids.

        Args:
            many: of the user's rows; half as many generic ones join them, and all of those count as the plan's `rho` says.
        """
        own, generic = sample(self.learned, many, plan.seed), sample(self.generic, many // 2, plan.seed)
        listened = self.said is None  # where training follows, it makes more of the time that gradients take
        start = 0.4 if listened else 0.0
        felt = lambda share: told(start * share, "gradients of every token")  # noqa: E731
        evidence = evidence_of(self.whole, own, generic, plan.rho, felt, listened)
        return fit(small, self.whole, evidence, plan.grids, lambda s, n: told(start + (1 - start) * s, n))
