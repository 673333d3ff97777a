"""The processes between a scorer and the program it runs.

It needs the standard library alone, and of that what is quick to import, since every program pays
for it. `onstream.pipeline.tasks.sandbox.sandbox` hands it over compiled.

There are three processes. This one leaves the machine's namespaces. Its child is the first process
of the new ones; when it ends, the kernel ends all others there. The child of that one becomes the
program, under limits and as an unprivileged user. What the machine does not permit is left out, and
the status says so.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

TYPE_CHECKING = False  # as typing has it, whose import takes long where each try pays for it
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any
else:
    import _signal as signal

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_RELATIME = 1 << 21
ST_RELATIME = 4096
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

MEMORY_TICK_S = 0.02
"""How often the memory of all processes is summed up."""

# A filter of system calls: (audit architecture, clone, {number: error}). Memory that no limit of a
# process counts (memfd, System V), namespaces and mounts of one's own, other processes' memory.
SECCOMP_MODE_FILTER = 2
EPERM = 1
ENOSYS = 38  # after which libc tries the call of before
NEW_NAMESPACES = 0x7E020000
SAME_EVERYWHERE = {425: EPERM, 428: EPERM, 429: EPERM, 430: EPERM, 438: EPERM, 442: EPERM}
"""io_uring_setup, open_tree, move_mount, fsopen, pidfd_getfd, mount_setattr."""
SAME_EVERYWHERE |= {447: EPERM, 435: ENOSYS}
"""memfd_secret, clone3 (whose flags a filter cannot read)."""
FILTERS: dict[str, tuple[int, int, dict[int, int]]] = {
    "x86_64": (
        0xC000003E,
        56,
        # memfd_create, shmget, semget, msgget, mq_open, ptrace, process_vm_readv and _writev,
        # userfaultfd, bpf, perf_event_open, add_key, request_key, keyctl, unshare, setns, mount,
        # umount2, pivot_root
        dict.fromkeys((319, 29, 64, 68, 240, 101, 310, 311, 323, 321, 298, 248, 249, 250), EPERM)
        | dict.fromkeys((272, 308, 165, 166, 155), EPERM)
        | SAME_EVERYWHERE,
    ),
    "aarch64": (
        0xC00000B7,
        220,
        dict.fromkeys((279, 194, 190, 186, 180, 117, 270, 271, 282, 280, 241, 217, 218, 219), EPERM)
        | dict.fromkeys((97, 268, 40, 39, 41), EPERM)
        | SAME_EVERYWHERE,
    ),
}

libc = ctypes.CDLL(None, use_errno=True)


class NoErrors:
    """Passes over an OSError, as `contextlib.suppress` does."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


def checked(result: int, what: str) -> None:
    """Raise the error of a call to libc."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> bool:
    """Leave the namespaces of `flags`; False where that is not permitted."""
    return bool(libc.unshare(flags) == 0)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    checked(
        libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
        ),
        f"mount {target}",
    )


def die_with(parent: int) -> None:
    """Be killed when `parent` ends, which may have happened already."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def isolate(spec: dict[str, Any]) -> list[str]:
    """Leave the machine's namespaces as far as is permitted.

    Returns the means that are in force, as in `onstream.pipeline.tasks.sandbox`.
    """
    isolation = ["user"] if os.getuid() == 0 else []
    if os.getuid() and unshare(CLONE_NEWUSER):
        user = spec["outer_user"]
        group = spec["outer_group"]
        files = {
            "setgroups": "deny",
            "uid_map": f"{user} {user} 1",
            "gid_map": f"{group} {group} 1",
        }
        for name, text in files.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        isolation.append("user")
    for name, flag in (
        ("files", CLONE_NEWNS),
        ("processes", CLONE_NEWPID),
        ("network", CLONE_NEWNET),
        ("ipc", CLONE_NEWIPC),
    ):
        if unshare(flag):
            isolation.append(name)
    if "ipc" in isolation:
        # Of the new namespace. Without it, this would be the machine's.
        for name in ("shmmni", "msgmni"):
            with NoErrors(), open(f"/proc/sys/kernel/{name}", "w") as file:
                file.write("0")
    unshare(CLONE_NEWUTS)
    return isolation


def build_root(spec: dict[str, Any], isolation: list[str]) -> None:
    """Make a file system for the program.

    It can read the system's libraries and this Python, write to a small place in memory, and see
    nothing else.
    """
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = spec["scratch"]
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={spec['scratch_bytes']},mode=755")
    prefix = os.path.realpath(spec["prefix"])
    python = () if prefix.startswith("/usr") else (prefix,)
    for path in (*SYSTEM, *python, *DEVICES):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            show(path, root + path)
    os.makedirs(f"{root}/proc")
    if "processes" in isolation:
        # A container that hides parts of its own /proc allows no other; the program then has none.
        with NoErrors():
            mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV)
    os.makedirs(f"{root}/work")
    os.chroot(root)
    spec["scratch"] = "/work"


def show(path: str, target: str) -> None:
    """Make `path` readable at `target`."""
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.isdir(path):
        os.close(os.open(target, os.O_CREAT))
    mount(path, target, "", MS_BIND | MS_REC)
    there = os.statvfs(target).f_flag
    # A flag that the mount has cannot be dropped.
    kept = there & ~ST_RELATIME
    if there & ST_RELATIME:
        kept |= MS_RELATIME
    writes = 0 if path in DEVICES else MS_RDONLY
    mount("none", target, "", MS_REMOUNT | MS_BIND | MS_NOSUID | writes | kept)


