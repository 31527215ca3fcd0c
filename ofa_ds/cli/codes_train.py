"""`ofa-ds codes train`: a VQGAN of one's own, for who has no released one."""

from __future__ import annotations

import argparse

from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, UsageError, command, from_zero, natural, positive
from ofa_ds.cli.shards_tools import here
from ofa_ds.terms import STOPPED

_LR_PER_PICTURE = 4.5e-6
"""Of the published recipe: times the pictures of a step."""


def add_train(actions: Commands) -> None:
    """Add `codes train`."""
    parser = command(
        actions, "train", _train,
        "Train a VQGAN on pictures: L1 and the codebook's term, and where asked for a perceptual distance and an "
        "adversary. The same command goes on where it was stopped.",
        example="ofa-ds codes train photos --out runs/vqgan --steps 20000 ch=64",
    )  # fmt: skip
    parser.add_argument("pictures", type=here, help="a folder, a TSV of OFA's or shards")
    parser.add_argument("--out", type=here, metavar="DIR", required=True, help="the run: checkpoints and the VQGAN")
    parser.add_argument("--steps", type=positive, metavar="N", default=100_000, help="in all")
    parser.add_argument("--batch", type=positive, metavar="N", default=16, help="pictures a step")
    parser.add_argument("--side", type=positive, metavar="PIXELS", default=256, help="shorter side of the pictures")
    parser.add_argument("--crop", type=positive, metavar="PIXELS", help="square cut out of them; else --side")
    parser.add_argument("--lr", type=from_zero, metavar="X", help=f"else {_LR_PER_PICTURE} x --batch")
    parser.add_argument(
        "--kl-weight", type=from_zero, metavar="X", default=1e-8, help="of a Gumbel codebook: more uses more codes"
    )
    parser.add_argument(
        "--perceptual", type=here, nargs="+", metavar="FILE", default=[],
        help="weights of LPIPS: torchvision's vgg16 and LPIPS's vgg.pth, or a released last.ckpt",
    )  # fmt: skip
    parser.add_argument("--perceptual-weight", type=from_zero, metavar="X", default=1.0, help="beside L1")
    parser.add_argument(
        "--adversary-weight", type=from_zero, metavar="X", default=0.0, help="0.8 as published; 0: none"
    )
    parser.add_argument("--adversary-start", type=natural, metavar="STEP", default=0, help="before it, it is not there")
    parser.add_argument("--from", dest="weights_of", type=here, metavar="DIR", help="a VQGAN to go on from")
    parser.add_argument("--save-every", type=positive, metavar="STEPS", default=1000, help="a checkpoint")
    parser.add_argument("--seed", type=natural, metavar="N", default=1, help="of weights, order, crops and noise")
    parser.add_argument(
        "set", nargs="*", metavar="KEY=VALUE", help="sizes of the VQGAN, such as n_embed=1024 ch=64 ch_mult=1,1,2,4"
    )


def _train(options: argparse.Namespace) -> int:
    with heavy_imports():
        from ofa_ds.train.stop_signal import StopSignal
        from ofa_ds.vision.coder import this_device
        from ofa_ds.vision.config import parse_config
        from ofa_ds.vision.training import Settings
        from ofa_ds.vision.training_run import Start, train_codes

    if options.weights_of is not None and options.set:
        raise UsageError(f"{' '.join(options.set)}: the VQGAN of --from has its sizes; leave one of the two away")
    try:
        config = parse_config(options.set) if options.weights_of is None else None
        settings = Settings(
            num_steps=options.steps, batch=options.batch, side=options.side, crop=options.crop or options.side,
            lr=_LR_PER_PICTURE * options.batch if options.lr is None else options.lr, kl_weight=options.kl_weight,
            perceptual_weight=options.perceptual_weight, adversary_weight=options.adversary_weight,
            adversary_start=options.adversary_start, seed=options.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(error) from error
    start = Start(config=config, weights_of=options.weights_of, lpips=options.perceptual)
    with StopSignal().listening() as stop:
        is_done = train_codes(
            options.pictures, options.out, start, settings, save_every=options.save_every,
            device=this_device(), stopped=lambda: stop.asked,
        )  # fmt: skip
    return 0 if is_done else STOPPED
