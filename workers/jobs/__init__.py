"""Work beside the training: evaluations, exports, pruning and sweeps, each a job with a hard time
limit.
"""
