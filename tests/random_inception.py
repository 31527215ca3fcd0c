"""torch-fidelity's InceptionV3 with random weights: the file that a user would name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ofa_ds.vision.inception import WEIGHTS
from ofa_ds.vision.libraries import library


def random_inception(folder: Path) -> Path:
    library("torch_fidelity", "tests")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    loud = {name: 6**0.5 if name.endswith("conv.weight") else 1.0 for name in network.state_dict()}  # of a ReLU's size
    torch.save({name: factor * network.state_dict()[name] for name, factor in loud.items()}, folder / WEIGHTS)
    return folder / WEIGHTS