def limit(spec: dict[str, Any]) -> None:
    """The limits of one process, and of the user's processes together."""
    for name, value in (
        (resource.RLIMIT_CPU, spec["cpu_s"]),
        (resource.RLIMIT_AS, spec["memory_bytes"]),
        (resource.RLIMIT_FSIZE, spec["file_bytes"]),
        (resource.RLIMIT_NPROC, spec["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (most, most))


def filter_calls() -> bool:
    """Refuse the calls of FILTERS from now on; False where that is not possible.

    It is a program of the kernel's packet filter: (code, jump if true, jump if false, value).
    """
    if os.uname().machine not in FILTERS:
        return False
    architecture, clone, refused = FILTERS[os.uname().machine]
    load, equal, at_least, has_any, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, error, kill = 0x7FFF0000, 0x00050000, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
    # Numbers from here on are the x32 calls, another way to the same ones.
    steps += [(at_least, 0, 1, 0x40000000), (end, 0, 0, error | ENOSYS)]
    for number, errno in refused.items():
        steps += [(equal, 0, 1, number), (end, 0, 0, error | errno)]
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (has_any, 0, 1, NEW_NAMESPACES)]
    steps += [(end, 0, 0, error | EPERM), (end, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0)


def become_program(spec: dict[str, Any], status: int) -> None:
    """Become the program: a session of its own, no privileges, no environment."""
    os.setsid()
    os.chdir(spec["scratch"])
    limit(spec)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(spec["user"], spec["user"], spec["user"])
        os.setresuid(spec["user"], spec["user"], spec["user"])
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if filter_calls():
        tell(status, {"filter": True})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(
        spec["python"],
        [spec["python"], "-I", "-S", "-B", *spec["arguments"]],
        {"PATH": "/usr/bin:/bin", "HOME": spec["scratch"], "LANG": "C.UTF-8"},
    )


def first_process(spec: dict[str, Any], isolation: list[str], status: int) -> None:
    """Start the program, reap what it leaves, and tell how it ended.

    When this process ends, the kernel ends all others of its namespace.
    """
    if "files" in isolation:
        build_root(spec, isolation)
    for name, content in spec["files"].items():
        path = os.path.join(spec["scratch"], name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o444)
    if os.getuid() == 0:
        os.chown(spec["scratch"], spec["user"], spec["user"])
    pids = watched_processes(spec, isolation)
    if pids is not None:
        isolation.append("memory")
    tell(status, {"isolation": isolation})
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    program = os.fork()
    if not program:
        attempt(become_program, spec, status, status=status)
    while (code := exit_code(program)) is None:
        signal.sigtimedwait([signal.SIGCHLD], MEMORY_TICK_S)
        used_bytes = memory_of(pids(), spec["memory_bytes"]) if pids else 0
        if used_bytes > spec["memory_bytes"]:
            tell(status, {"over_memory": used_bytes})
            os._exit(0)
    tell(status, {"code": code})
    os._exit(0)


def exit_code(program: int) -> int | None:
    """The exit code of `program`, None while it runs. Buries what else has ended."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if not ended:
            return None
        if ended == program:
            return os.waitstatus_to_exitcode(status)


def watched_processes(spec: dict[str, Any], isolation: list[str]) -> Callable[[], list[str]] | None:
    """How the program's processes are listed; None where they cannot be told from others."""

    def everyone() -> list[str]:
        return [name for name in os.listdir("/proc") if name.isdigit()]

    if os.path.exists("/proc/1") and os.readlink("/proc/self") == "1":
        return lambda: [name for name in everyone() if name != "1"]
    if os.getuid() or not os.path.exists("/proc/self"):
        return None

    def of_the_user() -> list[str]:
        found = []
        for name in everyone():
            with NoErrors():
                found += [name] if os.stat(f"/proc/{name}").st_uid == spec["user"] else []
        return found

    return of_the_user


def memory_of(pids: list[str], enough_bytes: int) -> int:
    """What the processes hold in memory together, files aside.

    The quick sum counts what they share once for each. It will do where it is not too much.
    """
    quick = memory_sum(pids, "status", ("RssAnon:", "RssShmem:"))
    if quick <= enough_bytes:
        return quick
    return memory_sum(pids, "smaps_rollup", ("Pss_Anon:", "Pss_Shmem:"))


def memory_sum(pids: list[str], file_name: str, fields: tuple[str, ...]) -> int:
    """The sum of `fields`, which are in KiB, in a file of each process."""
    total = 0
    for pid in pids:
        # It may end while its file is read.
        with NoErrors(), open(f"/proc/{pid}/{file_name}") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith(fields))
    return total << 10


def attempt(step: Callable[..., None], *arguments: Any, status: int) -> None:
    """Do a step that does not return, and tell what stops it."""
    try:
        step(*arguments)
    except BaseException as error:
        tell(status, {"error": f"{type(error).__name__}: {error}"})
    os._exit(1)


def tell(status: int, message: dict[str, Any]) -> None:
    """One line of status, in Python's notation."""
    os.write(status, repr(message).encode(errors="backslashreplace") + b"\n")


def main(spec: dict[str, Any], status: int) -> None:
    """Isolate, and wait for the first process."""
    os.set_inheritable(status, False)
    die_with(spec["parent"])
    isolation = isolate(spec)
    me = os.getpid()
    first = os.fork()
    if not first:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if "processes" not in isolation and os.getppid() != me:
            os._exit(1)
        attempt(first_process, spec, isolation, status, status=status)
    os.waitpid(first, 0)
