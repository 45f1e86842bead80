"""Running the stages: fingerprints, the store of artifacts, resume, progress."""
