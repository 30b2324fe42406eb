"""What a model wrote stays in the sandbox: attempts to get out, seen from outside, and to be graded as right.

An attempt prints GOT and what it came by. Where that is safe to show, the same attempt is run with nothing but limits
around it, and succeeds: so it is the sandbox that stops it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import ROOT

from tasks.jail import decode, encode
from tasks.sandbox import Limits, Outcome, Program, Sandbox, SandboxUnavailable

CHECK = "def check(candidate):\n    assert candidate(2) == 3\n"
SECRET = f"canary-{secrets.token_hex(8)}"
GENEROUS_S = 30.0  # for what must not depend on how busy the machine is


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "namespaces":
            patch.setenv("PATH", "")  # where bubblewrap would be found
        try:
            found = Sandbox()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
    if found.way != request.param:
        pytest.skip(f"{request.param} does not work on this machine")
    yield found


@pytest.fixture(scope="module")
def unsafe() -> Sandbox:
    return Sandbox(unsafe=True)


@pytest.fixture
def canary() -> Iterator[psutil.Popen]:
    """A process that does no harm."""
    with psutil.Popen(["sleep", "600"], env={"CANARY": SECRET}) as process:
        yield process
        with suppress(psutil.NoSuchProcess):
            process.kill()


def attempt(sandbox: Sandbox, code: str, timeout_s: float = GENEROUS_S) -> Outcome:
    """The outcome of a program that does `code` and then answers rightly."""
    source = "import ctypes, os, socket, sys\n" + textwrap.dedent(code) + "\ndef f(x):\n    return x + 1\n"
    return sandbox.run(Program(source, "f", CHECK), timeout_s)


def stopped(sandbox: Sandbox, unsafe: Sandbox | None, code: str) -> None:
    """`code` gets nothing inside, in whatever way that ends, and gets it outside."""
    inside = attempt(sandbox, code)
    assert "GOT" not in inside.output
    assert SECRET not in inside.output
    assert inside.passed or "Error" in inside.reason, inside  # it was the attempt that failed, and not the machine
    if unsafe is not None:
        assert "GOT" in attempt(unsafe, code).output


def home_of(tmp_path: Path) -> Path:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").write_text(SECRET)
    (tmp_path / "notes").write_text(SECRET)
    return tmp_path


def test_a_right_program_passes_and_a_wrong_one_fails(sandbox: Sandbox) -> None:
    for body, passed, reason in (
        ("return x + 1", True, ""),
        ("print('hello')\n    return x + 1", True, ""),
        ("return x", False, "AssertionError"),
        ("return 1 / 0", False, "ZeroDivisionError: division by zero"),
        ("return", False, "AssertionError"),
        ("raise SystemExit(0)", False, "ProgramError: SystemExit: 0"),
        ("return (", False, "SyntaxError: '(' was never closed (solution.py, line 2)"),
    ):
        outcome = sandbox.run(Program(f"def f(x):\n    {body}\n", "f", CHECK), GENEROUS_S)
        assert (outcome.passed, outcome.reason, outcome.limit) == (passed, reason, None)
        assert outcome.output == ("hello\n" if "print" in body else "")
    missing = sandbox.run(Program("def g(x):\n    return x + 1\n", "f", CHECK), GENEROUS_S)
    assert (missing.passed, missing.reason) == (False, "NameError: the program does not define f")


def test_the_standard_library_and_files_of_its_own_are_there(sandbox: Sandbox) -> None:
    code = """
        import collections, datetime, decimal, functools, hashlib, heapq, itertools, math, random, re, statistics
        import string, tempfile, typing, zlib
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w+", dir=folder) as file:
            file.write("some text")
            file.seek(0)
            assert file.read() == "some text" and len(os.listdir(folder)) == 1
        assert os.listdir(".") == [] and os.getcwd() == "/tmp"
        assert 0 <= random.random() < 1 and hashlib.sha256(b"x").hexdigest()
        assert open(os.devnull).read() == "" and sys.stdin.read() == ""
    """
    outcome = attempt(sandbox, code)
    assert outcome.passed, outcome.reason


# What is read


def test_no_file_of_the_system(sandbox: Sandbox, unsafe: Sandbox) -> None:
    for path in (
        "/etc/passwd",
        "/etc/hostname",
        "/etc/hosts",
        "/proc/cpuinfo",
        "/sys/kernel/mm",
        "/bin/sh",
        "/var/log",
    ):
        stopped(sandbox, unsafe if os.path.exists(path) else None, f"print('GOT', os.stat({path!r}).st_ino)")
    stopped(sandbox, unsafe, "print('GOT', open('/etc/passwd').read(10))")


def test_nothing_of_the_users_home(sandbox: Sandbox, unsafe: Sandbox, tmp_path: Path) -> None:
    home = home_of(tmp_path)
    stopped(sandbox, unsafe, f"print('GOT', os.listdir({str(home)!r}))")
    stopped(sandbox, unsafe, f"print('GOT', open({str(home / 'notes')!r}).read())")
    stopped(sandbox, unsafe, f"print('GOT', open({str(home / '.ssh' / 'id_ed25519')!r}).read())")
    # Of the real one there may be the way to a Python that is in it, and nothing else.
    code = f"""
        home, prefix = {str(Path.home())!r}, sys.base_prefix + "/"
        for folder, folders, files in os.walk(home):
            if not (folder + "/").startswith(prefix):
                for name in files + [name for name in folders if not prefix.startswith(folder + "/" + name + "/")]:
                    sys.exit(print("GOT", folder, name))
    """
    stopped(sandbox, unsafe, code)
    stopped(sandbox, None, "print('GOT', open(os.path.expanduser('~/.ssh/known_hosts')).read())")


def test_nothing_of_this_project_or_its_environment(sandbox: Sandbox, unsafe: Sandbox) -> None:
    stopped(sandbox, unsafe, f"print('GOT', os.listdir({str(ROOT)!r}))")
    stopped(sandbox, unsafe, f"print('GOT', os.listdir({sys.prefix!r}))")
    for name in ("tasks.sandbox", "torch", "numpy", "pip"):
        stopped(sandbox, None, f"import {name}; print('GOT')")


def test_no_environment_variable(sandbox: Sandbox, canary: psutil.Popen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    code = """
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_char_p
        print(dict(os.environ), getenv(b"CANARY"), getenv(b"HOME"))
    """
    outcome = attempt(sandbox, code)
    assert outcome.output.split() == ["{}", "None", "None"]
    stopped(sandbox, None, "print('GOT', open('/proc/self/environ').read())")


def test_no_other_process_is_seen(sandbox: Sandbox, unsafe: Sandbox, canary: psutil.Popen) -> None:
    for name in ("environ", "cmdline", "maps", "cwd", "root/etc/passwd"):
        read = "os.readlink" if name == "cwd" else "open"
        stopped(sandbox, unsafe, f"print('GOT', {read}('/proc/{canary.pid}/{name}'))")
    stopped(sandbox, unsafe, "print('GOT', os.listdir('/proc'))")
    stopped(sandbox, unsafe, f"print('GOT', os.getsid({canary.pid}))")


# What is written


def test_nothing_is_written_outside(sandbox: Sandbox, unsafe: Sandbox, tmp_path: Path) -> None:
    notes = home_of(tmp_path) / "notes"
    stopped(sandbox, None, f"open({str(notes)!r}, 'w').write('x'); print('GOT')")
    stopped(sandbox, None, f"os.unlink({str(notes)!r}); print('GOT')")
    assert notes.read_text() == SECRET
    stopped(sandbox, unsafe, f"open({str(tmp_path / 'new')!r}, 'x'); print('GOT')")
    stopped(sandbox, unsafe, f"open({str(notes)!r}, 'w').write('x'); print('GOT')")


@pytest.mark.parametrize(
    "folder", ["/", "/usr/lib", "/etc", "/dev", "/lib", "os.path.dirname(os.__file__)", "sys.base_prefix + '/bin'"]
)
def test_the_system_is_read_only(sandbox: Sandbox, folder: str) -> None:
    folder = repr(folder) if folder.startswith("/") else folder
    stopped(sandbox, None, f"open({folder} + '/fathom-attempt', 'w'); print('GOT')")
    stopped(sandbox, None, f"os.mkdir({folder} + '/fathom-attempt'); print('GOT')")
    stopped(sandbox, None, f"os.chmod({folder}, os.stat({folder}).st_mode); print('GOT')")
    stopped(sandbox, None, f"os.utime({folder}, None); print('GOT')")


def test_what_is_loaded_cannot_be_altered(sandbox: Sandbox) -> None:
    stopped(sandbox, None, "open(os.__file__, 'a'); print('GOT')")
    stopped(sandbox, None, "open(sys.executable, 'a'); print('GOT')")
    stopped(sandbox, None, "import fcntl; fcntl.fcntl(open(os.__file__), 1024, fcntl.F_RDLCK); print('GOT')")  # a lease


def test_links_and_dots_lead_nowhere(sandbox: Sandbox, unsafe: Sandbox, tmp_path: Path) -> None:
    notes = home_of(tmp_path) / "notes"
    stopped(sandbox, unsafe, f"print('GOT', open('/tmp/{'../' * 20}{str(notes)[1:]}').read())")
    code = f"""
        import tempfile
        os.chdir(tempfile.mkdtemp())
        os.symlink({str(notes)!r}, "link")
        print("GOT", open("link").read())
    """
    stopped(sandbox, unsafe, code)
    code = f"""
        import tempfile
        os.chdir(tempfile.mkdtemp())
        os.symlink({str(tmp_path)!r}, "folder")
        os.rename("folder", "other")
        print("GOT", os.listdir("other/../" + {tmp_path.name!r}))
    """
    stopped(sandbox, unsafe, code)
    stopped(sandbox, unsafe, f"print('GOT', open('/proc/self/root{notes}').read())")
    stopped(sandbox, None, f"os.link({str(notes)!r}, '/tmp/hard'); print('GOT', open('/tmp/hard').read())")
    stopped(sandbox, None, f"os.chroot('/tmp'); print('GOT'); open({str(notes)!r})")
    # the descriptors that are open are the null device, the two of its output and the two to the grader
    code = """
        import stat
        def kind(fd):
            try:
                return stat.S_IFMT(os.fstat(fd).st_mode)
            except OSError:
                return 0
        print([kind(fd) for fd in range(4096) if kind(fd)] == [stat.S_IFCHR] + 4 * [stat.S_IFIFO])
    """
    assert attempt(sandbox, code).output == "True\n"


# The network


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "abstract"])
def test_no_socket_reaches_this_machine(sandbox: Sandbox, unsafe: Sandbox, tmp_path: Path, kind: str) -> None:
    family = socket.AF_INET if kind in ("tcp", "udp") else socket.AF_UNIX
    type_ = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
    with closing(socket.socket(family, type_)) as server:
        server.bind({"unix": str(tmp_path / "s"), "abstract": f"\0{SECRET}"}.get(kind, ("127.0.0.1", 0)))
        if kind != "udp":
            server.listen()
        code = f"""
            s = socket.socket({int(family)}, {int(type_)})
            s.connect({server.getsockname()!r})
            s.send(b"out")
            print("GOT")
        """
        server.settimeout(0.1)
        receive: Callable[[], object] = server.accept if kind != "udp" else lambda: server.recv(9)
        stopped(sandbox, None, code)
        with pytest.raises(TimeoutError):
            receive()
        stopped(sandbox, unsafe, code)
        assert receive()


@pytest.mark.parametrize(
    "family", ["AF_INET, SOCK_STREAM", "AF_INET6, SOCK_DGRAM", "AF_UNIX, SOCK_STREAM", "AF_NETLINK, SOCK_RAW"]
)
def test_no_socket_can_be_made(sandbox: Sandbox, unsafe: Sandbox, family: str) -> None:
    family, type_ = family.split(", ")
    stopped(sandbox, unsafe, f"print('GOT', socket.socket(socket.{family}, socket.{type_}))")


def test_no_name_is_looked_up_and_no_address_reached(sandbox: Sandbox, unsafe: Sandbox) -> None:
    stopped(sandbox, unsafe, "print('GOT', socket.socketpair())")
    stopped(sandbox, None, "print('GOT', socket.gethostbyname('localhost'))")
    stopped(sandbox, None, "print('GOT', socket.create_connection(('1.1.1.1', 53), timeout=1))")


# Other processes


def test_other_processes_are_out_of_reach(sandbox: Sandbox, unsafe: Sandbox, canary: psutil.Popen) -> None:
    nice = canary.nice()
    for pid in (canary.pid, os.getpid(), -1):
        stopped(sandbox, unsafe, f"os.kill({pid}, 0); print('GOT')")
    stopped(sandbox, None, f"os.kill({canary.pid}, 9); print('GOT')")
    stopped(sandbox, None, "os.kill(os.getppid(), 9); print('GOT')")
    stopped(sandbox, None, f"os.setpriority(os.PRIO_PROCESS, {canary.pid}, 19); print('GOT')")
    stopped(sandbox, None, f"os.sched_setaffinity({canary.pid}, [0]); print('GOT')")
    stopped(sandbox, None, "os.nice(-5); print('GOT')")
    stopped(sandbox, None, "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_AS); print('GOT')")
    stopped(sandbox, None, "import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0); print('GOT')")
    # through the owner of a file's signals: F_SETSIG and F_SETOWN
    stopped(sandbox, None, "import fcntl; fcntl.fcntl(1, 10, 9); print('GOT')")
    stopped(sandbox, None, "import fcntl; fcntl.fcntl(1, 8, os.getppid()); print('GOT')")
    ptrace = f"""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(16, {canary.pid}, None, None) == 0:  # PTRACE_ATTACH
            print("GOT")
    """
    stopped(sandbox, None, ptrace)
    read = f"""
        libc, here = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(8)
        for pid in [{canary.pid}, *range(1, 20)]:
            vector = (ctypes.c_void_p * 2)(ctypes.addressof(here), 8)
            if libc.process_vm_readv(pid, vector, 1, vector, 1, 0) >= 0 or ctypes.get_errno() != 1:  # EPERM
                print("GOT", pid)
    """
    stopped(sandbox, unsafe, read)
    assert canary.is_running() and canary.status() == psutil.STATUS_SLEEPING and canary.nice() == nice

    stopped(sandbox, unsafe, f"os.setpriority(os.PRIO_PROCESS, {canary.pid}, 19); print('GOT')")
    assert canary.nice() == 19
    if os.geteuid() == 0:  # others may trace their children only, on some machines
        stopped(sandbox, unsafe, ptrace)
    stopped(sandbox, unsafe, f"os.kill({canary.pid}, 9); print('GOT')")
    assert canary.wait(10) == -9


@pytest.mark.parametrize(
    "start",
    [
        "os.fork()",
        "os.forkpty()",
        "os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})",
        "os.execv(sys.executable, [sys.executable, '-c', 'print(\"GOT\")'])",
        "os.system('true') and 1 / 0",
        "__import__('subprocess').Popen([sys.executable])",
        "__import__('threading').Thread(target=print).start()",
        "__import__('multiprocessing').Process(target=print).start()",
        "__import__('concurrent.futures').futures.ThreadPoolExecutor().submit(print)",
    ],
)
def test_no_process_or_thread_can_be_started(sandbox: Sandbox, start: str) -> None:
    stopped(sandbox, None, f"{start}\nprint('GOT')")


def test_a_fork_bomb_does_not_go_off(sandbox: Sandbox, unsafe: Sandbox) -> None:
    code = """
        made = 0
        for _ in range({times}):
            try:
                if os.fork() == 0:
                    os.pause() if hasattr(os, "pause") else __import__("signal").pause()
                made += 1
            except OSError:
                pass
        print("GOT" if made else "none")
    """
    stopped(sandbox, None, code.format(times=200))
    if os.geteuid() == 0:  # others have their limit, of no processes besides those there are
        assert "GOT" in attempt(unsafe, code.format(times=2)).output


def test_no_system_call_by_number(sandbox: Sandbox) -> None:
    """Straight to the kernel, past Python and the C library, with arguments that at worst would make no sense."""
    numbers = {
        "x86_64": "socket 41 clone 56 fork 57 vfork 58 execve 59 kill 62 ptrace 101 setsid 112 mount 165 unshare 272 "
        "process_vm_writev 311 bpf 321 userfaultfd 323 memfd_create 319 setns 308 keyctl 250 shmget 29",
        "aarch64": "socket 198 clone 220 execve 221 kill 129 ptrace 117 setsid 157 mount 40 unshare 97 "
        "process_vm_writev 271 bpf 280 userfaultfd 282 memfd_create 279 setns 268 keyctl 219 shmget 194",
    }.get(os.uname().machine, "")
    everywhere = "pidfd_open 434 pidfd_getfd 438 io_uring_setup 425 clone3 435 open_tree 428 fsopen 430 landlock 444"
    words = f"{numbers} {everywhere}".split()
    code = f"""
        libc = ctypes.CDLL(None, use_errno=True)
        for number in {[int(number) for number in words[1::2]]}:
            if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
                print("GOT", number)
    """
    stopped(sandbox, None, code)


def test_no_privilege_can_be_had(sandbox: Sandbox) -> None:
    for code in (
        "os.setuid(0)",
        "os.setgroups([])",
        "os.chown('/tmp', 0, 0)",
        "os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))",
        "socket.sethostname(socket.gethostname())",
        "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
        "__import__('resource').setrlimit(7, (4096, 4096))",
        "ctypes.CDLL(None).unshare(0x10000000) and 1 / 0",
        "import tempfile; ctypes.CDLL(None).mount(b'x', tempfile.mkdtemp().encode(), b'tmpfs', 0, None) and 1 / 0",
        "ctypes.CDLL(None).prctl(24, 0, 0, 0, 0) and 1 / 0",
    ):
        stopped(sandbox, None, f"{code}\nprint('GOT')")


# Limits


def test_a_memory_bomb_meets_its_limit(sandbox: Sandbox) -> None:
    for code in (
        "x = bytearray(1 << 40)",
        "x = [0]\nwhile True: x += x",
        "x = []\nwhile True: x.append('y' * 100_000)",
    ):
        outcome = attempt(sandbox, code)
        assert (outcome.passed, outcome.limit, outcome.reason) == (False, "memory", "MemoryError")
    code = """
        import mmap
        held = []
        try:
            while True:
                held.append(mmap.mmap(-1, 1 << 20))
        except (MemoryError, OSError):
            print(len(held))
    """
    assert int(attempt(sandbox, code).output) <= sandbox.limits.memory_bytes >> 20


def test_a_disk_bomb_meets_its_limit(sandbox: Sandbox) -> None:
    code = """
        import glob, itertools
        for number in itertools.count():
            try:
                with open(f"/tmp/{number}", "wb") as file:
                    while True:
                        file.write(bytes(1 << 16))
            except OSError:
                if file.closed and not os.path.exists(f"/tmp/{number}") or os.path.getsize(f"/tmp/{number}") == 0:
                    break
        print(sum(map(os.path.getsize, glob.glob("/tmp/*"))), max(map(os.path.getsize, glob.glob("/tmp/*"))))
        for name in glob.glob("/tmp/*"):
            os.unlink(name)
        for number in itertools.count():
            try:
                os.close(os.open(f"/tmp/{number}", os.O_CREAT))
            except OSError:
                print(number)
                break
        held = []
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            print(len(held))
    """
    small = copy.copy(sandbox)
    small.limits = Limits(file_bytes=1 << 20, temporary_bytes=4 << 20)
    outcome = attempt(small, code)
    assert outcome.passed, outcome
    total, largest, files, descriptors = map(int, outcome.output.split())
    assert 2 << 20 < total <= 4 << 20 and 1 << 19 < largest <= 1 << 20
    assert 500 < files <= 1024 and descriptors < small.limits.open_files


@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "__import__('time').sleep(1000)",
        "sum(range(10**15))",
        "import signal\nfor s in {1, 2, 3, 6, 13, 14, 15, 24}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "class A:\n    def __del__(self):\n        while True: pass\nA()",
    ],
)
def test_time_limits_hold_under_load(sandbox: Sandbox, loop: str) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        outcome = attempt(sandbox, f"import time\nprint(time.time(), flush=True)\n{loop}", timeout_s=1.0)
        ended = time.time()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert (outcome.passed, outcome.limit, outcome.reason) == (False, "time", "no end within 1 s")
    assert 1.0 <= outcome.seconds < 2.0
    if outcome.output:  # within a second it has got so far
        assert ended - float(outcome.output) < 2.0


def test_endless_output_is_bounded(sandbox: Sandbox) -> None:
    for code in ("while True: print('x' * 1000)", "while True: os.write(2, b'x' * 100_000)"):
        outcome = attempt(sandbox, code)
        assert (outcome.passed, outcome.limit) == (False, "output")
        assert len(outcome.output) <= sandbox.limits.output_bytes


@pytest.mark.parametrize("result", ["'x' * (1 << 28)", "[0] * 10_000_000", "iter(int, 1)", "deep(10**5)", "10**10**6"])
def test_a_result_of_any_size_is_no_more_than_wrong(sandbox: Sandbox, result: str) -> None:
    source = f"""
