"""Eight bits with deeper cuts beside four bits with shallower ones, at equal bytes of the real file, nothing trained.

    python bench/vision_bits.py MODEL --data DIR [--generic DIR] [--shares 0.25 0.15 0.1] [--seed 0]

The network with the head fitted to the user's classes is probed once. Every arm is allotted as a job allots it, cut, and fitted layer by layer (four bits: onto their grid). Accuracy and nats on the held-out test
photos, in PyTorch. Results: a table on stdout. What four bits damage when nothing is cut, as a job measures it, stands in front.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vision_cuts import as_plan, kept_of, parser_of, said

from sartor.carving import four_damage, four_grids, held_
from sartor.effort import picture_effort_of
from sartor.job import Job
from sartor.model.network import anatomy, clone
from sartor.model.precision import running
from sartor.picture_job import PreparedPictures
from sartor.picture_view import bytes_of
from sartor.pictures import RHO, felt_pictures, priced
from sartor.sources import resolve
from sartor.stages.allot import Costs, allot
from sartor.stages.fit import evidence_of, fit
from sartor.stages.probe import recovered
from sartor.stages.prune import cut_
from sartor.stages.recognition import recognize
from sartor.stages.tokens import sample

WEIGHTS = ("int8", "int4")


def told(model: Any, pixels: Any, labels: Any) -> str:
    return said(recognize(running(model), pixels, labels))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.25, 0.15, 0.1], help="of the original's fp16 bytes"
    )
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    p = PreparedPictures(Job(a.model, a.data, "25%", generic=a.generic, seed=a.seed), resolve(a.model), lambda *_: None)
    e, pictures, dense, test = picture_effort_of("standard"), p.pictures, p.dense, (p.album.test.pixels, p.labels[2])
    own, others = sample(pictures.train, e.fitted, a.seed), sample(pictures.generic, e.fitted // 2, a.seed)
    rho, whole = RHO if len(others) else 0.0, running(dense)
    damage = four_damage(dense, own, others, pictures.validation, rho)
    print(f"{Path(a.data).name}: {told(dense, *test)}; four bits alone damage {damage:.4f} nats a picture", flush=True)
    user, halves, generic = felt_pictures(whole, pictures, e, a.seed)
    effects = recovered(user, halves, generic) if generic else user
    evidence, curves = evidence_of(whole, own, others, rho), dict[str, Any]()
    for share in a.shares:
        for weights in WEIGHTS:
            size_of = bytes_of(dense, weights)
            costs = Costs(size_of, int(share * p.original_fp16), curves=curves)
            costs = priced(whole, pictures, effects, costs, e, a.seed)
            curves, found = costs.curves, allot(anatomy(dense), effects, costs)
            small = clone(dense)
            cut_(small, as_plan(dense, kept_of(found)))
            held_(small, fit(small, whole, evidence, four_grids(small) if weights == "int4" else {}))
            left, before = anatomy(small), anatomy(dense)
            sizes = f"{sum(left.ffn) / sum(before.ffn):.0%} of the channels, {sum(left.groups)} of {sum(before.groups)} heads"
            print(f"{share:.0%} {weights}: {size_of(left) / 1e6:.2f} MB, {sizes}, {told(small, *test)}", flush=True)


if __name__ == "__main__":
    main()
