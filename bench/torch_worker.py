"""A network quantized by torchao and run in PyTorch, in a process of its own: a job as JSON on stdin, its result as JSON on stdout.

As in `llama_worker.py`, so that its peak memory can be measured. Every job quantizes anew, which takes seconds: there is no file format to load it from.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sartor.export.worker import answer, measured

GROUP = 32


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int4() -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    best = Int4ChooseQParamsAlgorithm.HQQ
    return PrototypeInt4WeightOnlyConfig(GROUP, int4_choose_qparams_algorithm=best, set_inductor_config=False)


CONFIGS: dict[str, Callable[[], Any]] = {"int8": _int8, "int4": _int4}


def load(folder: str, kind: str) -> Any:
    """The network in bf16, the linears of its layers quantized."""
    from torchao.quantization import quantize_
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True)
    model.eval().requires_grad_(False)
    quantize_(model.model.layers, CONFIGS[kind](), lambda module, name: isinstance(module, nn.Linear))
    return model


def plain_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter as what a file holds of it: itself, or the tensors that a quantized one consists of."""
    for name, p in model.named_parameters():
        if hasattr(p, "__tensor_flatten__"):
            for part in p.__tensor_flatten__()[0]:
                yield f"{name}.{part}", getattr(p, part)
        else:
            yield name, p.data


def job_write(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """A file of all tensors; read: bytes of those that a generated token needs."""
    from safetensors.torch import save_file

    tensors = {n: t.contiguous() for n, t in plain_tensors(model)}
    save_file(tensors, Path(job["file"]))
    unread = 0 if model.config.tie_word_embeddings else tensors["model.embed_tokens.weight"].nbytes
    return {"read": sum(t.nbytes for t in tensors.values()) - unread}


def job_score(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """-log p of tokens 1, 2, ... of every window."""
    nats = []
    for ids in job["windows"]:
        row = torch.tensor([ids])
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        nats.append((logits.logsumexp(-1) - logits.gather(1, row[0, 1:, None])[:, 0]).tolist())
    return {"nats": nats}


def job_speed(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Best of `repeats` of a prompt of ids and of `generate` greedy tokens after it, tokens per second."""
    prompt, generate = torch.tensor([job["ids"]]), job["generate"]
    best_prompt = best_generate = 0.0
    for _ in range(job["repeats"]):
        started = time.perf_counter()
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        best_prompt = max(best_prompt, prompt.shape[1] / (time.perf_counter() - started))
        started = time.perf_counter()
        for _ in range(generate):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        best_generate = max(best_generate, generate / (time.perf_counter() - started))
    return {"prompt_tokens_per_s": best_prompt, "generate_tokens_per_s": best_generate}


JOBS = {"write": job_write, "score": job_score, "speed": job_speed}


@torch.inference_mode()
def work(job: dict[str, Any]) -> dict[str, Any]:
    """One job."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)  # torchao tells of CUDA kernels that it did not find
    torch.set_num_threads(job["threads"])
    return JOBS[job["do"]](load(job["folder"], job["kind"]), job)


if __name__ == "__main__":
    answer(measured(work))
