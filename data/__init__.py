"""The stages from text to packed tokens: sources, deduplication, the quality filter, the tokenizer, packing."""
