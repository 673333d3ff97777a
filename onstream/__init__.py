"""On-policy distillation of small language models as an asynchronous pipeline over Redis Streams.

The packages `settings`, `pipeline` and `workers` lie at the top of the repository, and this folder
links to them: one name to import, which the build, an editable install, type checkers and editors
all find without a rule of their own.
"""
