"""The model against everything recorded of the original in one forward and backward: states, loss, logits, gradients.

Runs `case_*` and `variant_*` files of --golden in float64 and float32, or with `--kernels triton` in float32 with every
kernel on. Content of pad positions is unspecified and not compared. `k_proj.bias` and `*pos_k_linear.bias` shift all
logits of a row alike, so their gradient is mathematically zero: it is compared against the size of the other gradients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter import packed
from cases import KERNELS_ON, Case, Run, run_case
from numerics import TOLERANCE, assert_close

from ofa_ds.config import KernelConfig
from ofa_ds.model.names import to_port_name

NOT_SUPPORTED = {
    "variant_attn_scale_factor_1": "a setting, not a switch: ModelConfig.attn_scale_factor",
    "variant_encoder_entangle_only": "adding positions in the encoder: only OFASys models do, with another structure",
    "variant_entangle_both": "the same, in both stacks",
    "variant_no_code_ln": "every released model has the norm",
    "variant_no_ln_emb": "every released model has the norm",
    "variant_no_patch_ln": "every released model has the norm",
    "variant_no_type_embedding": "every released model has the embedding",
    "variant_normformer_off": "every released model has the extra norms and head scales",
    "variant_post_norm": "every released model is pre-norm",
    "variant_relu_activation": "every released model uses gelu",
    "variant_scale_embedding_on": "no released model scales its embeddings",
    "variant_scale_resids": "no released model scales its residuals",
    "variant_untied_output": "every released model ties input and output embeddings",
}
"""Switches of the original that no released model uses; they are not in the model."""

ZERO_GRADIENTS = ("k_proj.bias", "pos_k_linear.bias")

CROSS_ATTENTION_TOLERANCE = 1e-6
"""The original hands its attention probabilities out in float32, whatever the model's precision."""


@pytest.mark.golden("case_[!f]*.npz")
def test_case_is_the_original(golden_file: Path, dtype: torch.dtype, chosen: KernelConfig) -> None:
    case = Case(golden_file, chosen)
    run = run_case(case, dtype)
    check_outputs(case, run, TOLERANCE[dtype])
    check_gradients(case, run, TOLERANCE[dtype])


@pytest.mark.long
@pytest.mark.golden("case_d2_*.npz")
def test_a_case_with_text_pictures_and_codes_is_the_original_with_every_kernel_on(golden_file: Path) -> None:
    case = Case(golden_file, KERNELS_ON)
    run = run_case(case, torch.float32)
    check_outputs(case, run, TOLERANCE[torch.float32])
    check_gradients(case, run, TOLERANCE[torch.float32])


@pytest.mark.golden("variant_*.npz", without=tuple(NOT_SUPPORTED))
def test_variant_is_the_original(golden_file: Path, dtype: torch.dtype, chosen: KernelConfig) -> None:
    case = Case(golden_file, chosen)
    run = run_case(case, dtype)
    check_outputs(case, run, TOLERANCE[dtype])
    check_gradients(case, run, TOLERANCE[dtype])


@pytest.mark.golden("case_h_bn_*_train.npz")
def test_batch_norm_buffers_after_a_training_forward(golden_file: Path, dtype: torch.dtype) -> None:
    case = Case(golden_file)
    backbone = run_case(case, dtype).model.encoder.embed_images
    state = backbone.state_dict()
    after = case.part("after")
    assert after
    for name, expected in after.items():
        assert_close(state[name].double(), expected, TOLERANCE[dtype], name)
    if "meta/trainable_backbone_params" in case.arrays:
        trainable = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        assert sorted(trainable) == sorted(case.arrays["meta/trainable_backbone_params"].tolist())


def check_outputs(case: Case, run: Run, tolerance: float) -> None:
    expected = case.part("out")
    position_ND = run.encoded.position_UD[run.encoded.position_N]
    states = {
        "encoder_out": (run.encoded.memory_ND, run.padded.encoder),
        "encoder_position_embeddings": (position_ND, run.padded.encoder),
        "logits": (run.logits, run.padded.decoder),
        **{f"encoder_state_{i}": (state, run.padded.encoder) for i, state in enumerate(run.encoder_states)},
        **{f"decoder_state_{i}": (state, run.padded.decoder) for i, state in enumerate(run.decoder_states)},
    }
    for name, (out, rows) in states.items():
        if name in expected:
            assert_close(out, packed(expected[name], rows), tolerance, name)
    assert_close(run.loss, expected["loss"], tolerance, "loss")
    if "encoder_padding_mask" in expected:
        kept = np.flatnonzero(~expected["encoder_padding_mask"])
        assert kept.tolist() == run.padded.encoder.tolist()
    if "cross_attn_mean_last_layer" in expected:
        check_cross_attention(expected["cross_attn_mean_last_layer"], run, max(tolerance, CROSS_ATTENTION_TOLERANCE))


def check_cross_attention(expected: np.ndarray, run: Run, tolerance: float) -> None:
    _, num_steps, num_slots = expected.shape
    for e, probs in enumerate(run.cross_attention):
        rows = run.padded.decoder[run.padded.decoder // num_steps == e] % num_steps
        columns = run.padded.encoder[run.padded.encoder // num_slots == e] % num_slots
        assert_close(
            probs, torch.from_numpy(expected[e])[rows][:, columns], tolerance, f"cross-attention of example {e}"
        )


def check_gradients(case: Case, run: Run, tolerance: float) -> None:
    full, norms, none = case.part("grad"), case.part("gradnorm"), set(case.part("gradnone"))
    none |= set(case.arrays.get("meta/params_without_grad", np.array([])).tolist())
    largest = max([float(norm) for norm in norms.values()], default=0.0)
    seen = set()
    for name, parameter in run.model.named_parameters():
        name = to_port_name(name) if case.is_6b else name
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        floor = largest if name.endswith(ZERO_GRADIENTS) else 0.0
        if name in none:
            assert not grad.any(), f"{name}: the original gives it no gradient"
        if name in full:
            assert_close(grad, full[name], tolerance, f"gradient of {name}", floor)
        if name in norms:
            assert_close(grad.norm(), norms[name], tolerance, f"gradient norm of {name}", floor)
        seen.add(name)
    missing = (set(full) | set(norms) | none) - seen
    assert not missing, f"recorded gradients of parameters that the model lacks: {sorted(missing)}"
