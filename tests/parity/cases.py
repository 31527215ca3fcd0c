"""One recorded case: its file, the configuration its name stands for, the model with its weights, and a run of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapter import MICRO, MICRO_6B_VIT, MICRO_VIT, Padded, load, pack_padded, stored_arrays, stored_weights
from torch import Tensor, nn

from ofa_ds.batch import Batch
from ofa_ds.config import KernelConfig
from ofa_ds.model.config import ModelConfig
from ofa_ds.model.encoder import Encoded
from ofa_ds.model.names import to_port_name
from ofa_ds.model.ofa import OFA

KERNELS_ON = KernelConfig(attention="triton", layer_norm="triton", cross_entropy="triton")
BATCH_NORM = {"default": "batch", "frozen": "frozen", "sync": "sync"}


class Case:
    """A fixture file with its arrays, by name."""

    def __init__(self, file: Path, kernels: KernelConfig | None = None) -> None:
        self.file = file
        self.kernels = kernels or KernelConfig()
        self.arrays = stored_arrays(file)
        self.inputs = self.part("in")
        self.is_6b = file.stem.startswith("case_6b")

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays named prefix/..., without it."""
        return {name[len(prefix) + 1 :]: array for name, array in self.arrays.items() if name.startswith(f"{prefix}/")}

    @property
    def trains(self) -> bool:
        return self.file.stem.endswith("_train")

    def config(self) -> ModelConfig:
        """The micro configuration that the file's name and its meta arrays stand for."""
        if self.is_6b:
            return _ofasys(json.loads(str(self.arrays.get("meta/config", "{}"))))
        changes = json.loads(str(self.arrays.get("meta/overrides", "{}")))
        parts = self.file.stem.split("_")
        if "vit" in parts:
            changes["backbone"] = MICRO_VIT
        if "bn" in parts:
            changes["batch_norm"] = BATCH_NORM[parts[parts.index("bn") + 1]]
        return dataclasses.replace(MICRO, **changes)

    def model(self, dtype: torch.dtype) -> OFA:
        config = dataclasses.replace(self.config(), kernels=self.kernels)
        model = OFA(config).to(dtype).train(self.trains)
        if self.is_6b:
            load(model, self.part("state") or None, to_port_name)
        else:
            state = "micro_vit_state.npz" if config.backbone is MICRO_VIT else "micro_state.npz"
            load(model, stored_weights(self.file.parent, state))
        return model

    def batch(self, config: ModelConfig, dtype: torch.dtype) -> tuple[Batch, Padded]:
        return pack_padded(self.inputs, config, dtype=dtype, patch_orders=self.arrays.get("out/patch_orders"))


@dataclasses.dataclass
class Run:
    """What one forward and backward of a case gave, on packed tokens."""

    model: OFA
    padded: Padded
    encoded: Encoded
    encoder_states: list[Tensor]
    decoder_states: list[Tensor]
    cross_attention: list[Tensor]
    """[L, S] of each example: mean over heads in the last layer."""
    logits: Tensor
    loss: Tensor


def run_case(case: Case, dtype: torch.dtype) -> Run:
    """One call of the model with every layer watched, then the gradients of the summed loss."""
    model = case.model(dtype)
    batch, padded = case.batch(model.config, dtype)
    encoder_states: list[Tensor] = []
    decoder_states: list[Tensor] = []
    seen: dict[str, Any] = {}
    last = model.decoder.layers[-1].encoder_attn
    hooks = [
        *(layer.register_forward_hook(_keep_states(encoder_states)) for layer in model.encoder.layers),
        *(layer.register_forward_hook(_keep_states(decoder_states)) for layer in model.decoder.layers),
        model.encoder.register_forward_hook(lambda _, args, out: seen.update(encoded=out)),
        model.decoder.register_forward_hook(lambda _, args, out: seen.update(hidden=out)),
        last.register_forward_hook(lambda _, args, out: seen.update(query=args[0])),
    ]
    loss_M, _, _ = model(batch)
    for hook in hooks:
        hook.remove()
    loss_M.sum().backward()
    with torch.no_grad():
        logits = model.logits(seen["hidden"])
        cross = [_cross_attention(model, batch, seen["query"], seen["encoded"], e) for e in range(padded.num_examples)]
    states = (encoder_states, decoder_states)
    return Run(model, padded, seen["encoded"], *states, cross, logits, loss_M.sum().detach())


def _keep_states(states: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that appends each layer's output, and first the first one's input."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if not states:
            states.append(args[0].detach())
        states.append(out.detach())

    return hook


def _cross_attention(model: OFA, batch: Batch, query_MD: Tensor, encoded: Encoded, example: int) -> Tensor:
    """Attention probabilities of the last layer, from first principles: mean over heads [L, S] of one example."""
    own = slice(*batch.decoder_offsets[example : example + 2].tolist())
    seen = slice(*batch.encoder_offsets[example : example + 2].tolist())
    decoder = model.decoder
    attn = decoder.layers[-1].encoder_attn
    pairs = [(attn.q_proj(query_MD[own]), attn.k_proj(encoded.memory_ND[seen]))]
    if not model.config.entangle_position_embedding:
        _, normed_UD, _ = decoder.positions(batch.places.decoder_texts, batch.places.decoder_codes)
        index_M = batch.places.decoder_index[own]
        memory_position = encoded.position_UD[encoded.position_N[seen]]
        pairs.append((decoder.cross_pos_q_linear(normed_UD)[index_M], decoder.cross_pos_k_linear(memory_position)))
    q, k = (torch.stack(side).unflatten(2, (model.config.num_heads, -1)) for side in zip(*pairs, strict=True))
    logits_HLS = torch.einsum("plhd,pshd->hls", q, k) * model.config.attention_scale
    return logits_HLS.softmax(-1).mean(0)


def _ofasys(flags: dict[str, object]) -> ModelConfig:
    """The micro 6B with the flags of its configuration file."""
    gamma = float(flags.get("gamma", 1.0)) if flags.get("use_gamma_feature") else None
    return dataclasses.replace(
        MICRO,
        backbone=MICRO_6B_VIT,
        use_ofasys=True,
        disable_entangle=bool(flags.get("disable_entangle", False)),
        share_attn_bias=bool(flags.get("share_attn_bias", False)),
        entangle_position_embedding=bool(flags.get("entangle_position_embedding", False)),
        gamma=gamma,
    )
