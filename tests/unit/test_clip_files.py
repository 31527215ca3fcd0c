"""CLIP's weights from every form they are given in, without anything run or downloaded; what is wrong is one line."""

from __future__ import annotations

import ast
import json
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ofa_ds.convert.torchscript_file import is_torchscript, read_torchscript
from ofa_ds.vision import libraries
from ofa_ds.vision.clip import Clip, load_clip, new_model, rerank, to_pixels
from ofa_ds.vision.clip_files import ClipSizes, read_clip

SIZES = ClipSizes(
    embed_dim=8, image_size=16, patch_size=8, vision_width=64, vision_layers=1, context_length=77, vocab_size=49408,
    text_width=64, text_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Of fp16 values, as OpenAI's are."""
    rng = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in new_model(SIZES).state_dict().items()}
    return {name: (torch.randn(shape, generator=rng) * 0.1).half().float() for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for something")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def as_torchscript(path: Path, weights: dict[str, Tensor]) -> Path:
    """Modules of these parameter names, half precision where OpenAI's have it, and three numbers as buffers."""

    class Node(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    root = Node()
    for name, value in weights.items():
        *way, last = name.split(".")
        node = root
        for part in way:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]
        value = value if "ln_" in name or value.ndim < 2 else value.half()
        node.register_parameter(last, nn.Parameter(value, requires_grad=False))
    for name in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(name, torch.tensor(getattr(SIZES, name.replace("input_resolution", "image_size"))))
    torch.jit.trace(root, torch.zeros(1)).save(str(path))
    return path


def as_hugging_face(folder: Path, weights: dict[str, Tensor], **config: object) -> Path:
    """As transformers' CLIPModel names them; an old file, with positions as numbers."""
    folder.mkdir()
    names = {"conv1": "embeddings.patch_embedding", "class_embedding": "embeddings.class_embedding"}
    names |= {"token_embedding": "embeddings.token_embedding", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    names |= {"ln_final": "final_layer_norm", "transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1"}
    names |= {"ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    found: dict[str, Tensor] = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    for name, value in weights.items():
        tower, rest = ("vision_model.", name[7:]) if name.startswith("visual.") else ("text_model.", name)
        if name == "logit_scale":
            found[name] = value
        elif name in ("visual.proj", "text_projection"):
            found[{"visual.proj": "visual_projection.weight"}.get(name, "text_projection.weight")] = (
                value.T.contiguous()
            )
        elif ".in_proj_" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                kind = name.rpartition("_")[2]
                place = rest.rpartition("attn.")[0].replace("transformer.resblocks", "encoder.layers")
                found[f"{tower}{place}self_attn.{part}_proj.{kind}"] = rows.clone()
        else:
            for ours, theirs in names.items():
                rest = rest.replace(ours, theirs)
            found[tower + rest] = value
    save_file(found, folder / "model.safetensors")
    towers = {"hidden_act": "quick_gelu", "num_attention_heads": 1, "hidden_size": 64} | config
    (folder / "config.json").write_text(json.dumps({"text_config": towers, "vision_config": towers}))
    return folder


def features(clip: Clip) -> tuple[Tensor, Tensor]:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return clip.image_features([image]), clip.text_features(["a red circle"])


def test_every_form_of_the_same_weights_gives_the_same_features(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "state.pt")
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    forms = [as_torchscript(tmp_path / "ViT-B-16.pt", weights), tmp_path / "state.pt", tmp_path]
    forms += [tmp_path / "open_clip_model.safetensors", as_hugging_face(tmp_path / "hf", weights)]
    assert is_torchscript(forms[0]) and not is_torchscript(forms[1])
    before = torch.random.get_rng_state()
    found = [features(load_clip(form)) for form in forms]
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
    for image, text in found:
        assert image.dtype == text.dtype == torch.float32
        assert image.norm().item() == pytest.approx(1, abs=1e-6) and not image.requires_grad
        assert torch.equal(image, found[0][0]) and torch.equal(text, found[0][1])


def test_what_configurations_say_of_the_activation_is_followed(weights: dict[str, Tensor], tmp_path: Path) -> None:
    assert read_clip(as_hugging_face(tmp_path / "quick", weights))[1].quick_gelu
    assert not read_clip(as_hugging_face(tmp_path / "plain", weights, hidden_act="gelu"))[1].quick_gelu
    with pytest.raises(ValueError, match="want quick_gelu or gelu in both towers"):
        read_clip(as_hugging_face(tmp_path / "other", weights, hidden_act="relu"))
    with pytest.raises(ValueError, match="4 heads of a width of 64: want heads of 64"):
        read_clip(as_hugging_face(tmp_path / "heads", weights, num_attention_heads=4))
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    assert read_clip(tmp_path)[1].quick_gelu
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    assert not read_clip(tmp_path)[1].quick_gelu


class Command:
    def __reduce__(self) -> tuple:
        return print, ("this must not be printed",)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"visual.proj": torch.zeros(64, 9)},
            r"visual.proj: want shape \[64, 8\] of a ViT CLIP of the sizes that its other weights have, got \[64, 9\]",
        ),
        ({"ln_final.bias": torch.full((64,), torch.nan)}, "ln_final.bias: has values that are not finite"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight is no weight of a ViT CLIP of"),
        ({"ln_final.bias": None}, "ln_final.bias is missing"),
        ({"visual.conv1.weight": None}, "visual.conv1.weight: want a tensor of 4 dimensions, as a ViT CLIP has it"),
        ({"positional_embedding": torch.zeros(77, 65)}, "want widths that are multiples of 64"),
        ({"ln_final.bias": Command()}, "refused, it holds more than tensors and plain values"),
        ({"ln_final.bias": "text"}, "want a state dict of tensors"),
    ],
)
def test_other_weights_and_code_are_one_line(weights, tmp_path: Path, capsys, change: dict, message: str) -> None:
    content = {name: value for name, value in (weights | change).items() if value is not None}
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=message) as error:
        load_clip(tmp_path / "bad.pt")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "bad.pt"))
    assert "must not" not in capsys.readouterr().out


