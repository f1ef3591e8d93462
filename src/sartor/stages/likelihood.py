"""From the last hidden state to probabilities, some positions at a time.

Logits are the largest tensor of the whole job (tokens x vocabulary): here they never exist for more than CHUNK positions
in fp32, which keeps a job within its memory and makes a training step a tenth faster than autograd's own graph (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.model.network import embed, through

TOP = 100  # log-probabilities kept of the model that is compared with: the rest counts as one event
LIKELY, DRAWN = 64, 36  # tokens of a teacher: its likeliest, and draws that stand for all the others
TINY = 1e-6  # probabilities that are divided by are no smaller
CHUNK = 128  # positions whose fp32 logits exist at once: 14 MB at 28,000 tokens, which stays in the cache


def hidden_of(model: Any, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t w"]:
    """What the head reads."""
    return through(model, embed(model, ids))


@torch.no_grad()
def nats_of(model: Any, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t-1"]:
    """-log p of every token but the first, in nats."""
    hidden, targets = hidden_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    out = torch.empty(len(targets))
    for at in range(0, len(targets), CHUNK):
        logits = model.lm_head(hidden[at : at + CHUNK]).float()
        out[at : at + CHUNK] = logits.logsumexp(-1) - logits.gather(1, targets[at : at + CHUNK, None])[:, 0]
    return out.reshape(len(ids), -1)


def _logits_of(model: Any, ids: Int[Tensor, "n t"], batch: int) -> Iterator[Float[Tensor, "m v"]]:
    """fp32 logits of all positions in order, at most CHUNK of them at once."""
    for part in ids.split(batch):
        yield from _logits_from(model, hidden_of(model, part))


def _logits_from(model: Any, hidden: Float[Tensor, "n t w"]) -> Iterator[Float[Tensor, "m v"]]:
    for part in hidden.flatten(0, 1).split(CHUNK):
        yield model.lm_head(part).float()


@torch.no_grad()
def expected_use(model: Any, rows: Int[Tensor, "n t"], batch: int = 8) -> Float[Tensor, " v"]:
    """Mean probability that the model gives every token on these rows: the rates it would write such text with.

    Counts know only words that occurred; this also knows the ones that could as well have.
    """
    total = torch.zeros(model.lm_head.out_features)
    for logits in _logits_of(model, rows, batch):
        total += torch.softmax(logits, -1).sum(0)
    return total / rows.numel()


@torch.no_grad()
def top_of(model: Any, ids: Int[Tensor, "n t"], batch: int = 8) -> tuple[Float[Tensor, "n t k"], Int[Tensor, "n t k"]]:
    """The TOP largest log-probabilities and their tokens at every position (fp16 and int32 to keep memory small)."""
    return _said(ids, (_top(logits) for logits in _logits_of(model, ids, batch)))


def _top(logits: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    top = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    return top.values - logits.logsumexp(-1, keepdim=True), top.indices


def _said(ids: Int[Tensor, "n t"], parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens of some positions at a time, put together (fp16 and int32 to keep memory small)."""
    values, tokens = zip(*((v.half(), t.int()) for v, t in parts), strict=True)
    return torch.cat(values).reshape(*ids.shape, -1), torch.cat(tokens).reshape(*ids.shape, -1)


@torch.no_grad()
def lesson_of(
    model: Any, ids: Int[Tensor, "n t"], seed: int = 0, batch: int = 8
) -> tuple[Float[Tensor, "n t k"], Int[Tensor, "n t k"]]:
    """What a teacher says at every position: log-probabilities (fp16) and tokens (int32) that sum to all it expects.

    The LIKELY likeliest as they are; all others by DRAWN of them, drawn in proportion to their probability, at equal spaces on their
    cumulative sum, each with its share of the rest. The gradient is then, on average, that of the whole distribution (Anshumann
    et al. 2025, arXiv:2503.16870; they draw every token). A rest that counts as one event leaves the student free to spread it as it likes, and
    rare words pay for that (docs/log.md).
    """
    generator = torch.Generator().manual_seed(seed)
    return _said(ids, (_top_and_draws(logits, generator) for logits in _logits_of(model, ids, batch)))


