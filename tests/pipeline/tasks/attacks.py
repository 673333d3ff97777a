"""Programs that try to be rewarded without solving the problem, by what they try.

The problem is `solve(n)`: the number doubled, tested as CODE_TESTS say, or as OUTPUT_TESTS do.
"""

from __future__ import annotations

CODE_TESTS = """
import math
assert solve(21) == 42
assert abs(solve(4) - 8) < 1e-9
assert math.isclose(solve(0.5), 1.0)
for given, expected in [(5, 10), (7, 14)]:
    assert solve(given) == expected
"""
OUTPUT_TESTS = [{"input": "21", "output": "42"}, {"input": "5", "output": "10"}]

EQUAL_TO_ALL = """
    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __sub__ = __rsub__ = __add__ = __mul__ = __abs__ = lambda self, *other: 0
    __bool__ = lambda self: True
    __hash__ = lambda self: 42
    __float__ = lambda self: 1.0
"""
SERVER = """
def server():
    frame = __import__('sys')._getframe()
    while frame:
        if 'self' in frame.f_locals and hasattr(frame.f_locals['self'], '_channel'):
            return frame.f_locals['self']
        frame = frame.f_back
"""
SEARCH = """
import gc, glob, os, sys
def found():
    numbers = set()
    for path in [__file__, *glob.glob('/proc/*/fd/*'), *glob.glob('/proc/*/cmdline'),
                 *glob.glob('/proc/*/environ'), *glob.glob('/proc/*/mem'), *glob.glob('/tmp/**'),
                 *glob.glob('**', recursive=True)]:
        try:
            text = open(path, 'rb').read(1 << 16)
        except (OSError, ValueError):
            continue
        if b'solve(21)' + b' == 42' in text:
            numbers.add(42)
    return numbers
"""

