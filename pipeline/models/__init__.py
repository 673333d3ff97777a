"""What trainer, teacher and generator share of models: loading, packing, attention, logprobs."""