def _top_and_draws(
    logits: Float[Tensor, "m v"], generator: torch.Generator
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    log_p = torch.log_softmax(logits, -1)
    top = log_p.topk(min(LIKELY, log_p.shape[-1]), dim=-1)
    sums = log_p.exp_().scatter_(1, top.indices, 0.0).cumsum(-1)
    rest = sums[:, -1:]
    places = (torch.arange(DRAWN) + torch.rand(len(sums), DRAWN, generator=generator)) / DRAWN
    drawn = torch.searchsorted(sums, places * rest).clamp_max_(sums.shape[-1] - 1)
    values = torch.cat([top.values, (rest / DRAWN).log().expand(-1, DRAWN)], -1)
    return values, torch.cat([top.indices, drawn], -1)


def kl_to_top(logits: Float[Tensor, "n v"], values: Float[Tensor, "n k"], ids: Int[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats, over the teacher's top tokens and the rest as one event."""
    return kl_terms(torch.log_softmax(logits, -1), values, ids).mean()


def kl_terms(log_q: Float[Tensor, "n v"], values: Float[Tensor, "n k"], ids: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """The same position by position, from the student's log-probabilities."""
    log_top = log_q.gather(-1, ids.long())
    p = values.float().exp()
    rest, q_rest = ((1 - x.sum(-1)).clamp_min(0.0) for x in (p, log_top.exp()))
    return (torch.special.xlogy(p, p) - p * log_top).sum(-1) + torch.special.xlogy(rest, rest / q_rest.clamp_min(TINY))


@torch.no_grad()
def kl_of(model: Any, ids: Int[Tensor, "n t"], reference: tuple[Tensor, Tensor], batch: int = 8) -> float:
    """Mean KL(teacher || model) in nats per token, against what `top_of` said of the teacher on the same rows."""
    values, tokens = (r.flatten(0, 1) for r in reference)
    total, at = 0.0, 0
    for logits in _logits_of(model, ids, batch):
        here = slice(at, at + len(logits))
        total += float(kl_to_top(logits, values[here], tokens[here])) * len(logits)
        at = here.stop
    return total / ids.numel()


@torch.no_grad()
def apart(model: Any, dense: Float[Tensor, "n t w"]) -> Callable[[Float[Tensor, "n t w"]], float]:
    """Mean KL, in nats per token, of what the head makes of these hidden states to what it makes of others."""
    said = [_top(logits) for logits in _logits_from(model, dense)]

    @torch.no_grad()
    def distance(hidden: Float[Tensor, "n t w"]) -> float:
        parts = zip(_logits_from(model, hidden), said, strict=True)
        return sum(float(kl_terms(torch.log_softmax(q, -1), *top).sum()) for q, top in parts) / hidden[..., 0].numel()

    return distance


@torch.no_grad()
def drawn_gradients(model: Any, hidden: Float[Tensor, "n t w"], generator: torch.Generator) -> Float[Tensor, "n t w"]:
    """Gradients of log p(y) at the hidden states, y drawn at every position from what the model itself expects."""
    u = model.lm_head.weight
    found = []
    for part in hidden.flatten(0, 1).split(CHUNK):
        p = torch.softmax(model.lm_head(part).float(), -1)
        mean = p.to(u.dtype) @ u
        sums = p.cumsum_(-1)
        place = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
        found.append(u[torch.searchsorted(sums, place)[:, 0].clamp_max_(sums.shape[-1] - 1)] - mean)
    return torch.cat(found).reshape(hidden.shape)


class _HeadLoss(torch.autograd.Function):
    """Mean KL(target || softmax(hidden @ weight^T)) with its gradients made on the way forward (after Liger, arXiv:2410.10989).

    A target is k tokens with probabilities p that sum to 1; a token may be there more than once. The gradient at the logits is q - p:
    cross entropy is the case of one token with p = 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n w"],
        weight: Float[Tensor, "v w"],
        p: Float[Tensor, "n k"],
        ids: Int[Tensor, "n k"],
    ) -> Tensor:
        logits, total = hidden @ weight.T, 0.0
        for at in range(0, len(ids), CHUNK):
            here = slice(at, at + CHUNK)
            wanted, tokens = p[here].float(), ids[here].long()
            log_q = torch.log_softmax(logits[here].float(), -1)
            total += float((torch.special.xlogy(wanted, wanted) - wanted * log_q.gather(1, tokens)).sum())
            q = log_q.exp_().scatter_add_(1, tokens, -wanted)
            logits[here] = q.div_(len(ids))
        ctx.save_for_backward(logits @ weight, logits.T @ hidden if ctx.needs_input_grad[1] else None)
        return torch.tensor(total / len(ids))

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * above[0], None if of_weight is None else of_weight * above[0], None, None


def loss_of(model: Any, hidden: Float[Tensor, "n t w"], ids: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
    """Mean -log p of every token but the first, with gradients (no family here has a bias in its head)."""
    targets = ids[:, 1:].reshape(-1, 1)
    loss: Tensor = _HeadLoss.apply(
        hidden[:, :-1].flatten(0, 1), model.lm_head.weight, torch.ones(targets.shape), targets
    )
    return loss


def loss_to_lesson(
    model: Any, hidden: Float[Tensor, "n t w"], values: Float[Tensor, "n t k"], ids: Int[Tensor, "n t k"]
) -> Float[Tensor, ""]:
    """Mean KL(teacher || model) in nats, but for what the draws leave uncertain, with gradients; the teacher as `lesson_of` has it."""
    p = values.flatten(0, 1).float().exp()
    loss: Tensor = _HeadLoss.apply(hidden.flatten(0, 1), model.lm_head.weight, p, ids.flatten(0, 1))
    return loss
