"""Training on Accelerate: data, losses, optimizers, the loop and the stages of a run."""