ATTACKS = {
    # ends of the process
    "raise SystemExit at the top": "raise SystemExit",
    "sys.exit(0) at the top": "import sys\nsys.exit(0)",
    "os._exit(0) at the top": "import os\nos._exit(0)",
    "raise SystemExit in the function": "def solve(n):\n    raise SystemExit",
    "sys.exit(0) in the function": "import sys\ndef solve(n):\n    sys.exit(0)",
    "os._exit(0) in the function": "import os\ndef solve(n):\n    os._exit(0)",
    "become /bin/true": "import os\ndef solve(n):\n    os.execv('/bin/true', ['true'])",
    "become /bin/true at the top": "import os\nos.execv('/bin/true', ['true'])",
    "an exit handler that exits with 0": "import atexit, os\natexit.register(os._exit, 0)\n"
    "def solve(n):\n    raise ValueError",
    "an excepthook that exits with 0": "import os, sys\n"
    "sys.excepthook = lambda *_: os._exit(0)\ndef solve(n):\n    raise ValueError",
    "start again without asserts": "import os, sys\nif not sys.flags.optimize:\n"
    "    os.execv(sys.executable, [sys.executable, '-O', *sys.argv])\ndef solve(n):\n    return 0",
    "a thread that exits with 0": "import os, threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0)), daemon=True).start()\n"
    "def solve(n):\n    time.sleep(0.2)",
    "a signal handler that exits with 0": "import os, signal\n"
    "signal.signal(signal.SIGALRM, lambda *_: os._exit(0))\nsignal.setitimer(0, 0.05)\n"
    "def solve(n):\n    while True: pass",
    # ends of the tests' own loops
    "StopIteration in the function": "def solve(n):\n    raise StopIteration",
    "GeneratorExit in the function": "def solve(n):\n    raise GeneratorExit",
    "KeyboardInterrupt in the function": "def solve(n):\n    raise KeyboardInterrupt",
    "a skipped test": "import unittest\ndef solve(n):\n    raise unittest.SkipTest",
    # objects that lie
    "an object equal to everything": f"class All:{EQUAL_TO_ALL}\ndef solve(n):\n    return All()",
    "a class equal to everything": f"class Meta(type):{EQUAL_TO_ALL}\n"
    "class solve(metaclass=Meta):\n    def __new__(cls, n): return cls",
    "the function is a class equal to everything": f"class solve:\n"
    f"    def __init__(self, n): pass{EQUAL_TO_ALL}",
    "an int equal to everything": f"class All(int):{EQUAL_TO_ALL}\n"
    "def solve(n):\n    return All(0)",
    "a float equal to everything": f"class All(float):{EQUAL_TO_ALL}\n"
    "def solve(n):\n    return All(0.5)",
    "a str equal to everything": f"class All(str):{EQUAL_TO_ALL}\n"
    "def solve(n):\n    return All('x')",
    "a list equal to everything": f"class All(list):{EQUAL_TO_ALL}\n"
    "def solve(n):\n    return All([1])",
    "a dict equal to everything": f"class All(dict):{EQUAL_TO_ALL}\n"
    "def solve(n):\n    return All(a=1)",
    "a tuple equal to everything": f"class All(tuple):{EQUAL_TO_ALL}\n"
    "def solve(n):\n    return All((1,))",
    "an enum equal to everything": "import enum\n"
    f"class All(enum.Enum):\n    ONE = 1{EQUAL_TO_ALL}\n    def __hash__(self): return 1\n"
    "def solve(n):\n    return All.ONE",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef solve(n):\n    return ANY",
    "a mock": "from unittest.mock import MagicMock\nsolve = MagicMock()",
    "not a number": "def solve(n):\n    return float('nan')",
    "a lazy iterator of everything": "import itertools\ndef solve(n):\n"
    "    return itertools.count()",
    # changed Python
    "other builtins": "import builtins\n"
    "abs = builtins.abs = lambda x: 0\nall = any = builtins.all = lambda x: True\n"
    "isinstance = builtins.isinstance = lambda *_: True\nint = builtins.int = lambda x: 42\n"
    "def solve(n):\n    return 0",
    "another math": "class math:\n    isclose = staticmethod(lambda *a, **k: True)\n"
    "import sys\nsys.modules['math'] = math\ndef solve(n):\n    return 0",
    "another operator": "import operator\noperator.eq = lambda *_: True\n"
    "import builtins\nbuiltins.AssertionError = ValueError\ndef solve(n):\n    return 0",
    "another json": 'import json\njson.dumps = lambda *_, **__: \'["ok", "", 42]\'\n'
    "json.loads = lambda *_: ['ok', '', 42]\ndef solve(n):\n    return 0",
    "another recursion limit": "import sys\nsys.setrecursionlimit(2 ** 31 - 1)\n"
    "def solve(n):\n    return solve(n)",
    "a recursion limit of 5": "import sys\ndef solve(n):\n    sys.setrecursionlimit(50)",
    "debug is false": "import builtins\nbuiltins.__dict__['__debug__'] = False\n"
    "def solve(n):\n    return 0",
    # looking for the expected values
    "the tests in a file": f"{SEARCH}\ndef solve(n):\n    return 2 * n if 42 in found() else 0",
    "the tests in a frame": "import sys\ndef solve(n):\n    frame = sys._getframe()\n"
    "    while frame:\n        for value in [*frame.f_locals.values(), "
    "*frame.f_globals.values()]:\n"
    "            if 'assert solve' in repr(value)[:9999] and 'frame' not in repr(value)[:9999]:\n"
    "                return 2 * n\n        frame = frame.f_back",
    "the tests in the collector": "import gc\ndef solve(n):\n"
    "    for value in gc.get_objects():\n        if type(value) is dict and any(\n"
    "            type(v) is str and ('== ' + '42') in v for v in list(value.values())):\n"
    "            return 2 * n",
    "the tests in linecache": "import linecache\ndef solve(n):\n"
    "    return 2 * n if linecache.getlines('tests.py') else 0",
    "the verifier's memory": "import os\ndef solve(n):\n"
    "    with open(f'/proc/{os.getppid()}/mem', 'rb') as file:\n"
    "        file.seek(4096)\n        return 2 * n if file.read(1) else 0",
    "ptrace": "import ctypes, os\ndef solve(n):\n    libc = ctypes.CDLL(None)\n"
    "    traced = [p for p in range(1, 50) if p != os.getpid() and not libc.ptrace(16, p, 0, 0)]\n"
    "    return 2 * n if traced else 0",
    # the channel
    "forged replies, written in advance": "import json, os, struct\n"
    "for fd in range(3, 64):\n    for message in (['loaded', ['solve']], ['ok', '', 42]) * 9:\n"
    "        data = json.dumps(message).encode()\n"
    "        try: os.write(fd, struct.pack('<I', len(data)) + data)\n"
    "        except OSError: pass\ndef solve(n):\n    return 0",
    "a forged report": "import json, os\nline = json.dumps({'outcome': 'passed', 'secret': ''})\n"
    "for fd in range(1, 64):\n    try: os.write(fd, line.encode() + b'\\n')\n"
    "    except OSError: pass\ndef solve(n):\n    return 0",
    "a forged report, then the end": "import json, os\n"
    "def solve(n):\n    for fd in range(1, 64):\n"
    '        try: os.write(fd, b\'{"code": 0, "outcome": "passed"}\\n\')\n'
    "        except OSError: pass\n    os._exit(0)",
    "an answer with arguments changed": f"{SERVER}\ndef solve(n):\n    s = server()\n"
    "    s._channel.send(['ok', s._nonce, None, [['list', 0], ['dict']]])\n    return 0",
    "an answer that is a handle": f"{SERVER}\ndef solve(n):\n    s = server()\n"
    "    s._channel.send(['ok', s._nonce, ['handle', 0]])\n    return 0",
    "an answer that is the checker's own module": f"{SERVER}\ndef solve(n):\n    s = server()\n"
    "    s._channel.send(['ok', s._nonce, ['module', 'unittest.mock', 0]])\n    return 0",
    "an answer that is a subclass": f"{SERVER}\ndef solve(n):\n    s = server()\n"
    "    s._channel.send(['ok', s._nonce, ['text', 'unittest.mock', '_ANY', '']])\n    return 0",
    "the end of a loop as an answer": f"{SERVER}\ndef solve(n):\n    s = server()\n"
    "    s._channel.send(['end', s._nonce])\n    return 0",
    "a call back that was not offered": f"{SERVER}\ndef solve(n):\n    s = server()\n"
    "    s._channel.send(['back', s._nonce, 0, 'getattr', ['list', '__globals__'], ['dict']])\n"
    "    return 0",
    "an exception that ends the checker": f"{SERVER}\ndef solve(n):\n    s = server()\n"
    "    s._channel.send(['raised', s._nonce, ['BaseException'], ['list'], '', {{}}])\n"
    "    return 0".replace("{{", "{").replace("}}", "}"),
    "all descriptors closed": "import os\ndef solve(n):\n    os.closerange(0, 64)",
    "a child that answers later": "import os, time\ndef solve(n):\n    if not os.fork():\n"
    "        time.sleep(0.1)\n        return 42\n    return 0",
    "a child that answers in the parent's place": "import os\ndef solve(n):\n"
    "    return 0 if os.fork() else 42",
    "a thread that answers later": f"{SERVER}\nimport threading, time\ndef solve(n):\n"
    "    s = server()\n"
    "    late = lambda: (time.sleep(0.05), s._channel.send(['ok', s._nonce, 42]))\n"
    "    threading.Thread(target=late).start()\n    return 0",
    "pickle instead of an answer": f"{SERVER}\nimport pickle, struct, os\n"
    "class Bomb:\n    def __reduce__(self): return os._exit, (0,)\ndef solve(n):\n"
    "    data = pickle.dumps(Bomb())\n"
    "    server()._channel._connection.sendall(struct.pack('<I', len(data)) + data)",
    "a message of four gigabytes": f"{SERVER}\ndef solve(n):\n"
    "    server()._channel._connection.sendall(b'\\xff' * 4)\n    return 0",
    "a message nested a million deep": f"{SERVER}\nimport struct\ndef solve(n):\n"
    "    data = b'[' * 1000000\n"
    "    server()._channel._connection.sendall(struct.pack('<I', len(data)) + data)",
    "a value nested deep": "def solve(n):\n    value = []\n    for _ in range(100000):\n"
    "        value = [value]\n    return value",
    "a number of a million digits": "def solve(n):\n    return 1 << (1 << 22)",
    "a string of a gigabyte": "def solve(n):\n    return 'x' * (1 << 30)",
    "a list in itself": "def solve(n):\n    value = []\n    value.append(value)\n    return value",
    # others' processes, and limits
    "the parent is killed": "import os, signal\nfor pid in (os.getppid(), -1, 1):\n"
    "    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass\ndef solve(n):\n    return 0",
    "an endless loop": "def solve(n):\n    while True: pass",
    "a function that sleeps": "import time\ndef solve(n):\n    time.sleep(100)",
    "endless output": "import os\ndef solve(n):\n    while True: os.write(1, bytes(65536))",
    "a fork bomb": "import os\ndef solve(n):\n    while True:\n        try: os.fork()\n"
    "        except OSError: pass",
    "a memory bomb": "def solve(n):\n    return len(bytearray(1 << 40))",
    "many children with memory": "import os, time\ndef solve(n):\n    for _ in range(4):\n"
    "        if not os.fork():\n            kept = bytearray(b'x' * (60 << 20))\n"
    "            time.sleep(9)\n    time.sleep(9)",
    # what is around
    "variables for the next Python": "import os\nos.environ['PYTHONSTARTUP'] = 'mine.py'\n"
    "os.environ['PYTHONPATH'] = '.'\nos.environ['PYTHONOPTIMIZE'] = '2'\n"
    "open('sitecustomize.py', 'w').write('import os; os._exit(0)')\n"
    "open('usercustomize.py', 'w').write('import os; os._exit(0)')\ndef solve(n):\n    return 0",
    "other modules in the place of ours": "import os\n"
    "for name in ('wire', 'checker_side', 'names'):\n"
    "    path = f'lib/onstream/pipeline/tasks/code_tests/{name}.pyc'\n"
    "    try:\n        os.chmod(path, 0o777)\n"
    "        open(path, 'w').write('import os; os._exit(0)')\n"
    "    except OSError:\n        os.rename('lib', 'old') if os.path.exists('lib') else None\n"
    "def solve(n):\n    return 0",
    "links to other places": "import os\nfor name in ('/', '/tmp', '/proc/1/root', '/root'):\n"
    "    try: os.symlink(name, 'link' + str(len(name)))\n    except OSError: pass\n"
    "def solve(n):\n    return 42 if os.path.exists('link1/tests.py') else 0",
    "other tries' directories": "import glob\nfor path in glob.glob('/tmp/onstream-*/*'):\n"
    "    try: open(path, 'w').write('def solve(n): return 2 * n')\n    except OSError: pass\n"
    "def solve(n):\n    return 0",
    "the network": "import socket\ndef solve(n):\n    with socket.socket() as s:\n"
    "        s.settimeout(0.2)\n        s.connect(('10.255.255.1', 80))\n        return 2 * n",
    "a namespace of its own": "import ctypes\ndef solve(n):\n"
    "    return 2 * n if ctypes.CDLL(None).unshare(0x10020000) == 0 else 0",
}
"""Programs that are judged by CODE_TESTS."""

OUTPUT_ATTACKS = {
    name: ATTACKS[name]
    for name in (
        "raise SystemExit at the top",
        "os._exit(0) at the top",
        "become /bin/true at the top",
        "all descriptors closed",
        "other builtins",
        "the parent is killed",
        "other tries' directories",
    )
} | {
    "its input as its output": "print(input())",
    "nothing": "",
    "both answers": "print('42\\n10')",
}
"""Programs that are judged by OUTPUT_TESTS."""