def deep(n):
    x = []
    for _ in range(n):
        x = [x]
    return x

def f(x):
    return {result}
"""
    small = copy.copy(sandbox)
    small.limits = Limits(memory_bytes=128 << 20)
    outcome = small.run(Program(source, "f", CHECK), GENEROUS_S)
    assert not outcome.passed and outcome.limit in (None, "memory")


def test_nothing_is_left_behind(sandbox: Sandbox) -> None:
    marked = copy.copy(sandbox)
    marked.limits = Limits(temporary_bytes=(1 << 20) + os.getpid() * 4096)  # as no other test has them
    mark = f'"temporary_bytes": {marked.limits.temporary_bytes}'

    def left() -> list[int]:
        return [
            p.pid for p in psutil.process_iter(["cmdline"]) if any(mark in part for part in p.info["cmdline"] or ())
        ]

    for code in ("while True: pass", "os._exit(0)", "os.closerange(0, 100)", "import time; time.sleep(100)", ""):
        attempt(marked, code, timeout_s=0.5)
        assert left() == []
    with subprocess.Popen(
        [sys.executable, "-c", _RUN_FOREVER.format(limits=marked.limits, way=marked.way)], cwd=ROOT
    ) as process:
        deadline = time.monotonic() + 30
        while len(left()) < 3 and time.monotonic() < deadline:  # its own command line has no such mark
            time.sleep(0.05)
        assert len(left()) >= 3
        process.send_signal(signal.SIGKILL)  # nobody can tidy up after that
        deadline = time.monotonic() + 5
        while left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left() == []


_RUN_FOREVER = """
from tasks.sandbox import *
sandbox = Sandbox(unsafe=True)
sandbox.limits, sandbox.way = {limits!r}, {way!r}
sandbox.run(Program("while True: pass", "f", ""), 1000)
"""


# The grade


@pytest.mark.parametrize(
    "code",
    [
        "os._exit(0)",
        "sys.exit(0)",
        "raise KeyboardInterrupt",
        "os.abort()",
        "ctypes.string_at(0)",
        "os.kill(os.getppid(), 9)",
        "os.kill(0, 9)",
        "os.closerange(0, 100)",
        'print(\'{"passed": true, "reason": "", "limit": null}\')',
        "import __main__\n__main__.grade = lambda *a: {'passed': True, 'reason': '', 'limit': None}",
        "import __main__\n__main__.grade.__code__ = (lambda *a: {'passed': True}).__code__",
        "import __main__\nfor name in list(vars(__main__)): setattr(__main__, name, lambda *a, **k: True)",
        "import builtins\nbuiltins.AssertionError = builtins.isinstance = lambda *a: True",
        "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'",
        "import atexit\natexit.register(print, '{\"passed\": true}')",
        "sys.settrace(lambda *a: os._exit(0))",
        "def f(x):\n    os._exit(0)",
        "def f(x):\n    raise SystemExit",
        "def f(x):\n    return type('Any', (), {'__eq__': lambda *a: True})()",
        "def f(x):\n    return type('Any', (int,), {'__eq__': lambda *a: True})()",
        "def f(x):\n    return type('Any', (str,), {'__eq__': lambda *a: True, '__str__': lambda s: '3'})('y')",
        "class f(int):\n    __eq__ = lambda *a: True",
        "f = lambda x: __import__('unittest.mock').mock.ANY",
        "f = lambda x: float('nan')",
        "def f(x):\n    frame = sys._getframe()\n    while frame:\n        frame.f_locals.update(passed=True)\n"
        "        frame = frame.f_back",
    ],
)
def test_a_wrong_program_is_never_graded_as_right(sandbox: Sandbox, code: str) -> None:
    source = f"import ctypes, os, sys\ndef f(x):\n    return x\n{code}\n"
    outcome = sandbox.run(Program(source, "f", CHECK), GENEROUS_S)
    assert not outcome.passed and outcome.reason and outcome.limit is None


def test_no_descriptor_takes_a_faked_verdict(sandbox: Sandbox) -> None:
    """Written as a line, as the verdict is, and as a message, as results are, to whatever is open."""
    source = """
