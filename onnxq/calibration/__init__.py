"""Statistics of activations: gathered in a stream, merged, saved and checked."""
