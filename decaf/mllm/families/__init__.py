"""One file per model family; each sets FAMILY. The registry finds them by itself."""
