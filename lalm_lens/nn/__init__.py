"""The parts of a block, one idea a file, under TransformerLens' names."""
