"""Verdicts over what every host has: login, program, clock, disks, memory, limits, network. Facts in, verdict out."""

from __future__ import annotations

from ofa_ds.cluster.preflight import thresholds as at
from ofa_ds.cluster.preflight.seen import ABSENT, FAIL, PASS, WARN, Fleet, Seen, Verdict, same, size


def ssh(seen: Seen, fleet: Fleet) -> Verdict:
    if seen.problem:
        return Verdict(FAIL, seen.problem)
    text = f"answers after {seen.login_s:.1f} s"
    return Verdict(WARN if seen.login_s > at.SLOW_LOGIN_S and len(fleet.seen) < 32 else PASS, text)


def shell(seen: Seen, fleet: Fleet) -> Verdict:
    if seen.noise:
        words = seen.noise.decode(errors="replace").split("\n")[0].strip()
        return Verdict(WARN, f"the login shell prints {len(seen.noise)} bytes of its own, such as {words[:60]!r}")
    return Verdict(PASS, "prints nothing of its own")


def identity(seen: Seen, fleet: Fleet) -> Verdict:
    mine = seen.fact("identity")
    if mine is None:
        return Verdict(WARN, f"cannot tell which machine it is: {seen.trouble('identity')}")
    order = list(fleet.seen)
    twins = [each for each in fleet.answering if each is not seen and each.fact("identity") == mine]
    for twin in twins:
        if order.index(twin) < order.index(seen):
            return Verdict(FAIL, f"is the same machine as {twin.host.name}, which stands before it")
    if twins:
        return Verdict(WARN, f"is named a second time, as {twins[0].host.name}")
    return Verdict(PASS, "a machine of its own")


def python(seen: Seen, fleet: Fleet) -> Verdict:
    found = seen.fact("python") or {}
    if found.get("executable") != found.get("wanted"):
        return Verdict(FAIL, f"there is no {found.get('wanted')}, the interpreter of the launching host")
    return same(seen, fleet, "Python", lambda each: (each.fact("python") or {}).get("version"))


def torch(seen: Seen, fleet: Fleet) -> Verdict:
    return _needed(seen, fleet, "torch")


def deepspeed(seen: Seen, fleet: Fleet) -> Verdict:
    return _needed(seen, fleet, "deepspeed")


def _needed(seen: Seen, fleet: Fleet, package: str) -> Verdict:
    verdict = same(seen, fleet, package, lambda each: (each.fact("packages") or {}).get(package))
    return Verdict(FAIL, f"{package} is not installed") if verdict.state == ABSENT else verdict


def cuda(seen: Seen, fleet: Fleet) -> Verdict:
    return same(seen, fleet, "CUDA in torch", lambda each: each.fact("cuda"))


def nccl(seen: Seen, fleet: Fleet) -> Verdict:
    return same(seen, fleet, "NCCL", lambda each: each.fact("nccl"))


def driver(seen: Seen, fleet: Fleet) -> Verdict:
    return same(seen, fleet, "NVIDIA driver", lambda each: each.fact("driver"))


def code(seen: Seen, fleet: Fleet) -> Verdict:
    if seen.fact("code") is None:
        return Verdict(FAIL, seen.trouble("code") or "this checkout is not there")
    return same(seen, fleet, "code", lambda each: each.fact("code"))


def clock(seen: Seen, fleet: Fleet) -> Verdict:
    usual = fleet.median(lambda each: each.clock[0] if each.clock else None)
    if seen.clock is None or usual is None:
        return Verdict(WARN, "its clock was not read")
    ahead, error = seen.clock[0] - usual, seen.clock[1]
    sure = max(0.0, abs(ahead) - error)
    state = FAIL if sure > at.CLOCK_FAIL_S else WARN if sure > at.CLOCK_WARN_S else PASS
    return Verdict(state, f"{ahead:+.3f} s from the median host, known to {error:.3f} s")


def shared(seen: Seen, fleet: Fleet) -> Verdict:
    """Two hosts write; who is seen by most is the measure, so that the first host's own mount may be the wrong one."""
    seen_by = {writer: 0 for each in fleet.answering for writer in each.shared}
    for each in fleet.answering:
        for writer, why_not in each.shared.items():
            seen_by[writer] += not why_not
    if not seen_by:
        return Verdict(WARN, "nobody could look: no file was written there")
    writer = max(seen_by, key=lambda name: seen_by[name])
    why_not = seen.shared.get(writer, "was not asked")
    return Verdict(FAIL, why_not) if why_not else Verdict(PASS, f"sees what {writer} writes")


