"""One distribution of ofa_ds, its kernels (`ofa_kernels`, kept in kernels/) and the DeepSpeed files of ds_configs/.

Lower bounds only: constraints.txt has the versions that launchers/setup_env.sh installs and the tests run with.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="ofa-ds",
    version="0.1.0",
    description="Pretrain OFA, one model for pictures, text, boxes and image codes, with DeepSpeed ZeRO-3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["ofa_ds", "ofa_ds.*"]),
        "ofa_ds.ds_configs",
        *find_packages("kernels", include=["ofa_kernels", "ofa_kernels.*"]),
    ],
    package_dir={"ofa_ds.ds_configs": "ds_configs", "ofa_kernels": "kernels/ofa_kernels"},
    package_data={"ofa_ds": ["recipes/*.toml", "recipes/parts/*.toml"], "ofa_ds.ds_configs": ["*.json"]},
    entry_points={"console_scripts": ["ofa-ds = ofa_ds.cli.main:script"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19",
        "numpy>=1.26",
        "pillow>=10.3",
        "pyarrow>=16",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.4.3",
        "simplejpeg>=1.7.2",
        "tensorboard>=2.16",
        "tokenizers>=0.19",
        "tomli>=2; python_version < '3.11'",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={
        "bench": [  # formats that `python -m ofa_ds.bench data` compares with
            "datasets>=4",
            "litdata>=0.2.50",
            "mosaicml-streaming>=0.12",
            "webdataset>=1",
        ],
        "dev": [
            "flask>=3",  # moto's server
            "flask-cors>=5",
            "hypothesis>=6.100",
            "moto[s3]>=5",  # an S3 service on this machine
            "mpi4py>=4",
            "open_clip_torch>=3",
            "opencv-python-headless>=4.9",  # the original's image operations, to compare with
            "psutil>=5.9",
            "pycocoevalcap>=1.2",
            "pytest>=8",
            "pytest-xdist>=3.6",  # tests/run.sh runs several at once
            "rouge-score>=0.1.2",
            "ruff>=0.5",
            "torch-fidelity>=0.3",
            "triton>=3.2",  # its interpreter and its compiler need no GPU
        ],
        "eval": ["pycocoevalcap>=1.2", "rouge-score>=0.1.2"],  # scores of captions and summaries in `ofa-ds evaluate`
        "gpu": ["triton>=3.2"],  # comes with torch's CUDA builds
        "images": [
            "open_clip_torch>=3",
            "torch-fidelity>=0.3",
        ],  # CLIP to choose and judge painted pictures; FID and IS
        "mpi": ["mpi4py>=4"],  # `ofa-ds shards build` over many hosts; finds rank 0 under mpirun
    },
)
