"""Vision-language models, of each family in turn.

The processors of the Qwen families need torchvision, which beside a CPU build of torch loads only
with the folder `site` on PYTHONPATH. `make test` sets that up; by hand, after it:
`PYTHONPATH=tests/vision/site:.venv/torchvision pytest tests/vision`.
"""
