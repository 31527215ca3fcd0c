"""Parsers of nvidia-smi, ibstat, ibv_devinfo, lspci, the kernel's log and sysfs, on samples of good and sick hosts."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from preflight_hosts import fixture

from ofa_ds.cluster.preflight import machine, parsers


def test_eight_healthy_gpus_of_two_drivers() -> None:
    for kind, driver in (("a100", "470.161.03"), ("h100", "550.54.14")):
        gpus = parsers.gpus_of_xml(fixture(f"nvidia-smi-{kind}-healthy.xml"), fixture("nvlink-healthy.txt"))
        assert len(gpus) == 8 and len({gpu["uuid"] for gpu in gpus}) == 8
        for gpu in gpus:
            assert kind.upper() in gpu["name"] and gpu["driver"] == driver and gpu["ecc"] is True
            assert gpu["uncorrected"] == 0 and gpu["remap_pending"] is False and gpu["remap_failed"] is False
            assert gpu["throttle"] == [] and gpu["mig"] is False and gpu["temperature"] == 34
            assert (gpu["nvlinks_up"], gpu["nvlinks_down"]) == (12, 0)


def test_each_fault_of_a_gpu_is_read() -> None:
    gpus = parsers.gpus_of_xml(fixture("nvidia-smi-a100-sick.xml"))
    assert [gpu["uncorrected"] for gpu in gpus] == [2, 0, 0, 0, None, 0, 0, 0]
    assert [gpu["remap_pending"] for gpu in gpus] == [False, True, *[False] * 6]
    assert [gpu["remap_failed"] for gpu in gpus] == [False, False, True, *[False] * 5]
    assert gpus[3]["throttle"] == ["hw_slowdown", "hw_thermal_slowdown"] and gpus[3]["temperature"] == 91
    assert gpus[4]["mig"] is True and gpus[4]["ecc"] is False
    assert gpus[5]["throttle"] == ["sw_thermal_slowdown"] and gpus[7]["throttle"] == ["hw_power_brake_slowdown"]


def test_both_kinds_of_sram_errors_of_newer_drivers_count() -> None:
    first, second = parsers.gpus_of_xml(fixture("nvidia-smi-h100-sick.xml"))
    assert first["uncorrected"] == 5 and second["uncorrected"] == 0
    assert second["throttle"] == ["hw_slowdown", "sw_power_cap"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("nvidia-smi-no-driver.txt", "couldn't communicate with the NVIDIA driver"),
        ("nvidia-smi-gpu-lost.txt", "GPU is lost"),
        ("nvidia-smi-cut-off.xml", "breaks off"),
    ],
)
def test_where_nvidia_smi_gives_no_report_its_own_words_are_the_error(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as told:
        parsers.gpus_of_xml(fixture(name))
    assert "\n" not in str(told.value)


def test_inactive_nvlinks_are_counted_for_their_gpu() -> None:
    links = parsers.links_of(fixture("nvlink-sick.txt"))
    assert links.pop(3) == (10, 2) and set(links.values()) == {(12, 0)} and len(links) == 7


def test_ibstat_tells_ports_that_are_down_slow_or_not_part_of_the_fabric() -> None:
    assert {(port["state"], port["rate"]) for port in parsers.ibstat(fixture("ibstat-healthy.txt"))} == {
        ("Active", 200)
    }
    ports = parsers.ibstat(fixture("ibstat-sick.txt"))
    assert [port["device"] for port in ports] == [f"mlx5_{i}" for i in range(8)]
    assert [port["state"] for port in ports[:5]] == ["Active", "Down", "Initializing", "Active", "Down"]
    assert [port["physical"] for port in ports[:5]] == ["LinkUp", "Polling", "LinkUp", "LinkUp", "Disabled"]
    assert [port["rate"] for port in ports[:5]] == [200, 10, 200, 100, 40]
    assert ports[4]["link_layer"] == "Ethernet" and ports[0]["firmware"] == "20.31.1014"


def test_ibv_devinfo_tells_the_mtu_in_use() -> None:
    healthy = parsers.ibv_devinfo(fixture("ibv_devinfo-healthy.txt"))
    assert len(healthy) == 8 and {port["active_mtu"] for port in healthy} == {4096}
    low = parsers.ibv_devinfo(fixture("ibv_devinfo-roce-low-mtu.txt"))
    assert {(port["active_mtu"], port["max_mtu"], port["link_layer"]) for port in low} == {(1024, 4096, "Ethernet")}


def test_acs_is_on_at_one_bridge_off_or_not_told() -> None:
    assert parsers.acs_redirects(fixture("lspci-acs-on.txt")) == ["0000:0a:04.0"]
    assert parsers.acs_redirects(fixture("lspci-acs-off.txt")) == []
    assert parsers.acs_is_told(fixture("lspci-acs-off.txt")) and not parsers.acs_is_told(fixture("lspci-not-root.txt"))


def test_xids_are_found_with_their_gpu() -> None:
    lines = fixture("dmesg-xid.txt").splitlines()
    assert parsers.xids(lines) == [("0000:07:00", 31), ("0000:3b:00", 79), ("0000:90:00", 94)]


def test_ports_are_read_from_sysfs(tmp_path: Path) -> None:
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    for folder in (port / "gids", port / "gid_attrs" / "types", port / "counters", port.parents[1] / "device"):
        folder.mkdir(parents=True)
    files = {
        port / "state": "4: ACTIVE", port / "phys_state": "5: LinkUp", port / "rate": "200 Gb/sec (4X HDR)",
        port / "link_layer": "Ethernet", port / "counters" / "link_downed": "3",
        port / "gids" / "0": "fe80:0000:0000:0000:0000:0000:0000:1", port / "gid_attrs" / "types" / "0": "IB/RoCE v1",
        port / "gids" / "3": "0000:0000:0000:0000:0000:ffff:0a00:0001", port / "gid_attrs" / "types" / "3": "RoCE v2",
        port / "gids" / "4": "0000:0000:0000:0000:0000:0000:0000:0000",
        port.parents[1] / "device" / "numa_node": "1",
    }  # fmt: skip
    for file, text in files.items():
        file.write_text(f"{text}\n")
    (found,) = machine.infiniband(str(tmp_path / "infiniband")) or []
    assert found["device"] == "mlx5_0" and found["node"] == 1 and found["link_downed"] == 3
    assert [(index, kind) for index, _, kind in found["gids"]] == [(0, "IB/RoCE v1"), (3, "RoCE v2")]
    assert (parsers.state(found["state"]), parsers.rate(found["rate"])) == ("ACTIVE", 200)
    assert machine.infiniband(str(tmp_path / "none")) is None


class NVMLError(Exception):
    pass


class Nvml(types.ModuleType):
    """NVML with one GPU that has two uncorrected errors, a link down, and knows nothing of MIG."""

    NVMLError, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = NVMLError, 1, 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.is_on = False
        for name, value in {
            "SystemGetDriverVersion": b"550.54.14", "DeviceGetCount": 1, "DeviceGetHandleByIndex": "handle",
            "DeviceGetName": "NVIDIA A100-SXM4-80GB", "DeviceGetUUID": b"GPU-1", "DeviceGetRemappedRows": (0, 1, 1, 0),
            "DeviceGetCurrentClocksThrottleReasons": 0x1 | 0x8 | 0x40, "DeviceGetTotalEccErrors": 2,
            "DeviceGetEccMode": (1, 1), "DeviceGetTemperature": 91,
        }.items():  # fmt: skip
            setattr(self, f"nvml{name}", lambda *arguments, value=value: value)

    def nvmlInit(self) -> None:
        self.is_on = True

    def nvmlShutdown(self) -> None:
        self.is_on = False

    def nvmlDeviceGetNvLinkState(self, handle: str, link: int) -> int:
        if link >= 12:
            raise NVMLError("Not Supported")
        return int(link != 3)

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        raise NVMLError("Not Supported")


def test_nvml_gives_the_records_that_nvidia_smi_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (gpu,) = machine.nvml_records()
    assert gpu.keys() == parsers.gpus_of_xml(fixture("nvidia-smi-a100-healthy.xml"))[0].keys() and not nvml.is_on
    assert gpu == {
        "name": "NVIDIA A100-SXM4-80GB", "uuid": "GPU-1", "driver": "550.54.14", "ecc": True, "uncorrected": 2,
        "remap_pending": True, "remap_failed": False, "throttle": ["hw_slowdown", "hw_thermal_slowdown"], "mig": None,
        "nvlinks_up": 11, "nvlinks_down": 1, "temperature": 91,
    }  # fmt: skip


def test_recorded_ports_of_other_peoples_hosts_are_read() -> None:
    healthy = parsers.ibstat(fixture("recorded/ibstat-h100-healthy.txt"))
    assert [port["rate"] for port in healthy] == [*[400] * 8, 200] and {port["state"] for port in healthy} == {"Active"}
    assert [port["link_layer"] for port in healthy] == [*["InfiniBand"] * 8, "Ethernet"]
    assert healthy[8]["device"] == "mlx5_bond_0" and healthy[0]["firmware"] == "28.41.1000"
    sick = parsers.ibstat(fixture("recorded/ibstat-h100-roce-two-down.txt"))
    down = {port["device"]: (port["physical"], port["rate"]) for port in sick if port["state"] == "Down"}
    assert len(sick) == 12 and down == {"mlx5_11": ("Polling", 40), "mlx5_5": ("Disabled", 40)}
    (hdr,) = parsers.ibv_devinfo(fixture("recorded/ibv_devinfo-hdr.txt"))
    assert (hdr["state"], hdr["active_mtu"], hdr["link_layer"]) == ("PORT_ACTIVE", 4096, "InfiniBand")
    azure = parsers.ibv_devinfo(fixture("recorded/ibv_devinfo-azure-two-fabrics.txt"))
    assert [(port["device"], port["active_mtu"], port["max_mtu"]) for port in azure] == [
        ("mlx5_0", 4096, 4096),
        ("mlx5_1", 1024, 4096),
    ]


def test_recorded_gpus_bridges_and_xids_are_read() -> None:
    (gpu,) = parsers.gpus_of_xml(fixture("recorded/nvidia-smi-a100-mig.xml"), fixture("recorded/nvlink-a100.txt"))
    assert gpu["name"] == "NVIDIA A100-SXM4-80GB" and gpu["driver"] == "535.54.03" and gpu["mig"] is True
    assert gpu["ecc"] is True and gpu["uncorrected"] == 0 and gpu["throttle"] == [] and gpu["temperature"] == 27
    assert gpu["remap_pending"] is None and gpu["remap_failed"] is None, "this driver does not say"
    assert (gpu["nvlinks_up"], gpu["nvlinks_down"]) == (12, 0)
    assert parsers.acs_redirects(fixture("recorded/lspci-acs-on.txt")) == ["00:01.1", "00:01.2"]
    assert parsers.xids(fixture("recorded/xid.txt").splitlines()) == [("0000:01:00", 13), ("0000:01:00", 79)]
