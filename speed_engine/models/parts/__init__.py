"""Pieces of networks: blocks, embeddings, and what runs between the matrix products."""
