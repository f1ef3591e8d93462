"""The head that a pre-trained classifier came with: its rows for those of a user's classes that it knows by name.

Names are transformers' (`id2label` of config.json), timm's (`label_names`, `label_descriptions`), or lines of a text file that lies beside the model. Synonyms are separated by commas, as ImageNet's are; case,
hyphens and underscores do not count. Of a network whose head reads something else than the features behind its last layer (CLIP's; hidden layers in front of the head) there are none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.model.checkpoints import is_timm
from sartor.model.families import VISION
from sartor.model.graph import Graph, shapes
from sartor.model.stored import read_json, stored
from sartor.model.vision import FEATURES, Vision


@dataclass(frozen=True)
class Rows:
    """A head for a user's classes, on the features behind the last layer. known: of how many it came with the network; the rows of the others are zeros."""

    weight: Float[Tensor, "c f"]
    bias: Float[Tensor, " c"]
    known: int


def rows_for(folder: Path, network: Any, named: Sequence[str], classes: Sequence[str]) -> tuple[Rows | None, str]:
    """(The head's rows for these classes, None where it knows none of them; what a report must say of it, or "").

    Args:
        folder: where the network was read from. named: names of the head's classes in order, from a file beside the model; where that does not fit, or is empty, what config.json says is taken.
    """
    found = _of_graph(network) if isinstance(network, Graph) else _of_transformer(folder, network)
    many = 0 if found is None else len(found[0])
    names, note = (named, "") if len(named) == many else (names_in(folder), _unfit(len(named), many) if named else "")
    if found is None or len(names) != many:
        return None, note
    row_of, device = _rows_by_name(names), next(network.parameters()).device
    rows = torch.tensor([row_of.get(_plain(name), -1) for name in classes], device=device)
    there, at = rows >= 0, rows.clamp_min(0)
    known = int(there.sum())
    if not known:
        return None, note or (
            "labels.txt names none of your classes: the model's own head is not used" if named else ""
        )
    weight, bias = (t.to(device) for t in found)
    return Rows(weight[at] * there[:, None], bias[at] * there, known), note


def _unfit(named: int, rows: int) -> str:
    if not rows:
        return "labels.txt lies beside the model, but no head of its own reads the features behind its last layer: the file is not used"
    return f"labels.txt names {named} classes and the model's own head has {rows} rows: the file is not used"


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().lower()


def _rows_by_name(names: Sequence[str]) -> dict[str, int]:
    """The row of every name that means one row alone: ImageNet has two cranes."""
    rows: dict[str, set[int]] = {}
    for row, name in enumerate(names):
        for one in {name, *name.split(",")}:
            rows.setdefault(_plain(one), set()).add(row)
    return {name: row for name, (row, *others) in rows.items() if name and not others}


def names_in(folder: Path) -> list[str]:
    """What config.json calls the head's classes, or source.json of a graph that was made of such a folder; empty where neither does, or is of no use."""
    told = [folder / name for name in ("config.json", "source.json") if (folder / name).is_file()]
    raw = read_json(told[0]) if told else {}
    labels, said = raw.get("id2label"), raw.get("label_names")
    if isinstance(labels, dict) and sorted(labels) == sorted(str(n) for n in range(len(labels))):
        return [str(labels[str(n)]) for n in range(len(labels))]
    if not isinstance(said, list):
        return []
    about = raw.get("label_descriptions")
    about = about if isinstance(about, dict) else {}
    return [", ".join((str(name), *([str(about[name])] if name in about else []))) for name in said]


POOLING = {"global_average_pool", "flatten"}


def _of_graph(graph: Graph) -> tuple[Tensor, Tensor] | None:
    """Weights and biases of the last linear layer, where it reads means of the last map's channels and nothing else."""
    between = graph.nodes[graph.before_pool : graph.ends]
    if graph.head is None or not between or any(node.op not in POOLING for node in between):
        return None
    head: Any = graph.layers[graph.nodes[-1].name]
    if head.weight.shape[1] != shapes(graph)[graph.nodes[graph.before_pool - 1].name][0]:  # every place of the map
        return None
    bias = torch.zeros(len(head.weight)) if head.bias is None else head.bias.detach()
    return head.weight.detach().float(), bias.float()


def _of_transformer(folder: Path, network: Vision) -> tuple[Tensor, Tensor] | None:
    """The same out of a checkpoint, for the class token beside the mean patch; a head that reads the class token alone gives the patches no weight."""
    raw = read_json(folder / "config.json")
    row = VISION["timm" if is_timm(raw) else raw["model_type"]]
    pooled = (raw.get("model_args") or {}).get("global_pool", raw.get("global_pool", "token"))
    found = stored(folder, lambda name: name.startswith(row.classifier))
    start = next((s for s in row.classifier if f"{s}weight" in found), None)
    if start is None or (is_timm(raw) and pooled not in ("token", "")):
        return None
    weight, width = found[f"{start}weight"], network.config.hidden_size
    if weight.ndim != 2 or weight.shape[1] not in (width, FEATURES * width):
        return None
    wide = torch.cat([weight, weight.new_zeros(len(weight), FEATURES * width - weight.shape[1])], 1)
    return wide, found.get(f"{start}bias", torch.zeros(len(weight)))
