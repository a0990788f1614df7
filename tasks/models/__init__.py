"""Where models come from: checkpoints, named architectures, factories, and pocket."""
