"""Work beside the training, each piece a job with a hard time limit."""