def rewritten(source: Path, path: Path, name: str, data: bytes, *, packed: bool = False) -> Path:
    """The archive with another content of one of its files."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            here = info.filename.endswith(f"/{name}")
            kind = zipfile.ZIP_DEFLATED if here and packed else zipfile.ZIP_STORED
            new.writestr(info.filename, data if here else old.read(info), compress_type=kind)
    return path


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "data.pkl",
            b"cbuiltins\nprint\n(Vmust not be printed\ntR.",
            "byte 17: the instruction UNICODE has no place",
        ),
        (
            "data.pkl",
            b"\x80\x02cbuiltins\nprint\nq\x00)\x81}b.",
            "refused, it holds more than modules and tensors: a bu",
        ),
        ("data.pkl", b"\x80\x02c__torch__\nM\n)\x81}(X\x01\x00\x00\x00acos\nsystem\n)Rub.", "a call of os.system"),
        ("data.pkl", b"\x80\x02}.garbage", "visual.conv1.weight: want a tensor"),
        ("data.pkl", b"\x80\x02K\x01.", "damaged"),
        ("data.pkl", b"\x80\x02h\x05.", "damaged"),
        ("data.pkl", b"\x80\x02}", "damaged|ends before"),
        ("data/0", b"\0" * 8, "data/0"),
    ],
)
def test_a_torchscript_archive_with_anything_else_in_it_is_refused_and_not_run(
    weights, tmp_path: Path, capsys, name: str, data: bytes, message: str
) -> None:
    good = as_torchscript(tmp_path / "good.pt", {"a": torch.zeros(3)})
    assert read_torchscript(good)["a"].tolist() == [0, 0, 0]
    bad = rewritten(good, tmp_path / "bad.pt", name, data)
    with pytest.raises(ValueError, match=message) as error:
        load_clip(bad)
    assert "\n" not in str(error.value) and str(bad) in str(error.value)
    assert "must not" not in capsys.readouterr().out


def nested(times: int) -> bytes:
    """A dict that has another one twice, which has another one twice, and so on: 2^times of the last."""
    begin = b"".join(b"}q%c(X\0\0\0\0" % k for k in range(times))
    return b"\x80\x02" + begin + b"}q%c" % times + b"".join(b"X\1\0\0\0ah%cu" % k for k in range(times, 0, -1)) + b"."


def deep(times: int) -> bytes:
    return b"\x80\x02" + b"}X\0\0\0\0" * times + b"}" + b"s" * times + b"."


HASHED = b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(60))
"""A tuple of 2^60."""


def sized(dims: int) -> bytes:
    """A tensor of so many sizes, each of 2000 bits."""
    size = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\3tQ"
    shape = b"(" + size + b"q\1" + b"h\1" * (dims - 1) + b"t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + b"(" + b"K\0" * dims + b"ttR"
    return b"\x80\x02}X\1\0\0\0a" + tensor + b"s."


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x80\x02}q\0X\1\0\0\0ah\0s.", "refused: more than 100000 values in modules, or modules in themselves"),
        (nested(60), "refused: more than 100000 values in modules, or modules in themselves"),
        (deep(20_000), "refused: more than 100000 values in modules, or modules in themselves"),
        (b"\x80\x02}" + HASHED[2:] + b"Ns.", "damaged"),
        (HASHED + b".", "damaged"),
        (b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".", "damaged"),  # minutes where each looks for its mark
        (sized(100_000), "damaged: a tensor of 100000 sizes"),
        (sized(3), "damaged: a tensor of shape "),
    ],
    ids=["in itself", "shared", "deep", "keys", "tuples", "marks", "sizes", "large"],
)
def test_a_few_bytes_that_say_weights_without_end_are_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    good = as_torchscript(tmp_path / "good.pt", {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=message) as error:
        read_torchscript(rewritten(good, tmp_path / "bad.pt", "data.pkl", data))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "bad.pt"))
    assert len(str(error.value)) < 500


def test_a_tensor_outside_its_storage_or_a_packed_one_is_refused(tmp_path: Path) -> None:
    good = as_torchscript(tmp_path / "good.pt", {"a": torch.zeros(5, 3)})
    with zipfile.ZipFile(good) as archive:
        data = archive.read("good/data.pkl")
    assert data.count(b"K\x05K\x03") == 1
    for shape in (b"K\x06K\x03", b"K\x05K\x04"):
        with pytest.raises(ValueError, match="a tensor of shape"):
            read_torchscript(rewritten(good, tmp_path / "bad.pt", "data.pkl", data.replace(b"K\x05K\x03", shape)))
    with zipfile.ZipFile(good) as archive:
        (name,) = (info.filename for info in archive.infolist() if "/data/" in info.filename and info.file_size == 30)
    name = name.removeprefix("good/")
    assert read_torchscript(rewritten(good, tmp_path / "same.pt", name, b"\0" * 30))["a"].shape == (5, 3)
    with pytest.raises(ValueError, match=f"{name}: packed"):
        read_torchscript(rewritten(good, tmp_path / "bad.pt", name, b"\0" * 30, packed=True))
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.pt: not a file of torch.save, or damaged"):
        load_clip(tmp_path / "cut.pt")


def test_a_missing_file_and_a_missing_library_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none: no CLIP there: want OpenAI's ViT-B-16.pt"):
        load_clip(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"CLIP's scores need open_clip.*: pip install 'ofa-ds\[images\]'$"):
        load_clip(tmp_path / "none")


def test_pictures_of_any_shape_become_squares_and_others_are_refused() -> None:
    for height, width in ((16, 16), (1, 1), (5, 200), (200, 5), (17, 16)):
        assert to_pixels(np.zeros((height, width, 3), np.uint8), 16).shape == (3, 16, 16)
    for bad in (np.zeros((16, 16, 4), np.uint8), np.zeros((16, 16, 3), np.float32), np.zeros((0, 16, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"CLIP: want pictures uint8 \[H, W, 3\]"):
            to_pixels(bad, 16)


def test_many_and_no_pictures_and_very_long_captions_have_features(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "state.pt")
    clip = load_clip(tmp_path / "state.pt")
    images = [np.full((16, 16, 3), value, np.uint8) for value in range(130)]
    together = clip.image_features(images)
    assert together.shape == (130, 8) and clip.image_features([]).shape == (0, 8)
    assert torch.allclose(together[100], clip.image_features(images[100:101])[0], atol=1e-5)
    texts = ["word " * 10_000, "w" * 1_000_000, ""]
    assert torch.isfinite(clip.text_features(texts)).all()
    with pytest.raises(ValueError, match="want a caption or a reference picture"):
        rerank(clip, images)
    scores, order = rerank(clip, [images[3]] * 4, caption="a")
    assert order.tolist() == [0, 1, 2, 3] and scores.shape == (4,)


def test_no_room_imports_the_libraries_before_they_are_asked_for() -> None:
    for file in (Path(libraries.__file__).parents[1]).rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
                assert not {name.split(".")[0] for name in names} & {"open_clip", "torchvision", "torch_fidelity"}, file


def test_a_torchvision_without_its_operators_is_imported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def stops_twice(name: str) -> object:
        tries.append(name)
        for operator in ("ofa_test_one", "ofa_test_two"):
            if not hasattr(torch.ops.torchvision, operator):
                raise RuntimeError(f"operator torchvision::{operator} does not exist")
        return torch

    monkeypatch.setattr(libraries.importlib, "import_module", stops_twice)
    libraries.library("open_clip", "CLIP's scores")
    assert tries == ["torchvision"] * 3 + ["open_clip"]
