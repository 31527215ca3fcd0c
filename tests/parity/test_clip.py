"""CLIP through open_clip against what OpenAI's code, as OFA carries it, computed: ids, pixels, features, order."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_close
from test_vqgan import by_rule, opened
from torch import Tensor

from ofa_ds.tasks.downstream.text_to_image import caption_of
from ofa_ds.vision.clip import (
    Clip,
    encode,
    load_clip,
    new_model,
    rerank,
    to_pixels,
    tokenize,
    without_slashes,
)
from ofa_ds.vision.clip_files import ClipSizes, _from_hugging_face
from ofa_ds.vision.pixels import to_picture
from ofa_ds.vision.vqgan import Vqgan

MICRO, NAMES, TOKENS = "clip/micro_clip.npz", "clip/name_maps.json", "clip/tokenisation.json"
FULL, PAINTED = "clip/manifest_vit_b16.json", "t2i/code_generation.npz"


def sizes_of(recorded: dict) -> ClipSizes:
    names = {"image_size": "image_resolution", "patch_size": "vision_patch_size"}
    names |= {"text_width": "transformer_width", "text_layers": "transformer_layers"}
    fields = ("embed_dim", "image_size", "patch_size", "vision_width", "vision_layers", "context_length", "vocab_size")
    return ClipSizes(**{field: recorded[names.get(field, field)] for field in (*fields, "text_width", "text_layers")})


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The fixtures' rule for CLIP (README-more.md of the full set, Precision and weights)."""
    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name == "logit_scale":
        z = np.log(1 / 0.07)
    elif z.ndim == 4:
        z = z * np.sqrt(2 / np.prod(z.shape[1:]))
    elif name.endswith("bias"):
        z = 0.1 * z
    elif ".ln_" in name or name.startswith("ln_"):
        z = 1 + 0.1 * z
    elif "embedding" in name:
        z = 0.5 * z
    elif name in ("visual.proj", "text_projection"):
        z = z / np.sqrt(z.shape[0])
    else:
        z = z / np.sqrt(z.shape[-1])
    return torch.from_numpy(np.asarray(z, np.float32))


@pytest.fixture(scope="module")
def micro(golden_root: Path) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(golden_root / MICRO, allow_pickle=False) as found:
        arrays = {key: found[key] for key in found.files}
    return arrays, json.loads(str(arrays["meta"]))


