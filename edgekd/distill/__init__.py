"""Losses, objective, teachers and the training loop."""
