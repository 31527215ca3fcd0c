"""How long preflight takes over many hosts of this machine: python tests/multihost/time_preflight.py [HOSTS]"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import hosts


def main(num_hosts: int) -> None:
    with tempfile.TemporaryDirectory() as folder, hosts.cluster(num_hosts, Path(folder) / "cluster") as cluster:
        hostfile = cluster.hostfile(Path(folder) / "hosts")
        command = [sys.executable, "-m", "ofa_ds.cli", "preflight", "--hostfile", str(hostfile), "--json"]
        for what, options in (("checks alone", ["--skip-bandwidth"]), ("everything", [])):
            result = cluster.run(
                [*command, *options], host=cluster.login, timeout=600, cwd=Path(folder), env=hosts.launch_env(cluster)
            )
            report = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
            print(f"{num_hosts} hosts, {what}: {report['seconds']:.1f} s, bad hosts: {report['bad_hosts'] or 'none'}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