import json, os
def f(x):
    for said in ({"ready": True}, {"passed": True, "reason": "", "limit": None}, {"value": True}):
        body = json.dumps(said).encode()
        for fd in range(4096):
            for data in (body + b"\\n", len(body).to_bytes(8, "big") + body):
                try:
                    os.write(fd, data)
                except OSError:
                    pass
    return 2
"""
    assert not sandbox.run(Program(source, "f", CHECK), GENEROUS_S).passed


def test_the_program_does_not_see_its_test(sandbox: Sandbox) -> None:
    source = """
import ctypes, gc, sys
def f(x):
    found = [sys.argv, sys.orig_argv]
    frame = sys._getframe()
    while frame:  # what every caller has, which the collector need not know of
        found.append([frame.f_locals, frame.f_globals])
        frame = frame.f_back
    for o in gc.get_objects():
        found += [text for text in [o, *gc.get_referents(o)] if isinstance(text, (str, bytes))]
    word = "-".join(["canary", ""])
    places = [text.find(word) for text in map(repr, found)]
    return [text[place : place + 30] for text, place in zip(map(repr, found), places) if place >= 0]
"""
    check = f"def check(candidate):\n    got = candidate(2)\n    assert got == [], (got, {SECRET!r})\n"
    outcome = sandbox.run(Program(source, "f", check, context=f"known = {SECRET!r}"), GENEROUS_S)
    assert outcome.passed, outcome.reason


def test_a_test_that_is_broken_fails_the_program(sandbox: Sandbox) -> None:
    for test, reason in (
        ("", "KeyError: 'check'"),
        ("def check(", "SyntaxError"),
        ("import no_such", "ModuleNotFound"),
    ):
        outcome = sandbox.run(Program("def f(x):\n    return x + 1\n", "f", test), GENEROUS_S)
        assert not outcome.passed and outcome.reason.startswith(reason)


def test_the_test_may_use_its_context_and_the_function_by_name(sandbox: Sandbox) -> None:
    test = """
