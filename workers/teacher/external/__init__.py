"""Teachers that run elsewhere, asked for logprobs over HTTP. docs/teachers.md is the manual."""

from onstream.workers.teacher.external.stage import ExternalTeacher

__all__ = ["ExternalTeacher"]
