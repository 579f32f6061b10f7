"""Models as pure mathematics, each with its shardings in a file of its own."""
