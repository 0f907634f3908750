"""The stages of a run, one module each; they do not import one another."""
