"""Where a run takes place is told without secrets; a rank that differs from the first is named with what differs."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ofa_ds.train import report_environment as environment

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_tokentoken",
    "AWS_SECRET_KEY": "awssecret1",
    "OFA_PASSWORD": "wordofmouth", "NCCL_AUTH_KEY": "ncclkey99", "SLURM_JWT": "eyJhbGciOi", "DS_SSHKEY": "sshkey1234",
}  # fmt: skip


def test_no_secret_of_the_environment_is_in_the_report_and_what_training_reads_is() -> None:
    plain = {
        "NCCL_IB_HCA": "mlx5_0,mlx5_1", "OMP_NUM_THREADS": "8", "TOKENIZERS_PARALLELISM": "false", "CUDA_HOME": "/usr",
        "WORLD_SIZE": "4",
    }  # fmt: skip
    others = {"HOME": "/home/me", "MY_COMPANY": "none of anybody's business", "OFA_ATTEMPT": "abc.host"}
    login = {"OFA_STORE": "s3://me:openword@host/x"}
    found = environment.variables({**plain, **SECRETS, **others, **login})
    assert {name: found[name] for name in plain} == plain
    assert not found.keys() & (others.keys() | {"WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_KEY"})
    for name in ("OFA_PASSWORD", "NCCL_AUTH_KEY", "SLURM_JWT", "DS_SSHKEY"):
        assert found[name] == environment.HIDDEN
    assert found["OFA_STORE"] == f"s3://{environment.HIDDEN}@host/x"
    text = json.dumps(found)
    assert not [name for name, value in SECRETS.items() if value in text]


def test_a_secret_that_stands_elsewhere_is_taken_out_too() -> None:
    given = {"HF_TOKEN": 'hf_"quoted"é', "SHORT_KEY": "run", "NUMBER_KEY": "1234567890"}
    text = json.dumps({"a": f"--token {given['HF_TOKEN']}", "b": 1234567890, "c": "run_dir"})
    found = json.loads(environment.scrubbed(text, given))
    assert found == {"a": f"--token {environment.HIDDEN}", "b": 1234567890, "c": "run_dir"}
    assert environment.HIDDEN in environment.scrubbed(f"run_dir = '{given['HF_TOKEN']}'", given)


def test_the_command_line_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["python", "-m", "ofa_ds.pretrain", "--encoded=eyJlbnYi", "api_key=word", "data.shards=ftp://me:pw@host/a"]
    monkeypatch.setattr(sys, "orig_argv", given)
    hidden = environment.HIDDEN
    expected = [*given[:3], f"--encoded={hidden}", f"api_key={hidden}", f"data.shards=ftp://{hidden}@host/a"]
    assert environment.command()["arguments"] == expected


def ranks(reports: list[dict[str, Any]], hosts: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """What each of these ranks finds, and how many bytes a rank sends in each gather."""
    barrier, sent = threading.Barrier(len(reports)), [None] * len(reports)
    found, sizes = [{}] * len(reports), []

    def rank(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            barrier.wait()
            sent[number] = value
            barrier.wait()
            if number == len(reports) - 1:
                sizes.append(len(json.dumps(value)))
            return list(sent)

        found[number] = environment.of_all_ranks(reports[number], hosts[number], gather)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(reports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found, sizes


ALIKE = {"python": "3.11", "torch": "2.13", "device": "NVIDIA H200"}


def test_ranks_that_are_alike_send_a_few_bytes_once_and_say_nothing() -> None:
    reports = [{**ALIKE, **({"code": "c" * 64} if rank % 8 == 0 else {})} for rank in range(64)]
    found, sizes = ranks(reports, [f"host{rank // 8}" for rank in range(64)])
    assert found[0] == found[63] and found[0]["differences"] == [] and found[0]["hosts"][9] == "host1"
    assert len(sizes) == 1 and sizes[0] < 150


def test_ranks_that_differ_are_named_with_what_differs_and_as_one_where_they_are_alike() -> None:
    reports = [
        dict(ALIKE),
        dict(ALIKE),
        {**ALIKE, "torch": "2.8", "driver": "570"},
        {**ALIKE, "torch": "2.8", "driver": "570"},
    ]
    found, _ = ranks(reports, ["a", "a", "b", "b"])
    assert all(each == found[0] for each in found)
    assert found[0]["differences"] == [
        "rank 2 and 1 more on b differs from rank 0: driver 570 (rank 0: None), torch 2.8 (rank 0: 2.13)"
    ]


def test_other_code_on_another_host_is_told() -> None:
    reports = [{**ALIKE, "code": "a" * 64}, dict(ALIKE), {**ALIKE, "code": "b" * 64}, dict(ALIKE)]
    found, _ = ranks(reports, ["x", "x", "y", "y"])
    assert found[1]["differences"] == ["rank 2 on y runs other code than rank 0: bbbbbbbbbbbb, not aaaaaaaaaaaa"]


def test_the_code_hash_changes_with_any_source_and_not_with_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(name: str, text: str) -> Path:
        for package in ("ofa_ds/train", "ofa_kernels"):
            (tmp_path / name / package).mkdir(parents=True)
        (tmp_path / name / "ofa_ds/train/a.py").write_text(text)
        (tmp_path / name / "ofa_kernels/k.py").write_text("k")
        return tmp_path / name

    def hash_of(root: Path) -> str:
        monkeypatch.setattr(environment, "_ROOT", root)
        monkeypatch.setattr(environment, "_kernels", lambda: root / "ofa_kernels")
        return environment.code_hash()

    one, same, other = hash_of(copy("one", "x = 1")), hash_of(copy("two", "x = 1")), hash_of(copy("three", "x = 2"))
    assert one == same != other


def test_a_password_with_an_at_sign_is_not_shown_in_part() -> None:
    assert (
        environment.without_secrets("http://me:wo@rd@host/x and git@host") == "http://(not shown)@host/x and git@host"
    )


def test_an_editor_s_lock_among_the_sources_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ofa_ds").mkdir()
    (tmp_path / "ofa_ds" / "a.py").write_text("1")
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    before = environment.code_hash()
    (tmp_path / "ofa_ds" / ".#a.py").symlink_to("somebody@host.123")
    assert environment.code_hash() == before


def test_a_rank_without_a_gpu_reports_versions_and_no_gpu() -> None:
    found = environment.of_this_rank(torch.device("cpu"), with_code=False)
    assert found["device"] == "cpu" and found["torch"].startswith(torch.__version__.split("+")[0])
    assert "nccl" not in found and "code" not in found and json.dumps(found)
