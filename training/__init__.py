"""The stages from text to checkpoints: sources, quality filter, tokenizer, packing, `Trainer`."""
