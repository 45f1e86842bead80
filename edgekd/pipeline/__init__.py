"""How stages run: fingerprints, the store of artifacts, resume, progress."""
