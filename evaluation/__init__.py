"""From embeddings to numbers and the report page; imports neither preprocessing nor heads."""
