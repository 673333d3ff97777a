"""Vision-language models. Run with the folder `site` and torchvision on PYTHONPATH, as `make test-modes` does."""
