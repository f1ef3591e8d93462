"""The head that a pre-trained classifier came with: its rows for those of a user's classes that it knows by name.

Names are transformers' (`id2label` of config.json), timm's (`label_names`, `label_descriptions`), or lines of a text file that lies beside the model. Synonyms are separated by commas, as ImageNet's are; case,
hyphens and underscores do not count. Of a network whose head reads something else than the features behind its last layer (CLIP's; hidden layers in front of the head) there are none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.errors import SourceError
from sartor.model.checkpoints import is_timm, read_json, weight_files
from sartor.model.families import VISION
from sartor.model.graph import LAYERS, Graph
from sartor.model.vision import FEATURES, Vision


@dataclass(frozen=True)
class Rows:
    """A head for a user's classes, on the features behind the last layer. known: of how many it came with the network; the rows of the others are zeros."""

    weight: Float[Tensor, "c f"]
    bias: Float[Tensor, " c"]
    known: int


def rows_for(folder: Path, network: Any, names: Sequence[str], classes: Sequence[str]) -> tuple[Rows | None, str]:
    """(The head's rows for these classes, None where it knows none of them; what a report must say of it, or "").

    Args:
        folder: where the network was read from. names: of the head's classes in order, from a file beside the model; empty: what config.json says is taken.
    """
    found = _of_graph(network) if isinstance(network, Graph) else _of_transformer(folder, network)
    if found is None:
        return None, ""
    weight, bias = found
    names = names or _named(folder)
    if names and len(names) != len(weight):
        return None, f"{len(names)} classes are named and the model's own head has {len(weight)} rows: it is not used"
    row_of = _rows_by_name(names)
    rows = [row_of.get(_plain(name), -1) for name in classes]
    known = sum(row >= 0 for row in rows)
    at, there = torch.tensor(rows).clamp_min(0), torch.tensor(rows) >= 0
    return (Rows(weight[at] * there[:, None], bias[at] * there, known), "") if known else (None, "")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _rows_by_name(names: Sequence[str]) -> dict[str, int]:
    """The row of every name that means one row alone: ImageNet has two cranes."""
    rows: dict[str, set[int]] = {}
    for row, name in enumerate(names):
        for one in {name, *name.split(",")}:
            rows.setdefault(_plain(one), set()).add(row)
    return {name: row for name, (row, *others) in rows.items() if name and not others}


def _named(folder: Path) -> list[str]:
    """What config.json calls the head's classes; empty where it does not, or is of no use."""
    if not (folder / "config.json").is_file():
        return []
    raw = read_json(folder / "config.json")
    labels, said = raw.get("id2label"), raw.get("label_names")
    if isinstance(labels, dict) and sorted(labels) == sorted(str(n) for n in range(len(labels))):
        return [str(labels[str(n)]) for n in range(len(labels))]
    if not isinstance(said, list):
        return []
    about = raw.get("label_descriptions")
    about = about if isinstance(about, dict) else {}
    return [", ".join((str(name), *([str(about[name])] if name in about else []))) for name in said]


def _of_graph(graph: Graph) -> tuple[Tensor, Tensor] | None:
    """Weights and biases of the last linear layer, where it reads the pooled last map itself."""
    between = graph.nodes[graph.before_pool : graph.ends]
    if graph.head is None or graph.before_pool == graph.ends or any(node.op in LAYERS for node in between):
        return None
    head: Any = graph.layers[graph.nodes[-1].name]
    bias = torch.zeros(len(head.weight)) if head.bias is None else head.bias.detach()
    return head.weight.detach().float(), bias.float()


def _of_transformer(folder: Path, network: Vision) -> tuple[Tensor, Tensor] | None:
    """The same out of a checkpoint, for the class token beside the mean patch; a head that reads the class token alone gives the patches no weight."""
    from safetensors import safe_open

    raw = read_json(folder / "config.json")
    row = VISION["timm" if is_timm(raw) else raw["model_type"]]
    pooled = (raw.get("model_args") or {}).get("global_pool", raw.get("global_pool", "token"))
    found: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118
                    if name.startswith(row.classifier):
                        found[name] = f.get_tensor(name).float()
    except Exception as error:
        raise SourceError(f"the weights cannot be read ({type(error).__name__}): fetch the model again") from error
    start = next((s for s in row.classifier if f"{s}weight" in found), None)
    if start is None or (is_timm(raw) and pooled not in ("token", "")):
        return None
    weight, width = found[f"{start}weight"], network.config.hidden_size
    if weight.ndim != 2 or weight.shape[1] not in (width, FEATURES * width):
        return None
    wide = torch.cat([weight, weight.new_zeros(len(weight), FEATURES * width - weight.shape[1])], 1)
    return wide, found.get(f"{start}bias", torch.zeros(len(weight)))
