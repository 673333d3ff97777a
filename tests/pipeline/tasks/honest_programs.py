"""Honest programs, with tests in the forms that data sets have, and what they score."""

from __future__ import annotations

from typing import Any

Case = tuple[str, Any, float]

LINKED_LIST = """
class Node:
    def __init__(self, value, next=None):
        self.value = value
        self.next = next
class List:
    def __init__(self): self.head = None
    def push(self, value): self.head = Node(value, self.head)
    def __len__(self):
        n, node = 0, self.head
        while node: n, node = n + 1, node.next
        return n
    def __iter__(self):
        node = self.head
        while node:
            yield node.value
            node = node.next
"""

HONEST: dict[str, Case] = {
    "asserts": ("def f(n): return 2 * n", "assert f(1) == 2\nassert f(0) == 0", 1.0),
    "asserts that fail": ("def f(n): return 2", "assert f(1) == 2\nassert f(0) == 0", 0.0),
    "a function that does not exist": ("def g(n): return 2", "assert f(1) == 2", 0.0),
    "a check of a candidate": (
        "def f(n): return 2 * n",
        "def check(candidate):\n    assert candidate(3) == 6\n\ncheck(f)",
        1.0,
    ),
    "a check that fails": (
        "def f(n): return n",
        "METADATA = {}\ndef check(candidate):\n    assert candidate(3) == 6\n\ncheck(f)",
        0.0,
    ),
    "unittest": (
        "def f(n): return 2 * n",
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n"
        "        self.assertEqual(f(2), 4)\nif __name__ == '__main__':\n    unittest.main()",
        1.0,
    ),
    "unittest that fails": (
        "def f(n): return n",
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n"
        "        self.assertEqual(f(2), 4)\nunittest.main()",
        0.0,
    ),
    "prints": (
        "def f(n):\n    print('debug', n)\n    return n\nprint('loaded')",
        "assert f(1) == 1\nprint('done')",
        1.0,
    ),
    "recursion": (
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)",
        "assert f(900) == 900",
        1.0,
    ),
    "an expected exception": (
        "def f(n):\n    if n < 0: raise ValueError('negative')\n    return n",
        "try:\n    f(-1)\nexcept ValueError as error:\n    assert 'negative' in str(error)\n"
        "else:\n    assert False",
        1.0,
    ),
    "an expected exception that does not come": (
        "def f(n): return n",
        "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",
        0.0,
    ),
    "an exception of the program's own": (
        "class Empty(LookupError):\n    def __init__(self, code):\n        self.code = code\n"
        "def f(): raise Empty(7)",
        "try:\n    f()\n    assert False\nexcept Empty as error:\n    assert error.code == 7\n"
        "try:\n    f()\n    assert False\nexcept LookupError: pass",
        1.0,
    ),
    "a change in place": (
        "def f(items): items.sort()",
        "items = [3, 1, 2]\nf(items)\nassert items == [1, 2, 3]",
        1.0,
    ),
    "a change in place, nested": (
        "def f(grid):\n    for row in grid: row.reverse()",
        "grid = [[1, 2], [3, 4]]\nrow = grid[0]\nf(grid)\n"
        "assert grid == [[2, 1], [4, 3]] and row == [2, 1]",
        1.0,
    ),
    "a function as an argument": (
        "def f(g, items): return [g(x) for x in items]",
        "assert f(lambda x: x + 1, [1, 2]) == [2, 3]\nassert f(str, [1]) == ['1']\n"
        "import math\nassert f(math.sqrt, [4]) == [2.0]",
        1.0,
    ),
    "a key function that raises": (
        "def f(g):\n    try: g(1)\n    except KeyError: return 'caught'",
        "def g(x): raise KeyError(x)\nassert f(g) == 'caught'",
        1.0,
    ),
    "a decorator": (
        "def twice(g):\n    def inner(x): return 2 * g(x)\n    return inner",
        "@twice\ndef g(x): return x + 1\nassert g(1) == 4",
        1.0,
    ),
    "an object of the tests'": (
        "def f(node):\n    total = 0\n    while node:\n        total += node.value\n"
        "        node = node.next\n    return total",
        "class Node:\n    def __init__(self, value, next=None):\n"
        "        self.value = value\n        self.next = next\n"
        "assert f(Node(1, Node(2, Node(3)))) == 6",
        1.0,
    ),
    "a list of the tests' reversed": (
        "def f(node):\n    last = None\n    while node:\n"
        "        node.next, last, node = last, node, node.next\n    return last",
        "class Node:\n    def __init__(self, value, next=None):\n"
        "        self.value = value\n        self.next = next\n"
        "a = Node(1, Node(2))\nb = f(a)\n"
        "assert (b.value, b.next.value, b.next.next) == (2, 1, None)\n"
        "assert b.next is a",
        1.0,
    ),
    "a class": (
        LINKED_LIST,
        "items = List()\nassert len(items) == 0\nitems.push(1)\nitems.push(2)\n"
        "assert len(items) == 2 and list(items) == [2, 1]\nassert items.head.next.value == 1\n"
        "assert items.head.next.next is None\nassert isinstance(items, List)",
        1.0,
    ),
    "a generator": (
        "def f(n):\n    for i in range(n): yield i * i",
        "assert list(f(4)) == [0, 1, 4, 9]\ng = f(2)\nassert next(g) == 0\nassert next(g) == 1\n"
        "assert next(g, None) is None",
        1.0,
    ),
    "a map": ("def f(x): return map(str, x)", "assert list(f([1, 2])) == ['1', '2']", 1.0),
    "sets, tuples, and dicts with tuples as keys": (
        "def f(): return {(1, 2): {3}, frozenset([1]): (None, True)}",
        "assert f() == {(1, 2): {3}, frozenset([1]): (None, True)}",
        1.0,
    ),
    "collections": (
        "from collections import *\n"
        "def f(x): return Counter(x)\ndef g(): return deque([1]), defaultdict(int, a=1)",
        "from collections import deque\nassert f('aab') == {'a': 2, 'b': 1}\n"
        "assert g() == (deque([1]), {'a': 1})",
        1.0,
    ),
    "a named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2) and f().x == 1 and len(f()) == 2 and f()[1] == 2",
        1.0,
    ),
    "not a number, infinity and big numbers": (
        "def f(): return float('nan'), float('-inf'), 3 ** 3000, 1 + 2j, b'\\xff', range(3)",
        "import math\nnan, low, big, z, data, r = f()\nassert math.isnan(nan) and low < 0\n"
        "assert big == 3 ** 3000 and z == 1 + 2j and data == b'\\xff' and r == range(3)",
        1.0,
    ),
    "decimals, fractions and dates": (
        "import datetime\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "def f(): return Decimal('0.1'), Fraction(1, 3), datetime.date(2020, 2, 29)",
        "assert f() == (Decimal('0.1'), Fraction(1, 3), datetime.date(2020, 2, 29))",
        1.0,
    ),
    "text that is not ASCII": ("def f(s): return s[::-1]", "assert f('aé漢😀') == '😀漢éa'", 1.0),
    "an exception by another name": (
        "Wrong = ValueError\ndef f(): raise Wrong('x')",
        "try:\n    f()\n    assert False\nexcept Wrong: pass",
        1.0,
    ),
    "a name of Python's beside others of Python's": (
        "def sum(a, b): return a + b\ndef abs(x): return 1",
        "assert abs(sum(10, 15) - 25) < 1e-9",
        1.0,
    ),
    "a name of a module": (
        "def bisect(f, a, b):\n    while b - a > 1e-9:\n        c = (a + b) / 2\n"
        "        if f(c) > 0: b = c\n        else: a = c\n    return a\ndef abs(x): return 1",
        "assert abs(bisect(lambda x: x * x - 2, 0, 2) - 1.41421356) < 1e-6",
        1.0,
    ),
    "a name of Python's": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25", 1.0),
    "a module that the program imports": (
        "import math\ndef f(x): return math.sqrt(x)",
        "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)",
        1.0,
    ),
    "a constant": ("LIMIT = {'a': [1]}", "assert LIMIT['a'] == [1]", 1.0),
    "a main block": (
        "def f(): return 1\nif __name__ == '__main__':\n    print(f())",
        "assert f() == 1",
        1.0,
    ),
    "a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\n"
        "def f(): return P(1)",
        "p = f()\nassert (p.x, p.y) == (1, 2)\nassert str(p) == 'P(x=1, y=2)'",
        1.0,
    ),
    "operators of a class": (
        "class V:\n    def __init__(self, x): self.x = x\n"
        "    def __add__(self, o): return V(self.x + o.x)\n"
        "    def __lt__(self, o): return self.x < o.x\n    def __getitem__(self, i): return self.x",
        "assert (V(1) + V(2)).x == 3\nassert V(1) < V(2)\nassert V(5)[0] == 5",
        1.0,
    ),
    "a context manager": (
        "from contextlib import contextmanager\nlog = []\n@contextmanager\ndef f():\n"
        "    log.append('in')\n    yield 3\n    log.append('out')\ndef seen(): return log",
        "with f() as three:\n    assert three == 3\nassert seen() == ['in', 'out']",
        1.0,
    ),
    "slow, within the bound": (
        "import time\ndef f():\n    time.sleep(0.4)\n    return 1",
        "assert f() == 1",
        1.0,
    ),
    "input and output": (
        "print(input()[::-1])",
        [{"input": "abc", "output": "cba"}, {"input": "x", "output": "x"}],
        1.0,
    ),
    "input and output, in a main block": (
        "import sys\ndef main():\n    for line in sys.stdin: print(int(line) * 2)\n"
        "if __name__ == '__main__':\n    main()\n    sys.exit(0)",
        [{"input": "1\n2\n", "output": "2\n4"}],
        1.0,
    ),
    "output with recursion": (
        "def f(n): return n and 1 + f(n - 1)\nprint(f(900))",
        [{"output": "900"}],
        1.0,
    ),
    "wrong output": ("print(1)", [{"output": "2"}], 0.0),
}