def check(candidate):
    assert candidate((1, 2), named={3: [None, 1.5]}) == ((1, 2), {3: [None, 1.5]})
    assert f({"a"}, named=known()) == ({"a"}, b"known")
    try:
        candidate(0)
    except ValueError as error:
        assert str(error) == "zero"
    else:
        assert False
"""
    source = "def f(x, named=None):\n    if x == 0:\n        raise ValueError('zero')\n    return x, named\n"
    outcome = sandbox.run(Program(source, "f", test, context="def known():\n    return b'known'\n"), GENEROUS_S)
    assert (outcome.passed, outcome.reason) == (True, "")


def simple(children: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    hashable = st.one_of(st.integers(), st.text(), st.tuples(st.integers(), st.booleans()))
    return st.one_of(
        st.lists(children),
        st.lists(children).map(tuple),
        st.dictionaries(hashable, children),
        st.sets(hashable),
        st.frozensets(hashable),
    )


@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False),
            st.complex_numbers(allow_nan=False),
            st.text(),
            st.binary(),
            st.decimals(allow_nan=False),
            st.fractions(),
            st.integers(-5, 5).map(range),
        ),
        simple,
    )
)
def test_values_come_over_as_they_are(value: object) -> None:
    over = decode(json.loads(json.dumps(encode(value))))
    assert over == value and type(over) is type(value)


def test_values_that_are_not_plain_come_over_as_plain_ones() -> None:
    def over(value: object) -> object:
        return decode(json.loads(json.dumps(encode(value))))

    assert over(10**5000) == 10**5000 and math.isnan(over(math.nan))  # type: ignore[arg-type]
    assert over({1: 2}.keys()) == {1} and list(over(x for x in "ab")) == ["a", "b"]  # type: ignore[call-overload]
    assert over([Decimal("1.5"), Fraction(1, 3)]) == [Decimal("1.5"), Fraction(1, 3)]
    with pytest.raises(TypeError, match="a object cannot be handed to the test"):
        encode(object())


# Many, and none


def test_many_run_at_once_but_no_more_than_there_are_cores(sandbox: Sandbox) -> None:
    source = "import time\nprint(time.time())\ntime.sleep(0.5)\nprint(time.time())\nf = lambda x: x + {}\n"
    programs = [Program(source.format(number), "f", CHECK) for number in range(8)]
    outcomes = sandbox.run_many(programs, GENEROUS_S, workers=64)
    assert [outcome.passed for outcome in outcomes] == [number == 1 for number in range(8)]
    times = [tuple(map(float, outcome.output.split())) for outcome in outcomes]
    at_once = max(sum(start <= other < end for start, end in times) for other, _ in times)
    cores = len(os.sched_getaffinity(0))
    assert min(2, cores) <= at_once <= cores


def test_a_machine_that_allows_no_sandbox_is_told_what_to_install() -> None:
    """A namespace of users in which no more namespaces can be made, and in which the command has no privilege."""
    tools = shutil.which("unshare") and shutil.which("setpriv")
    if not tools or subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs unshare and setpriv")
    code = "from tasks.sandbox import *\nprint(Sandbox(unsafe=True).run({!r}).passed)\nSandbox()"
    code = code.format(Program("def f(x):\n    return x + 1\n", "f", CHECK))
    within = 'echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    command = ["unshare", "-Ur", "sh", "-c", within, "sh", sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "True\n"
    error = found.stderr.splitlines()[-1]
    assert "SandboxUnavailable: this machine cannot shut in what a model wrote" in error
    assert "Install bubblewrap and libseccomp" in error and "--unsafe-sandbox" in error