def write_speed(seen: Seen, fleet: Fleet) -> Verdict:
    speed = seen.write_speed
    if not isinstance(speed, float):
        return Verdict(FAIL, str(speed or "nothing was written"))
    usual = fleet.median(lambda each: each.write_speed if isinstance(each.write_speed, float) else None) or speed
    text = f"{speed / 2**20:.0f} MiB/s, all hosts at once; median {usual / 2**20:.0f}"
    slow = speed < at.WRITE_WARN_BYTES_PER_S or speed * at.WRITE_OUTLIER < usual
    return Verdict(WARN if slow else PASS, text)


def disk(seen: Seen, fleet: Fleet) -> Verdict:
    return _least(seen, "free", at.DISK_FAIL_BYTES, at.DISK_WARN_BYTES)


def inodes(seen: Seen, fleet: Fleet) -> Verdict:
    return _least(seen, "inodes_free", at.INODES_FAIL, at.INODES_WARN)


def _least(seen: Seen, key: str, fail: float, warn: float) -> Verdict:
    """Over the run's directory and the host's temporary one. File systems that count no inodes say 0 of 0."""
    places = (seen.fact("space") or {}).values()
    missing = [place["path"] for place in places if place.get("missing")]
    if missing or not places:
        return Verdict(FAIL, f"there is no directory {missing[0]}" if missing else seen.trouble("space") or "not told")
    counted = [place for place in places if key == "free" or place["inodes_all"]]
    if not counted:
        return Verdict(PASS, "its file systems have no limit of inodes")
    worst = min(counted, key=lambda place: place[key])
    text = f"{size(worst[key]) if key == 'free' else f'{worst[key]:,} inodes'} free in {worst['path']}"
    return Verdict(FAIL if worst[key] < fail else WARN if worst[key] < warn else PASS, text)


def memory(seen: Seen, fleet: Fleet) -> Verdict:
    found = seen.fact("memory")
    if found is None:
        return Verdict(WARN, seen.trouble("memory") or "not told")
    usual = fleet.median(lambda each: (each.fact("memory") or {}).get("all")) or found["all"]
    text = f"{size(found['free'])} of {size(found['all'])} free"
    if found["free"] < at.MEMORY_FAIL_BYTES:
        return Verdict(FAIL, text)
    if found["all"] < 0.9 * usual:
        return Verdict(WARN, f"{text}; the median host has {size(usual)}: is a module missing?")
    return Verdict(WARN if found["free"] < at.MEMORY_WARN_SHARE * found["all"] else PASS, text)


def shm(seen: Seen, fleet: Fleet) -> Verdict:
    found = seen.fact("shm")
    if found is None or found.get("missing"):
        return Verdict(FAIL, seen.trouble("shm") or "there is no /dev/shm")
    state = FAIL if found["free"] < at.SHM_FAIL_BYTES else WARN if found["free"] < at.SHM_WARN_BYTES else PASS
    return Verdict(state, f"{size(found['free'])} of {size(found['all'])} free in /dev/shm")


def memlock(seen: Seen, fleet: Fleet) -> Verdict:
    limit = (seen.fact("limits") or {}).get("memlock")
    if limit == -1:
        return Verdict(PASS, "unlimited")
    text = "not told" if limit is None else f"{size(limit)} may be locked"
    return Verdict(FAIL, text) if seen.fabric else Verdict(PASS, f"{text}; RDMA alone needs more")


def nofile(seen: Seen, fleet: Fleet) -> Verdict:
    limit = (seen.fact("limits") or {}).get("nofile", 0)
    if limit == -1:
        return Verdict(PASS, "unlimited")
    return Verdict(
        FAIL if limit < at.NOFILE_FAIL else WARN if limit < at.NOFILE_WARN else PASS, f"{limit:,} files may be open"
    )


def cpus(seen: Seen, fleet: Fleet) -> Verdict:
    found = seen.fact("cpus")
    if found is None:
        return Verdict(WARN, seen.trouble("cpus") or "not told")
    text = f"{found['usable']} of {found['all']} cores for {seen.host.slots} slots, load {found['load']:.1f}"
    busy = found["load"] > max(found["all"], 1) or found["usable"] < seen.host.slots
    return Verdict(WARN if busy else PASS, text)


def network_mtu(seen: Seen, fleet: Fleet) -> Verdict:
    return same(seen, fleet, "MTU", lambda each: (each.fact("network") or {}).get("mtu"))


def port(seen: Seen, fleet: Fleet) -> Verdict:
    """Where no host reaches the first one, that one is at fault."""
    first, *others = fleet.answering
    nobody = len(others) > 1 and not any(isinstance(each.port, float) for each in others)
    if isinstance(seen.port, float):
        if seen is first and nobody:
            return Verdict(FAIL, f"no other host reaches {fleet.rank_0}")
        return Verdict(PASS, f"reaches {fleet.rank_0} in {1000 * seen.port:.1f} ms")
    if seen.port is None:
        return Verdict(WARN, f"not tried: {fleet.rank_0}")
    return Verdict(WARN if nobody and seen is not first else FAIL, seen.port)
