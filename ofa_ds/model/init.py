"""Modules with OFA's initialisation: weights N(0, std), convolutions Kaiming-normal, biases 0.

docs/ofa.md, Model: initialisation.

Each module initialises itself while it is built, because under ZeRO-3's `zero.Init` its parameters are cut into pieces
right after. Draws come from torch's global generator. No table has a zero row: in the original the last pass over the
module tree overwrites it.
"""

from __future__ import annotations

from torch import Tensor, nn

from ofa_ds.model.products import linear

INIT_STD = 0.02


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    def __init__(self, num_rows: int, dim: int, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(num_rows, dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
