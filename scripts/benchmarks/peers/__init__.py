"""Other libraries, and plain loops, that do the same work as jaxnn."""
