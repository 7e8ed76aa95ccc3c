"""Adapters: encoder states in, embeddings of the decoder out."""
