"""The model on packed batches: examples do not mix, every rank does the same, regularisation is per example."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numerics import assert_close
from torch import nn

from ofa_ds.batch import Batch, pack
from ofa_ds.config import ModelOptions, Recipe
from ofa_ds.data.example import Example
from ofa_ds.model.config import ModelConfig, model_config, preset
from ofa_ds.model.layers import Branch
from ofa_ds.model.ofa import OFA
from ofa_ds.model.stem import normalize

VOCAB = 120
SIZES = [(64, 64), (32, 48)]
CONFIG = preset("nano", vocab_size=VOCAB, dim=16, ffn_dim=32, num_heads=2)


def example(rng: np.random.Generator, image: np.ndarray | None = None, code: bool = False, source: int = 6) -> Example:
    target = rng.integers(4, VOCAB, 17 if code else int(rng.integers(2, 9)))
    return Example(
        task="image_infilling" if code else "caption",
        source=rng.integers(4, VOCAB, source),
        target=target,
        prev=np.concatenate([[0], target[:-1]]),
        image=image,
        code=code,
        patches=None if image is None or image.shape[0] == 32 else np.sort(rng.choice(16, 9, replace=False)),
    )


def mixed_examples() -> list[Example]:
    """Text, pictures of two sizes (one shared, one with sampled patches), image codes."""
    rng = np.random.default_rng(0)
    large, small = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES)
    return [
        example(rng, large),
        example(rng, large, source=3),
        example(rng),
        example(rng, small, code=True),
        example(rng, source=30),
        example(rng, small),
    ]


def text_examples() -> list[Example]:
    rng = np.random.default_rng(1)
    return [example(rng), example(rng, source=11)]


def packed(examples: list[Example], sizes: list[tuple[int, int]] = SIZES) -> Batch:
    return pack(examples, sizes, CONFIG.patch_size, CONFIG.image_bucket_size)


def built(config: ModelConfig = CONFIG) -> OFA:
    torch.manual_seed(0)
    return OFA(config)


def test_an_example_has_the_same_loss_alone_and_in_a_batch() -> None:
    model = built().double()
    examples = mixed_examples()
    together, nll, _ = model(packed(examples), label_smoothing=0.1)
    alone = torch.cat([model(packed([one]), label_smoothing=0.1)[0] for one in examples])
    assert_close(together, alone.detach(), 1e-12, "loss")
    assert not torch.equal(together, nll)


def test_the_order_of_examples_does_not_matter() -> None:
    model = built().double()
    examples = mixed_examples()
    forward, backward = (model(packed(order))[0].sum() for order in (examples, examples[::-1]))
    assert_close(forward, backward.detach(), 1e-12, "summed loss")


def calls(model: nn.Module, batch: Batch) -> list[str]:
    """Names of the modules in the order in which their forwards ran."""
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: names.append(name))
        for name, module in model.named_modules()
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return names


@pytest.mark.parametrize("sizes", [SIZES, []])
def test_every_batch_runs_the_same_modules_in_the_same_order(sizes: list[tuple[int, int]]) -> None:
    model = built()
    mixed = mixed_examples() if sizes else [one for one in mixed_examples() if one.image is None]
    assert calls(model, packed(mixed, sizes)) == calls(model, packed(text_examples(), sizes))


def test_parameters_without_use_get_zero_gradients_not_none() -> None:
    """A batch of text with stand-in images only: the image and code parameters still take part in the backward."""
    model = built()
    model(packed(text_examples()))[0].sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    for name in ("encoder.embed_images.convs.0.weight", "decoder.code_layernorm_embedding.weight"):
        assert not model.get_parameter(name).grad.any()


def test_activation_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        options = {
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "drop_path": 0.3,
            "activation_checkpointing": checkpointing,
        }
        model = built(dataclasses.replace(CONFIG, **options)).train()
        torch.manual_seed(7)
        model(packed(mixed_examples()))[0].sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_dropout_and_drop_path_act_in_training_only() -> None:
    model = built(dataclasses.replace(CONFIG, dropout=0.2, attention_dropout=0.2, drop_path=0.2))
    batch = packed(mixed_examples())
    first, second = (model.train()(batch)[0] for _ in range(2))
    assert not torch.equal(first, second)
    evaluated, plain = model.eval()(batch)[0], built().eval()(batch)[0]
    assert torch.equal(evaluated, plain)


def test_drop_path_drops_whole_examples_and_keeps_the_mean() -> None:
    branch = Branch(CONFIG, drop_path=0.25).train()
    torch.manual_seed(0)
    num_examples = 4000
    example_N = torch.arange(num_examples).repeat_interleave(3)
    out = branch(torch.zeros(len(example_N), 2), torch.ones(len(example_N), 2), example_N, num_examples, None)
    per_example = out.view(num_examples, -1)
    assert sorted(per_example.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert bool((per_example == per_example[:, :1]).all())
    assert abs(per_example.mean().item() - 1) < 0.05


def test_drop_path_grows_linearly_over_the_layers() -> None:
    model = built(dataclasses.replace(CONFIG, drop_path=0.4, encoder_layers=5))
    assert [layer.branch.drop_path for layer in model.encoder.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [layer.branch.drop_path for layer in model.decoder.layers] == pytest.approx([0, 0.4])


def test_pixels_are_normalised_and_holes_are_zero() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 4, 3)
    holes = torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]], dtype=torch.int32)
    out = normalize(pixels, holes, torch.float32)
    torch.testing.assert_close(out[1, 0, 0], torch.tensor([-1, -0.6, 1.0]))
    assert not out[0, :, 1:3, :2].any()
    torch.testing.assert_close(out[0, :, 0], out[1, :, 0])
    torch.testing.assert_close(out[0, :, :, 2], out[1, :, :, 2])
    assert torch.equal(normalize(out, holes + 1, torch.float32), out)


def test_the_norm_of_imagenet_has_its_means_and_deviations() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    holes = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32)
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        out = normalize(pixels, holes, dtype, "imagenet")
        assert out.dtype == dtype and not out[0, :, 0, 0].any()
        for channel, (mean, deviation) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
            wanted = ((torch.arange(256, dtype=torch.float64) / 255 - mean) / deviation).view(16, 16)
            wanted[0, 0] = 0
            torch.testing.assert_close(out[0, channel].double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_model_normalises_as_its_recipe_says() -> None:
    batch = packed(mixed_examples())
    half, imagenet = (built(dataclasses.replace(CONFIG, pixel_norm=norm))(batch)[0] for norm in ("half", "imagenet"))
    assert not torch.equal(half, imagenet)
    assert model_config(Recipe(model=ModelOptions(pixel_norm="imagenet")), 9).pixel_norm == "imagenet"


def test_bfloat16_is_close_to_float32() -> None:
    batch = packed(mixed_examples())
    wide = built()(batch)[0].sum().item()
    narrow = built().bfloat16()(batch)[0]
    assert narrow.dtype == torch.float32
    assert narrow.sum().item() == pytest.approx(wide, rel=0.02)


def test_an_unknown_preset_or_field_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="want one of nano, tiny, .* got 'tinny'; did you mean tiny"):
        preset("tinny")
    with pytest.raises(ValueError, match="no field droput"):
        preset("tiny", droput=0.1)
    with pytest.raises(ValueError, match="need use_ofasys"):
        preset("tiny", gamma=1.0)
