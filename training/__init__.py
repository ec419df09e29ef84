"""The stages from packed tokens to checkpoints, with `Trainer`."""
