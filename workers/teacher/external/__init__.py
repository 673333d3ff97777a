"""Teachers that run elsewhere and are asked for logprobs over HTTP. docs/teachers.md is their
manual.
"""

from onstream.workers.teacher.external.stage import ExternalTeacher

__all__ = ["ExternalTeacher"]
