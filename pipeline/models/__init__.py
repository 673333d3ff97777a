"""What the trainer and the teacher share of models: loading, packing, attention over shared
prompts, logprobs in chunks.
"""