@pytest.fixture(scope="module")
def clip(micro: tuple[dict, dict], tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """The micro model, by way of a file."""
    shapes = {name: tuple(value.shape) for name, value in new_model(sizes_of(micro[1]["config"])).state_dict().items()}
    path = tmp_path_factory.mktemp("clip") / "micro.pt"
    torch.save({name: value_of(name, shape) for name, shape in shapes.items()}, path)
    return load_clip(path)


def images_of(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [arrays[f"pre/{i}/image_uint8"] for i in range(5)]


@pytest.mark.golden(MICRO)
def test_pictures_become_the_original_s_pixels(micro: tuple[dict, dict]) -> None:
    arrays, meta = micro
    for i, image in enumerate(images_of(arrays)):
        got = to_pixels(image, meta["config"]["image_resolution"])
        assert np.abs(got.numpy() - arrays[f"pre/{i}/pixels"]).max() < 1e-6, i


@pytest.mark.golden(MICRO)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_every_stage_is_the_original_s(micro, clip: Clip, dtype: torch.dtype, tolerance: float) -> None:
    arrays, _ = micro
    model = clip.model.to(dtype)
    pixels = torch.stack([torch.from_numpy(arrays[f"pre/{i}/pixels"]) for i in range(5)]).to(dtype)
    tokens = torch.from_numpy(arrays["in/text_tokens"])
    stages: dict[str, Tensor] = {}

    def kept(name: str):
        return lambda module, inputs, output: stages.__setitem__(name, output)

    towers = {"vision": model.visual.transformer.resblocks, "text": model.transformer.resblocks}
    hooks = [model.visual.ln_pre.register_forward_hook(kept("vision/ln_pre"))]
    for tower, blocks in towers.items():
        hooks += [block.register_forward_hook(kept(f"{tower}/block{i}")) for i, block in enumerate(blocks)]
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(tokens)
    for hook in hooks:
        hook.remove()
    assert set(stages) == {key.removeprefix("out/") for key in arrays if key.startswith(("out/vision", "out/text/"))}
    for name, value in stages.items():
        assert_close(value[:2, :24] if "text" in name else value[:2], arrays[f"out/{name}"], tolerance, name)
    assert_close(images, arrays["out/image_features"], tolerance, "image features")
    assert_close(texts, arrays["out/text_features"], tolerance, "text features")
    cosine = torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T
    assert_close(cosine, arrays["out/cosine"], tolerance, "cosine")
    logits = cosine * model.logit_scale.exp()
    assert_close(logits, arrays["out/logits_per_image"], tolerance, "logits")
    model.float()


@pytest.mark.golden(MICRO)
def test_scores_and_order_of_pictures_and_texts_are_the_original_s(micro, clip: Clip) -> None:
    arrays, meta = micro
    images = images_of(arrays)
    for j, caption in enumerate(meta["captions"]):
        assert_close(clip.scores(images, caption), arrays["out/cosine"][:, j], 1e-5, caption)
        scores, order = rerank(clip, images, caption=caption)
        assert order.tolist() == arrays[f"rerank/ti_sim_caption{j}/indices"].tolist()
        assert_close(scores, arrays[f"rerank/ti_sim_caption{j}/scores"], 1e-5, caption)
    scores, order = rerank(clip, images[1:], reference=images[0])
    assert order.tolist() == arrays["rerank/ii_sim_ref0/indices_into_images_1_to_4"].tolist()
    assert_close(scores, arrays["rerank/ii_sim_ref0/scores"], 1e-5, "against a picture")
    features = clip.text_features(meta["captions"])
    exact = arrays["out/text_features"] / np.linalg.norm(arrays["out/text_features"], axis=-1, keepdims=True)
    assert_close(features, exact, 1e-5, "normalised")


@pytest.mark.golden(TOKENS)
def test_ids_are_openai_s_to_the_literal_end_of_text(golden_root: Path) -> None:
    recorded = json.loads((golden_root / TOKENS).read_text(encoding="utf-8"))
    captions = recorded["captions"]
    assert any("<|endoftext|>" in caption for caption in captions)
    assert [encode(caption) for caption in captions] == recorded["ids"]
    assert tokenize(captions).tolist() == recorded["rows"]
    long_text = " ".join(["word"] * 100)
    assert tokenize([long_text]).tolist() == [recorded["long_truncated_row"]]
    with pytest.raises(ValueError, match=f"has 102 tokens, the context {recorded['context_length']}; shorten it"):
        tokenize([long_text], truncate=False)


@pytest.mark.golden(NAMES)
def test_hugging_face_s_names_become_openai_s_as_recorded(golden_root: Path) -> None:
    recorded = json.loads((golden_root / NAMES).read_text(encoding="utf-8"))
    shapes = {name: tuple(shape) for name, shape in recorded["openai_state_dict"].items()}
    openai = {name: value_of(name, shape) for name, shape in shapes.items()}
    theirs = {}
    for name, entry in recorded["hf_transformers"]["map"].items():
        value, op = openai[entry["openai"]], entry["op"]
        if op.startswith("rows"):
            width, part = value.shape[0] // 3, int(op.split()[1][0])
            value = value[part * width : (part + 1) * width]
        theirs[name] = value.T if op == "transpose" else value
    found = _from_hugging_face(Path("model.safetensors"), theirs)
    assert set(found) == set(openai)
    assert all(torch.equal(found[name], value) for name, value in openai.items())


@pytest.mark.golden(FULL)
def test_weights_of_the_released_size_have_the_recorded_names_and_shapes(golden_root: Path) -> None:
    recorded = json.loads((golden_root / FULL).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = new_model(sizes_of(recorded["config"]))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == recorded["state_dict"]
    assert sum(value.numel() for value in model.state_dict().values()) == recorded["total"]


@pytest.mark.golden(PAINTED)
def test_painted_codes_are_ranked_as_the_original_ranks_them(clip: Clip, golden_root: Path) -> None:
    with np.load(golden_root / PAINTED, allow_pickle=False) as found:
        arrays = {key: found[key] for key in found.files if key.startswith("pipeline/")}
        caption = json.loads(str(found["meta"]))["caption"]
    vqgan = by_rule(Vqgan(opened(golden_root / "vqgan/gumbel_f8.npz")[1])).eval()
    with torch.no_grad():
        painted = vqgan.double().decode(torch.from_numpy(arrays["pipeline/codes"]))
    assert_close(painted, arrays["pipeline/decoded"], 1e-9, "decoded")
    images = [to_picture(each) for each in painted]
    assert all((a == b).all() for a, b in zip(images, arrays["pipeline/images_uint8"], strict=True))
    read = without_slashes(caption_of(f" what is the complete image? caption: {caption}"))
    assert read == caption and tokenize([read]).tolist() == arrays["pipeline/clip_tokens"].tolist()
    assert_close(clip.scores(images, read), arrays["pipeline/similarity"], 1e-5, "similarity")
    scores, order = rerank(clip, images, caption=read)
    assert order.tolist() == arrays["pipeline/sorted_indices"].tolist()
    assert_close(scores, arrays["pipeline/sorted_scores"], 1e-5, "sorted")
