"""The two verbs: `make_plan` decides, `apply_plan` acts. No disk, no socket, no runtime here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sartor.clock import Clock
from sartor.effort import Training, effort_of
from sartor.errors import BudgetError
from sartor.model.families import ATTENTION, family_of
from sartor.model.network import anatomy, clone, converted_, linears_of, shrink_vocabulary_
from sartor.model.precision import running, running_dtype
from sartor.model.vocabulary import can_trim, trim_tokenizer
from sartor.plan import Plan, from_mask
from sartor.probing import Recall, Tell, Texts, anew, probe_rows, sense, worth_of
from sartor.stages import paper
from sartor.stages.bits import (
    BASE,
    DOWN,
    RICHER,
    all_on_base,
    base_damage,
    damage_by_grid,
    embeddings_of,
    kinds_of,
    poorer_damage,
)
from sartor.stages.buffer import after_steps
from sartor.stages.calibrate import SITE_OF, Moments, second_moments
from sartor.stages.curves import WRITERS, Curves, measured_curves
from sartor.stages.decide import Bytes, Measured, decide, smallest_bytes
from sartor.stages.distil import Anchor, DistilConfig, Trained, anchor, distil_, joined
from sartor.stages.likelihood import expected_use, top_of
from sartor.stages.masters import InMemory, Kept, Latents, free, put_
from sartor.stages.probe import Effects, Units, Worth, order_units
from sartor.stages.prune import cut_, share_gone
from sartor.stages.tokens import Window, cut_windows, encode_windows, sample, training_rows
from sartor.stages.words import whole, words
from sartor.surgery import Surgery

Fitting = Callable[[Surgery, Any, Plan, int, Callable[[float, str], None]], Latents]
FEWEST = 4  # times the rows kept back, that a user must have for any to be


def _silent(stage: str, share: float, note: str) -> None:
    """Progress that nobody wants to see."""


@dataclass
class Compressed:
    """A smaller model and everything known about it.

    Attributes:
        model: the network in bf16 with snapped weights. tokenizer: the trimmed one. latents: masters, scales, grids.
        plan: what was done. adapted, trained: the courses of adaptation and recovery, or None. seconds: per stage. pruning: what was cut, and
        validation bits per byte before the last repair.
    """

    model: Any
    tokenizer: Any
    latents: Latents
    plan: Plan
    adapted: Trained | None = None
    trained: Trained | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=dict)


def make_plan(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    budget: int,
    bytes_of: Bytes,
    sha256: str,
    effort: str = "standard",
    rho: float = 0.3,
    seed: int = 0,
    tell: Tell = _silent,
    recall: Recall = anew,
    method: str = "sartor",
) -> Plan:
    """Probe, diagnose, allocate.

    Args:
        model: dense, fp32 or bf16; never changed. budget: bytes of the file. bytes_of: exact size of a file.
        sha256: of the model's source. rho: share of generic text in what repair and rounding are fitted on. recall: see `sense`. method: sartor, or paper.
    Raises:
        BudgetError: the budget is below what can be reached.
    """
    if method == "paper":
        paper.refuse_equal_layers(anatomy(model))
    least = smallest_bytes(model, tokenizer, bytes_of)
    if budget < least:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be reached: the smallest model Sartor would make of this one has {least:,} bytes; ask for more",
            least,
        )
    dense = running(model)
    if method == "paper":
        return _by_the_paper(dense, tokenizer, texts, budget, bytes_of, sha256, effort, rho, seed, tell, recall)
    measured = measure(dense, tokenizer, texts, budget, bytes_of, effort, seed, tell, recall)
    return decide(dense, tokenizer, measured, budget, bytes_of, sha256, rho, seed)


def measure(
    dense: Any,
    tokenizer: Any,
    texts: Texts,
    budget: int,
    bytes_of: Bytes,
    effort: str,
    seed: int = 0,
    tell: Tell = _silent,
    recall: Recall = anew,
) -> Measured:
    """All that `decide` rests on.

    Args:
        dense: in bf16; as it was afterwards. The rest as for `make_plan`.
    """
    e = effort_of(effort)
    probed = _probed(dense, tokenizer, texts, effort, seed, tell, recall)
    rows = probe_rows(texts.probe, tokenizer, e.probe_rows, seed)
    user_rows = training_rows(texts.train, tokenizer)
    user_moments = second_moments(dense, sample(user_rows, e.rows // 2, seed))
    told = lambda share, note: tell("decide", share, note)  # noqa: E731
    listed = whole(anatomy(dense).vocab)
    if can_trim(tokenizer):
        told(0.0, "words the model expects of the user")
        expected = expected_use(dense, sample(user_rows, e.expected_rows, seed))
        said = lambda share, note: told(0.45 * share, note)  # noqa: E731
        listed = words(dense, tokenizer, texts.train, expected, texts.probe, e.validation_bytes, said)
    reference = top_of(dense, rows)
    richest = all_on_base(dense) | dict.fromkeys(embeddings_of(anatomy(dense)), RICHER[-1])
    curved = e.curve_rows > 0 and bytes_of(anatomy(dense), tokenizer, richest) > budget  # so something may have to go
    kinds = _damage_of_bits(dense, tokenizer, user_moments, rows, reference, budget, bytes_of, told)
    poorer = poorer_damage(
        dense, user_moments, kinds[1][DOWN, BASE], rows, reference, e.layers_at_once,
        lambda share, note: told(0.7 + (0.15 if curved else 0.3) * share, note),
    )  # fmt: skip
    curves = Curves()
    if curved:
        judged = probe_rows(texts.probe, tokenizer, e.curve_rows, seed)
        curves = curves_of(dense, probed[1], user_moments, judged, lambda share, note: told(0.85 + 0.15 * share, note))
    return Measured(*probed, listed, *kinds, poorer, curves)


def curves_of(
    dense: Any, user: Effects, moments: Moments, judged: Tensor, told: Callable[[float, str], None]
) -> Curves:
    """What cuts of every part that may lose anything cost, beside the sum of effects."""
    flexible = family_of(anatomy(dense).family).gguf_flexible is not None
    read = {(n, name): moments.c[n, SITE_OF[name]] for n, name, _ in linears_of(dense) if name in WRITERS.values()}
    return measured_curves(dense, user, read, judged, told, tuple(WRITERS) if flexible else ("mlp",))


def _probed(
    dense: Any, tokenizer: Any, texts: Texts, effort: str, seed: int, tell: Tell, recall: Recall
) -> tuple[Units, Effects, Effects, Worth]:
    """(units, the user's effects, generic ones, what effects are worth)."""
    user, generic, _ = sense(dense, tokenizer, texts, effort, seed, tell, recall)
    units = order_units(user)
    return units, user, generic, worth_of(dense, tokenizer, texts, units, effort, seed, tell, recall)


def _by_the_paper(
    dense: Any,
    tokenizer: Any,
    texts: Texts,
    budget: int,
    bytes_of: Bytes,
    sha256: str,
    effort: str,
    rho: float,
    seed: int,
    tell: Tell,
    recall: Recall,
) -> Plan:
    e = effort_of(effort)
    probed = _probed(dense, tokenizer, texts, effort, seed, tell, recall)
    measured = Measured(*probed, whole(anatomy(dense).vocab), {}, {}, {})
    rows = probe_rows(texts.probe, tokenizer, e.probe_rows, seed)
    moments = second_moments(dense, sample(training_rows(texts.train, tokenizer), e.rows // 2, seed))
    order = paper.by_activation(dense, moments)
    found = paper.importance(dense, order, rows, seed, partial(tell, "decide"))
    return paper.decide(dense, tokenizer, measured, order, found, budget, bytes_of, sha256, rho, seed)


def _damage_of_bits(
    dense: Any,
    tokenizer: Any,
    moments: Moments,
    rows: Tensor,
    reference: tuple[Tensor, Tensor],
    budget: int,
    bytes_of: Bytes,
    told: Callable[[float, str], None],
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Damage of the embedding on each grid, and of each kind of linear on BASE and, where they may be worth it, on richer grids.

    They may in attention, whose matrices are small, and everywhere once all of BASE is within the budget.
    """
    told(0.45, "bits of the embedding")
    embeddings = embeddings_of(anatomy(dense))
    measured = lambda names: base_damage(dense, names, rows, reference, moments)  # noqa: E731
    of_embedding = damage_by_grid(dense, embeddings, measured(embeddings), RICHER)
    room = bytes_of(anatomy(dense), tokenizer, all_on_base(dense)) <= budget
    of_kind: dict[tuple[str, str], float] = {}
    for n, (kind, names) in enumerate(kinds_of(dense).items()):
        told(0.5 + 0.03 * n, f"bits of {kind}")
        grids = RICHER if room or kind in ATTENTION else ()
        of_kind |= {(kind, g): d for g, d in damage_by_grid(dense, names, measured(names), grids).items()}
    return of_embedding, of_kind


def apply_plan(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    texts: Texts,
    effort: str = "standard",
    training: Training | None = None,
    tell: Tell = _silent,
    kept: Callable[[str], Kept] | None = None,
    settled: Callable[[Plan], None] = lambda plan: None,
    steps: int = 1,
    fitting: Fitting = Surgery.fitted,
) -> Compressed:
    """Trim, adapt, settle the cuts, prune, fit what is left onto its grids, recover.

    Args:
        model: dense, fp32; never changed. A function that returns it lets it be freed once it is trimmed (training needs the room).
        training: None for the effort's own, UNTRAINED for none; its seconds are dealt out by what is cut. kept: where the best weights of a training ("adapt", "recover") are kept (None: in memory); what is there
        already is not done again. settled: told the plan whose cuts the adapted network has decided. steps: that the cuts are made in (`buffer.py`). fitting: puts what is left onto its grids.
    """
    e = effort_of(effort)
    clock = Clock()
    small, fitted = trim(_given(model), tokenizer, plan)
    plan, training = _dealt(plan, training or e.training, small)
    learned, unseen = kept_back(own_rows(tokenizer, fitted, plan, texts), e.felt_rows, plan.seed)
    generic = training_rows(texts.generic_train, fitted)
    validation = encode_windows(cut_windows(texts.validation, e.validation_bytes), fitted)
    school = _School(validation, plan.seed, tell, kept or (lambda stage: InMemory()))
    clock.lap("trim")
    said, adapted, pruning = None, None, dict[str, Any]()
    if max(training.adapt.seconds, training.recover.seconds) > 0:
        said, adapted = _adapt(small, learned, sample(generic, e.rows, plan.seed), training, school)
        clock.lap("adapt")
    latents, before = school.kept("recover").load() or (None, 0.0)
    if latents is None:
        whole = running(small)
        rows = learned, unseen, generic, validation
        surgery = Surgery(whole, *rows, said, training.recover, effort, tell, school.kept("steps"))
        held = probe_rows(texts.validation, fitted, e.probe_rows, plan.seed)
        small, plan, pruning = surgery.cut(small, plan, steps, held)
        if plan.steps == 1:
            settled(plan)
        clock.lap("prune")
        latents = fitting(surgery, small, plan, e.fit_rows, partial(tell, "fit"))
        if plan.steps > 1:  # what they have healed is kept only now
            settled(plan)
        clock.lap("fit")
        del whole, surgery
    else:
        cut_(small, plan)
    student = converted_(small, running_dtype())
    del small
    put_(student, latents)
    trained = None
    if said is not None:
        recover = after_steps(training.recover, plan)
        own = None if training.lessons else learned
        trained = school.train("recover", student, latents, own, said, recover, before)
        clock.lap("recover")
    return Compressed(student, fitted, latents, plan, adapted, trained, clock.seconds, pruning)


def _dealt(plan: Plan, training: Training, small: Any) -> tuple[Plan, Training]:
    """The seconds of training dealt out by what was foretold to go: an interrupted job goes on with what it was dealt, whatever has been settled since."""
    gone = share_gone(plan, anatomy(small)) if plan.gone is None else plan.gone
    return replace(plan, gone=gone), training.dealt(gone)


def _given(model: Any) -> Any:
    return model if isinstance(model, torch.nn.Module) else model()


@dataclass(frozen=True)
class _School:
    """What both trainings share: the text they are judged by, the seed, where they tell and where they keep the best."""

    validation: Sequence[Window]
    seed: int
    tell: Tell
    kept: Callable[[str], Kept]

    def train(
        self,
        stage: str,
        model: Any,
        latents: Latents,
        own: Tensor | None,
        said: Anchor,
        config: DistilConfig,
        before: float,
    ) -> Trained | None:
        """Distil for what is left of the time after `before`, the seconds trained ahead of an interruption."""
        if before >= config.seconds:
            return None
        self.tell(stage, 0.0, "the first step")
        told = lambda share, note: self.tell(stage, share, note)  # noqa: E731
        kept, seed = self.kept(stage), self.seed + (before > 0)  # a resumed training does not see its first rows again
        trained = distil_(model, latents, own, said, self.validation, config, seed, told, kept, before)
        kept.save(latents, config.seconds)
        return trained


def _adapt(
    small: Any, own: Tensor, generic: Tensor, training: Training, school: _School
) -> tuple[Anchor, Trained | None]:
    """Train the trimmed network on the user's rows, in place.

    Returns:
        (what the cut network shall learn: the adapted one's words on the user's rows, where it gives lessons, and the dense one's on generic rows; the course).
    """
    school.tell("adapt", 0.0, "what the original says of generic text")
    student = running(small)
    dense_said = anchor(student, generic)
    latents, before = school.kept("adapt").load() or (free(small), 0.0)
    trained = school.train("adapt", student, latents, own, dense_said, training.adapt, before)
    for name, p in small.named_parameters():
        p.data = latents.masters[name]
    put_(student, latents)
    if not training.lessons:
        return dense_said, trained
    school.tell("adapt", 1.0, "what the adapted model says of the user's text")
    return joined(anchor(student, sample(own, training.lessons, school.seed)), dense_said), trained


def trim(model: Any, tokenizer: Any, plan: Plan) -> tuple[Any, Any]:
    """A copy of the model with the plan's vocabulary, and its tokenizer."""
    small = clone(model)
    if plan.vocabulary is None:
        return small, tokenizer
    smaller, ids = trim_tokenizer(tokenizer, from_mask(plan.vocabulary))
    special = {f"{n}_token_id": getattr(smaller, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    shrink_vocabulary_(small, ids, special)
    return small, smaller


def own_rows(full: Any, small: Any, plan: Plan, texts: Texts) -> Tensor:
    """Rows of the user's own text, as the trimmed model will meet *new* text: as many of its words are spelled in pieces.

    Which ones the plan says (`Words.seen_again`).
    """
    own = [*texts.train, *texts.probe]
    if plan.vocabulary is None or plan.seen_again is None:
        return training_rows(own, small)
    fewer, old = trim_tokenizer(full, from_mask(plan.seen_again))
    place = {o: n for n, o in enumerate(from_mask(plan.vocabulary))}
    return torch.tensor([place[int(o)] for o in old])[training_rows(own, fewer)]


def kept_back(rows: Tensor, many: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rows to learn from, `many` that stay unseen, to say afterwards what the adapted network needs); all for both where there is little text."""
    if len(rows) < FEWEST * many:
        return rows, rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[many:]], rows[order[:many]]
