"""The heart: losses, objective, teachers and the training loop."""
