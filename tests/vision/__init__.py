"""Vision-language models, of each family in turn.

The processors of the Qwen families need torchvision, which beside a CPU build of torch loads only with the folder `site` on
PYTHONPATH: `pip install --no-deps --target DIR torchvision==0.28.0`, then run with `PYTHONPATH=tests/vision/site:DIR`.
"""
