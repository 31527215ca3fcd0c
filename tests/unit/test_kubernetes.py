"""The manifests of launchers/k8s say only what Kubeflow's operators know, and ask for what a training pod needs."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml  # comes with tokenizers

from ofa_ds.cli.main import _parser
from ofa_ds.config import load_recipe

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "launchers/k8s").glob("*.yaml"))
SCHEMA = json.loads((ROOT / "tests/fixtures/kubeflow.schema.json").read_text())["definitions"]
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def check(value: object, schema: dict, place: str = "manifest") -> None:
    """Raises ValueError for what the schema does not allow; a name that it does not have is not allowed."""
    if "$ref" in schema:
        return check(value, SCHEMA[schema["$ref"]], place)
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{place}: {value!r}: want one of {schema['enum']}")
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(type(value) is TYPES[kind] for kind in kinds):
        raise ValueError(f"{place}: {value!r}: want {' or '.join(kinds)}")
    if "pattern" in schema and not re.search(schema["pattern"], str(value)):
        raise ValueError(f"{place}: {value!r}: want {schema['pattern']}")
    for i, item in enumerate(value if isinstance(value, list) else ()):
        check(item, schema["items"], f"{place}[{i}]")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise ValueError(f"{place}: want {name}")
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            if name not in known and others is None:
                raise ValueError(f"{place}: {name}: want one of {sorted(known)}")
            check(item, known.get(name, others), f"{place}.{name}")


def read(file: Path) -> dict:
    (document,) = yaml.safe_load_all(file.read_text())
    return document


def replicas(manifest: dict) -> dict[str, dict]:
    spec = manifest["spec"]
    return spec.get("pytorchReplicaSpecs") or spec["mpiReplicaSpecs"]


def workers(manifest: dict) -> list[dict]:
    """Pods that train."""
    return [one["template"]["spec"] for name, one in replicas(manifest).items() if name != "Launcher"]


def words(pod: dict) -> list[str]:
    (container,) = pod["containers"]
    return [*container["command"], *container.get("args", ())]


def test_there_is_one_for_each_operator() -> None:
    assert [read(file)["kind"] for file in MANIFESTS] == ["MPIJob", "PyTorchJob"]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_a_manifest_fits_its_schema(file: Path) -> None:
    manifest = read(file)
    check(manifest, SCHEMA[manifest["kind"]])


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_a_misspelt_or_misplaced_word_does_not_fit(file: Path) -> None:
    for change in (
        lambda manifest: manifest["spec"].update(runPolicies={}),
        lambda manifest: manifest["spec"]["runPolicy"].update(backoffLimit="3"),
        lambda manifest: manifest.update(apiVersion="kubeflow.org/v3"),
        lambda manifest: replicas(manifest)["Worker"].update(restartPolicy="Sometimes"),
        lambda manifest: replicas(manifest)["Worker"].pop("template"),
        lambda manifest: workers(manifest)[-1]["containers"][0]["resources"]["limits"].update(memory="900 GB"),
        lambda manifest: (
            workers(manifest)[-1]["containers"][0]["env"].append({"name": "A", "value": 8})
            if "env" in workers(manifest)[-1]["containers"][0]
            else manifest["spec"].update(slotsPerWorker="8")
        ),
    ):
        broken = copy.deepcopy(read(file))
        change(broken)
        with pytest.raises(ValueError, match="want"):
            check(broken, SCHEMA[broken["kind"]])


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_pods_that_train_have_gpus_rdma_pinned_and_shared_memory(file: Path) -> None:
    for pod in workers(read(file)):
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == 8
        assert any(name.startswith("rdma/") for name in limits)
        assert "IPC_LOCK" in container["securityContext"]["capabilities"]["add"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert pod["terminationGracePeriodSeconds"] > 120


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_the_recipe_loads_and_the_ranks_are_as_many_as_the_gpus(file: Path) -> None:
    manifest = read(file)
    pods = {name: one["replicas"] for name, one in replicas(manifest).items()}
    if manifest["kind"] == "PyTorchJob":
        master, worker = (replicas(manifest)[name]["template"] for name in ("Master", "Worker"))
        assert master == worker
        command = words(master["spec"])
        assert f"--nnodes={sum(pods.values())}" in command and "--nproc-per-node=8" in command
        program = command[command.index("ofa_ds.pretrain") + 1 :]
        assert manifest["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == sum(pods.values())
    else:
        command = words(replicas(manifest)["Launcher"]["template"]["spec"])
        assert manifest["spec"]["slotsPerWorker"] == 8
        assert command[command.index("--hostfile") + 1] == "/etc/mpi/hostfile"
        launch, program = command[: command.index("--")], command[command.index("pretrain") + 1 :]
        assert launch[1] == "launch" and command[len(launch) + 1] == "pretrain"
        assert manifest["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == sum(pods.values())
    recipe = load_recipe(program[0], program[1:])
    assert recipe.run_dir.startswith("/shared/") if isinstance(recipe.run_dir, str) else recipe.run_dir.is_absolute()


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_network_variables_are_explained_by_the_rdma_files(file: Path) -> None:
    explained = (ROOT / "launchers/rdma/infiniband.env").read_text()
    for one in replicas(read(file)).values():
        for variable in one["template"]["spec"]["containers"][0].get("env", ()):
            assert not variable["name"].startswith("NCCL_") or f"{variable['name']}=" in explained


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
@pytest.mark.parametrize("command", ["finetune", "predict"])
def test_what_a_manifest_says_of_fine_tuning_and_prediction_is_a_command(file: Path, command: str) -> None:
    (given,) = re.findall(rf"^#   ((?:--|-m), (?:ofa_ds\.)?{command}, .*)$", file.read_text(), re.MULTILINE)
    said = yaml.safe_load(f"[{given}]")
    programs = [words(one["template"]["spec"]) for one in replicas(read(file)).values()]
    assert any((said[0], said[1].replace(command, "pretrain")) in pairwise(program) for program in programs)
    options = _parser().parse_args([command, *said[2:]])
    if command == "finetune":
        assert load_recipe(options.recipe, options.set).data.task.name
